"""The socket door: who may come in, what is said to whom, and one sentence for every way it cannot start."""

import os
import shutil
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import outrider.memory as memory
from outrider.errors import CallerError, StoreGone
from outrider.memory import wire
from outrider.memory.server import listen_at


def talk(path: Path, data: bytes) -> wire.Reply | None:
    """Send bytes; the first reply, None where the server just hangs up."""
    import msgspec

    with sockets.socket(sockets.AF_UNIX) as raw:
        raw.settimeout(5)
        raw.connect(str(path))
        raw.sendall(data)
        inbox = bytearray()
        while (body := wire.take_frame(inbox)) is None:
            more = raw.recv(65536)
            if not more:
                return None
            inbox += more
        reply: wire.Reply = msgspec.msgpack.decode(body, type=wire.Reply)
        return reply


HELLO = wire.frame(wire.Hello(wire.VERSION, "test"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no message of outrider memory"),
        (b"\xff" * 64, "at most 16777216 are allowed"),
        (wire.frame(wire.Hello(99, "new")), "you speak version 99, this server 1"),
        (wire.frame(wire.Lookup(1, b"")), "Hello comes first"),
        ((5).to_bytes(4, "little") + b"\x93\x01\x02\x03\x04", "no message of outrider memory"),
    ],
)
def test_garbage_is_refused_in_words_and_others_are_served(start, tmp_path: Path, data: bytes, says: str) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s")
    with memory.connect(tmp_path / "s") as store:
        reply = talk(tmp_path / "s", data)
        assert isinstance(reply, wire.Refusal) and says in reply.why
        assert store.lookup([]) == 0


@pytest.mark.parametrize(
    "message",
    [wire.Lookup(1, b"short"), wire.Release(7), wire.Prepare(1, b"k" * 16, 0), wire.Prepare(1, b"k" * 16, 1 << 60)],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(start, tmp_path: Path, message: wire.Request) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s")
    with sockets.socket(sockets.AF_UNIX) as raw:
        raw.connect(str(tmp_path / "s"))
        raw.sendall(HELLO + wire.frame(message))
        raw.settimeout(5)
        data = bytearray()
        while more := raw.recv(65536):
            data += more
    assert b"Welcome" in data and b"Refusal" in data
    with memory.connect(tmp_path / "s") as store:
        assert store.stats()["tiers"]["host"]["used_bytes"] == 0


def test_half_a_frame_holds_nobody_up(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s")
    with sockets.socket(sockets.AF_UNIX) as raw, memory.connect(tmp_path / "s") as store:
        raw.connect(str(tmp_path / "s"))
        raw.sendall(HELLO[:7])
        assert store.lookup([]) == 0


def test_the_socket_is_for_its_owner_only(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_is_refused(start) -> None:  # type: ignore[no-untyped-def]
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        start(folder / "s")
        (folder / "s").chmod(0o666)  # someone opened the door too far
        code = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            f"s.connect({str(folder / 's')!r}); s.settimeout(5); sys.stdout.write(repr(s.recv(4096)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "belongs to user 0, you are user 65534" in done.stdout and "Welcome" not in done.stdout
    finally:
        shutil.rmtree(folder)


def test_a_live_server_is_not_pushed_aside(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s")
    second = start(tmp_path / "s", ready=False)
    assert second.wait(10) == 1
    assert "a server listens there. Use it, or name another socket." in second.stderr.read()
    with memory.connect(tmp_path / "s") as store:
        assert store.lookup([]) == 0


def test_a_dead_servers_socket_is_taken_over(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = start(tmp_path / "s")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "s").exists()
    with pytest.raises(CallerError, match=r"Start `outrider memory serve"):
        memory.connect(tmp_path / "s")
    start(tmp_path / "s")
    memory.connect(tmp_path / "s").close()


def test_places_where_no_socket_can_be(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="Make that directory"):
        listen_at(tmp_path / "no" / "s")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CallerError, match="is a file, but no socket"):
        listen_at(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CallerError, match="too long"):
        listen_at(tmp_path / ("x" * 200))


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("host=900TiB", "tiers.host: 900 TiB asked for, this machine has"),
        ("host=4MiB,disk=900TiB", "tiers.disk: 900 TiB asked for"),
        ("host=4MiB,disk=4MiB,path=/no/such/place", "No such file or directory"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(start, tmp_path: Path, tiers: str, says: str) -> None:  # type: ignore[no-untyped-def]
    server = start(tmp_path / "s", tiers, ready=False)
    assert server.wait(10) == 1
    assert says in server.stderr.read()
    assert not (tmp_path / "s").exists()


def test_a_journal_needs_its_directory(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = start(tmp_path / "s", "host=4MiB", str(tmp_path / "no"), ready=False)
    assert server.wait(10) == 1
    assert "Name a directory that exists" in server.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_two_seconds_with_clients_attached(start, tmp_path: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    server = start(tmp_path / "s", "host=4MiB,disk=4MiB")
    store = memory.connect(tmp_path / "s")
    server.send_signal(number)
    assert server.wait(2) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s.blocks"]
    with pytest.raises(StoreGone):
        store.lookup([])
