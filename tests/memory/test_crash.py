"""Law 5: kill -9 at any moment; what was acknowledged as durable reads back equal, and nothing wrong is ever served.

A writer process stores blocks whose content follows from their key, and notes each acknowledgement in a file after it
came; the server is killed at some moment, and again, and again, each time found by a fresh one.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import outrider.memory as memory

SIZE = 20_000
WRITER = """
import sys
import outrider.memory as memory
from outrider.errors import OutriderError
socket, notes, name = sys.argv[1:]
store = memory.connect(socket)
with open(notes, "a") as done:
    for turn in range(10_000):
        keys = memory.KeySpace(model=f"{name}-{turn}", dtype="", layout="", block_tokens=1).chain(range(3))
        try:
            slots = store.prepare(keys, 20_000)
            for slot in slots:
                slot.view[:] = (slot.key * 1250)
            durable = turn % 3 != 0
            store.complete(slots, durable=durable)
        except OutriderError:
            break
        if durable:
            done.write("".join(key.hex() + "\\n" for key in keys))
            done.flush()
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_acknowledged(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    socket, notes = tmp_path / "s", tmp_path / "notes"
    tiers = f"host=2MiB,disk=512MiB,path={tmp_path / 'd'}"  # more than is written: a full disk lets the oldest go
    for turn, delay_s in enumerate((0.03, 0.3, 0.0, 0.11, 0.5, 0.07)):
        server = start(socket, tiers)
        command = [sys.executable, "-c", WRITER, str(socket), str(notes), f"w{turn}"]
        with subprocess.Popen(command) as writer:
            by_s = time.monotonic() + 10
            size = notes.stat().st_size if notes.exists() else 0
            while not notes.exists() or notes.stat().st_size == size:  # it has begun to write
                assert time.monotonic() < by_s
                time.sleep(0.002)
            time.sleep(delay_s)
            server.send_signal(signal.SIGKILL)
            server.wait()
            assert writer.wait(15) == 0
    start(socket, tiers)
    acknowledged = [bytes.fromhex(line) for line in notes.read_text().split()]
    assert len(acknowledged) >= 18
    with memory.connect(socket) as store:
        for key in acknowledged:
            with store.lease([key]) as lease:
                view = lease.views[0]
                assert view is not None, f"{key.hex()} was acknowledged as durable and is gone"
                assert view == key * 1250
        stats = store.stats()
        assert stats["tiers"]["disk"]["used_bytes"] < stats["tiers"]["disk"]["capacity_bytes"] / 2
        assert stats["checksum_failures"] == 0 and stats["recovered_blocks"] >= len(acknowledged)


def test_a_torn_write_is_not_served(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The index record is there, the data are not: as after a power cut that reordered unsynced writes."""
    tiers, folder = f"host=2MiB,disk=8MiB,path={tmp_path / 'd'}", tmp_path / "d"
    keys = memory.KeySpace(model="m", dtype="", layout="", block_tokens=1).chain(range(4))
    with memory.open(tiers) as store:
        slots = store.prepare(keys, SIZE)
        for slot in slots:
            assert slot is not None
            slot.view[:] = slot.key * 1250
        store.complete(slots, durable=True)
    data = (folder / "blocks.data").read_bytes()
    at = data.find(keys[2] * 1250)
    (folder / "blocks.data").write_bytes(data[: at + 5000] + bytes(len(data) - at - 5000))
    start(tmp_path / "s", tiers)
    with memory.connect(tmp_path / "s") as store, store.lease(keys) as lease:
        assert lease.views[2] is None
        assert lease.views[0] == keys[0] * 1250 and lease.views[1] == keys[1] * 1250
