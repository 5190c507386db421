"""The client door against a real server: what is written is what is read, by whoever, until someone dies."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import outrider.memory as memory
from outrider.errors import CallerError, StoreGone, WorldError
from outrider.memory import Store
from outrider.wants import Want

SIZE = 5000
SPACE = memory.KeySpace(model="m", dtype="float32", layout="test", block_tokens=1)


def content(number: int, size: int = SIZE) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


def save(store: Store, keys: list[bytes], durable: bool = False, size: int = SIZE) -> int:
    """Write block i with content(i); how many had to be written."""
    slots = store.prepare(keys, size)
    for number, slot in enumerate(slots):
        if slot is not None:
            slot.view[:] = content(number, size)
    store.complete(slots, durable)
    return sum(slot is not None for slot in slots)


def read(store: Store, keys: list[bytes], timeout_s: float = 2.0) -> list[bytes | None]:
    with store.lease(keys, timeout_s) as lease:
        return [None if view is None else bytes(view) for view in lease.views]


def until(condition: "object", timeout_s: float = 5.0) -> None:
    by_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < by_s, "it did not happen in time"
        time.sleep(0.005)


def test_the_docstrings_example_runs() -> None:
    assert memory.__doc__ is not None
    code = [line[4:] for line in memory.__doc__.splitlines() if line.startswith("    ") or not line]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(code), {})
    assert printed.getvalue() == "4 4096\n"


def test_prepare_hides_and_complete_publishes() -> None:
    keys = SPACE.chain(range(3))
    with memory.open("host=1MiB") as store:
        slots = store.prepare(keys, SIZE)
        assert store.lookup(keys) == 0 and read(store, keys) == [None] * 3
        assert store.prepare(keys, SIZE) == [None] * 3  # one writer wins
        for number, slot in enumerate(slots):
            assert slot is not None
            slot.view[:] = content(number)
        store.complete(slots[:2])
        assert store.lookup(keys) == 2 and read(store, keys) == [content(0), content(1), None]
        store.abandon(slots[2:])
        assert store.lookup(keys) == 2
        assert save(store, keys) == 1
        assert read(store, keys)[2] == content(2)


def test_views_are_read_only_and_die_with_the_lease() -> None:
    keys = SPACE.chain(range(1))
    with memory.open("host=1MiB") as store:
        slots = store.prepare(keys, SIZE)
        assert slots[0] is not None
        slots[0].view[:] = content(0)
        store.complete(slots)
        with pytest.raises(ValueError, match="released"):
            slots[0].view[0] = 1
        lease = store.lease(keys)
        view = lease.views[0]
        assert view is not None
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        lease.release()
        with pytest.raises(ValueError, match="released"):
            bytes(view)
        with pytest.raises(CallerError, match="released twice"):
            lease.release()


def test_only_the_leading_run_is_served() -> None:
    keys = SPACE.chain(range(4))
    with memory.open("host=1MiB") as store:
        assert save(store, [keys[0], keys[2], keys[3]]) == 3
        assert store.lookup(keys) == 1
        assert [view is not None for view in store.lease(keys).views] == [True, False, False, False]
        assert store.lookup([]) == 0 and read(store, []) == []


def test_misuse_is_refused_and_the_store_lives_on() -> None:
    keys = SPACE.chain(range(2))
    with memory.open("host=1MiB") as store:
        slots = store.prepare(keys, SIZE)
        store.complete(slots[:1])
        twice = memory.Slot(slots[1].link, keys[0], slots[1].view)  # type: ignore[union-attr]
        with pytest.raises(CallerError, match="was not prepared by this client"):
            store.complete([twice])
        with pytest.raises(CallerError, match="has 3 bytes, not 16"):
            store.lookup([b"abc"])
        with pytest.raises(CallerError, match="Blocks have at least 1"):
            store.prepare(keys, 0)
        with pytest.raises(CallerError, match="place 'moon'"):
            store.want(Want("p", "moon", 1.0, 1.0))
        with pytest.raises(CallerError, match="must be finite"):
            store.want(Want("p", "host", float("inf"), 1.0))
        with pytest.raises(WorldError, match="not on disk"):
            save(store, SPACE.chain([7]), durable=True)  # there is no disk tier
        assert store.lookup(keys) == 1


def test_blocks_of_many_sizes_share_the_arena() -> None:
    with memory.open("host=1MiB") as store:
        for size in (4, 400, 40_000, 400_000):
            keys = memory.KeySpace(model=f"s{size}", dtype="", layout="", block_tokens=1).chain(range(5))
            save(store, keys, size=size)
            count = store.lookup(keys)
            assert count and read(store, keys[:count]) == [content(number, size) for number in range(count)]
        tier = store.stats()["tiers"]["host"]
        assert tier["free_bytes"] + tier["used_bytes"] == tier["capacity_bytes"]


def test_evicted_blocks_come_back_from_disk_equal(tmp_path: Path) -> None:
    size = 100_000
    with memory.open(f"host=1MiB,disk=8MiB,path={tmp_path / 'd'}") as store:
        for number in range(4):
            keys = memory.KeySpace(model=f"s{number}", dtype="", layout="", block_tokens=1).chain(range(8))
            assert save(store, keys, size=size) == 8
            store.flush()
        for number in (0, 1, 2, 3, 0):
            keys = memory.KeySpace(model=f"s{number}", dtype="", layout="", block_tokens=1).chain(range(8))
            assert read(store, keys) == [content(at, size) for at in range(8)]
        stats = store.stats()
        assert stats["moved_bytes"]["host->disk"] == 32 * size and stats["evictions"]["host"] >= 24
        assert stats["moved_bytes"]["disk->host"] >= 24 * size and stats["checksum_failures"] == 0


def test_a_wanted_path_is_in_host_before_it_is_leased(tmp_path: Path) -> None:
    size = 100_000
    with memory.open(f"host=1MiB,disk=8MiB,path={tmp_path / 'd'}") as store:
        keys = SPACE.chain(range(8))
        save(store, keys, size=size)
        store.remember("call-1", keys)
        store.flush()
        other = memory.KeySpace(model="x", dtype="", layout="", block_tokens=1).chain(range(8))
        save(store, other, size=size)
        store.remember("call-2", other)
        store.withdraw("call-2")
        before = store.stats()["moved_bytes"].get("disk->host", 0)
        store.want(Want("call-1", "host", time.monotonic() + 0.5, 1.0))
        until(lambda: store.stats()["moved_bytes"].get("disk->host", 0) > before)
        until(lambda: read(store, keys[:0]) == [] and store.stats()["tiers"]["host"]["blocks"] >= 8)
        assert read(store, keys) == [content(at, size) for at in range(8)]
        stats = store.stats()
        assert (stats["wants_met"], stats["open_wants"]) == (1, 0)


def test_damage_on_disk_is_a_gone_block_not_a_wrong_one(tmp_path: Path) -> None:
    keys, tiers = SPACE.chain(range(3)), f"host=1MiB,disk=4MiB,path={tmp_path / 'd'}"
    with memory.open(tiers) as store:
        save(store, keys, durable=True)
    data = bytearray((tmp_path / "d" / "blocks.data").read_bytes())
    at = data.find(content(1))
    data[at + 77] ^= 4
    (tmp_path / "d" / "blocks.data").write_bytes(data)
    with memory.open(tiers) as store:
        assert store.lookup(keys) == 3
        assert read(store, keys) == [content(0), None, content(2)]
        assert store.lookup(keys) == 1 and store.stats()["checksum_failures"] == 1
        slots = store.prepare(keys, SIZE)
        assert [slot is not None for slot in slots] == [False, True, False]
        slots[1].view[:] = content(1)  # type: ignore[union-attr]
        store.complete(slots)
        assert read(store, keys) == [content(0), content(1), content(2)]


def test_a_lease_that_cannot_fit_is_answered_with_what_there_is(tmp_path: Path) -> None:
    keys = SPACE.chain(range(40))
    with memory.open(f"host=1MiB,disk=8MiB,path={tmp_path / 'd'}") as store:
        for start in range(0, 40, 8):
            save(store, keys[start : start + 8], size=100_000)
            store.flush()
        began_s = time.monotonic()
        with store.lease(keys, timeout_s=4.0) as lease:
            held = [view is not None for view in lease.views]
        assert time.monotonic() - began_s < 2.0, "it must not wait for room that cannot come"
        assert sum(held) == 10


def test_many_threads_share_one_store() -> None:
    with memory.open("host=8MiB") as store:
        wrong: list[object] = []

        def work(name: int) -> None:
            keys = memory.KeySpace(model=f"t{name % 3}", dtype="", layout="", block_tokens=1).chain(range(6))
            for _ in range(20):
                save(store, keys)
                got = read(store, keys)
                wrong.extend(view for at, view in enumerate(got) if view not in (None, content(at)))

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and store.stats()["miss_blocks"] < 8 * 20 * 6


READER = """
import sys
import outrider.memory as memory
sys.path.insert(0, sys.argv[2])
store = memory.connect(sys.argv[1], name="reader")
keys = memory.KeySpace(model="m", dtype="float32", layout="test", block_tokens=1).chain(range(3))
with store.lease(keys) as lease:
    print([bytes(view)[:4].hex() for view in lease.views], flush=True)
    held = store.prepare([b"x" * 16], 5000)
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_two_processes_share_blocks_and_a_dead_one_gives_all_back(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket = tmp_path / "s"
    start(socket)
    with memory.connect(socket, name="writer") as store:
        keys = SPACE.chain(range(3))
        assert save(store, keys) == 3
        used_bytes = store.stats()["tiers"]["host"]["used_bytes"]
        command = [sys.executable, "-c", READER, str(socket), "."]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == f"{[content(at)[:4].hex() for at in range(3)]}\n"
            assert reader.stdout.readline() == "holding\n"
            assert store.prepare([b"x" * 16], SIZE) == [None]  # the other process writes it
            reader.send_signal(signal.SIGKILL)
            reader.wait()
        until(lambda: store.stats()["tiers"]["host"]["used_bytes"] == used_bytes)
        many = memory.KeySpace(model="flood", dtype="", layout="", block_tokens=1).chain(range(600))
        assert save(store, many) == 512  # all of host: its leases returned, so that their blocks could be evicted
        assert store.lookup(keys) == 0


def test_a_dead_server_is_store_gone_at_once_and_a_new_one_is_found(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket, tiers = tmp_path / "s", f"host=4MiB,disk=8MiB,path={tmp_path / 'd'}"
    server = start(socket, tiers)
    store = memory.connect(socket)
    keys = SPACE.chain(range(3))
    save(store, keys, durable=True)
    lease = store.lease(keys)
    slots = store.prepare(SPACE.chain([9]), SIZE)
    server.send_signal(signal.SIGKILL)
    server.wait()
    began_s = time.monotonic()
    with pytest.raises(StoreGone):
        store.lookup(keys)
    with pytest.raises(StoreGone):
        store.complete(slots)
    assert time.monotonic() - began_s < 1.0
    view = lease.views[0]
    assert view is not None and bytes(view) == content(0)  # mapped memory outlives the server
    with pytest.raises(StoreGone):  # but nobody promises that any more
        lease.release()
    start(socket, tiers)  # takes the stale socket over
    until(lambda: _answers(store, keys))
    assert read(store, keys) == [content(at) for at in range(3)]
    store.close()
    with pytest.raises(StoreGone):
        store.lookup(keys)


def _answers(store: Store, keys: list[bytes]) -> bool:
    try:
        return store.lookup(keys) == 3
    except StoreGone:
        return False


def test_a_server_that_hangs_is_store_gone_within_the_timeout(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket = tmp_path / "s"
    server = start(socket)
    store = memory.connect(socket, timeout_s=0.3)
    server.send_signal(signal.SIGSTOP)
    began_s = time.monotonic()
    with pytest.raises(StoreGone, match=r"no answer within 0\.3 s"):
        store.lookup(SPACE.chain(range(3)))
    assert time.monotonic() - began_s < 1.0
    server.send_signal(signal.SIGCONT)
    store.close()


def test_bytes_in_use_are_not_given_away_when_another_thread_times_out(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket = tmp_path / "s"
    server = start(socket)
    store = memory.connect(socket, timeout_s=0.2)
    keys = SPACE.chain(range(3))
    save(store, keys)
    lease = store.lease(keys)
    slots = store.prepare(SPACE.chain([9]), SIZE)  # a thread would be writing here
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreGone):
        store.stats()
    server.send_signal(signal.SIGCONT)
    until(lambda: _is_back(store))
    flood = memory.KeySpace(model="flood", dtype="", layout="", block_tokens=1).chain(range(600))
    assert save(store, flood) == 512 - 4  # all of host, but for what the spoilt connection still holds
    assert [bytes(view) for view in lease.views if view] == [content(at) for at in range(3)]
    with pytest.raises(StoreGone):
        lease.release()  # the caller cannot know how long the hold lasted: it recomputes
    with pytest.raises(StoreGone):
        store.complete(slots)
    del lease, slots
    assert save(store, flood[512 - 4 : 512]) == 4  # dropped: the server has their room back
    store.close()


def _is_back(store: Store) -> bool:
    try:
        return bool(store.stats())
    except StoreGone:
        return False


def test_nothing_is_left_behind(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket = tmp_path / "s"
    before = sorted(os.listdir("/dev/shm"))
    server = start(socket, "host=4MiB")
    server.send_signal(signal.SIGTERM)
    assert server.wait(2) == 0
    assert sorted(tmp_path.iterdir()) == [] and sorted(os.listdir("/dev/shm")) == before
