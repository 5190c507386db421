"""A disk that takes no more: blocks stay in host, clients get an answer, one line is logged; later it works again."""

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import outrider.memory as memory
from outrider.errors import CallerError, WorldError

SIZE = 100_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def save(store: memory.Store, name: str, count: int, durable: bool) -> list[bytes]:
    keys = memory.KeySpace(model=name, dtype="", layout="", block_tokens=1).chain(range(count))
    slots = store.prepare(keys, SIZE)
    for slot in slots:
        if slot is not None:
            slot.view[:] = slot.key * (SIZE // 16)
    store.complete(slots, durable)
    return keys


def test_a_tier_larger_than_its_file_system_is_refused(small_disk: Path) -> None:
    with pytest.raises(CallerError, match=r"tiers\.disk: 4 MiB asked for, .*small/d has 2 MiB free"):
        memory.open(f"host=4MiB,disk=4MiB,path={small_disk / 'd'}")


def test_a_full_disk_keeps_blocks_in_host_and_says_so_once(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with memory.open(f"host=8MiB,disk=2000KiB,path={small_disk / 'd'}") as store:
        first = save(store, "first", 4, durable=True)
        hog = small_disk / "hog"
        hog.write_bytes(bytes(_free_bytes(small_disk) - 50_000))  # somebody else fills the disk
        with pytest.raises(WorldError, match="not on disk"):
            save(store, "second", 8, durable=True)
        stats = store.stats()
        assert stats["disk_failures"]["ENOSPC"] >= 1
        for name, count in (("first", 4), ("second", 8)):
            keys = memory.KeySpace(model=name, dtype="", layout="", block_tokens=1).chain(range(count))
            with store.lease(keys) as lease:
                assert [view == key * (SIZE // 16) for key, view in zip(keys, lease.views, strict=True)] == [
                    True
                ] * count
        lines = [record for record in caplog.records if "ENOSPC" in record.getMessage()]
        assert len(lines) == 1, [record.getMessage() for record in lines]
    hog.unlink()
    with memory.open(f"host=8MiB,disk=2000KiB,path={small_disk / 'd'}") as store:
        assert store.lookup(first) == 4
        assert store.lookup(save(store, "third", 4, durable=True)) == 4  # there is room again


@pytest.mark.slow
def test_after_a_rest_the_disk_is_tried_again(small_disk: Path) -> None:
    tiers = f"host=8MiB,disk=1MiB,path={small_disk / 'd'}"
    with memory.open(tiers) as store:
        hog = small_disk / "hog"
        hog.write_bytes(bytes(_free_bytes(small_disk)))
        keys = save(store, "late", 2, durable=False)
        by_s = time.monotonic() + 5
        while not store.stats()["disk_failures"]:
            assert time.monotonic() < by_s
            time.sleep(0.01)
        hog.unlink()
        store.flush()  # waits for the next try
        assert store.stats()["moved_bytes"]["host->disk"] == 2 * SIZE
    with memory.open(tiers) as store:
        assert store.lookup(keys) == 2


def _free_bytes(place: Path) -> int:
    space = os.statvfs(place)
    return space.f_bavail * space.f_frsize
