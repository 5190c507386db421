"""Laws 1 and 5 of the disk tier: whatever bit is wrong, a block reads back equal or is reported gone."""

import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.memory.events import Copy, Found
from outrider.memory.tiers.disk import HEADER_BYTES, Disk
from outrider.memory.tiers.index import RECORD_BYTES, Index
from outrider.memory.tiers.tier import Damaged

PAGE = 4096
SLOT = HEADER_BYTES + PAGE
SIZE = 3000
CAPACITY = 1 << 20
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


def page(data: bytes = b"") -> memoryview:
    """A page that direct I/O accepts."""
    import mmap

    view = memoryview(mmap.mmap(-1, PAGE))
    view[: len(data)] = data
    return view


def copy_of(number: int, slot: int, generation: int, src: int = 0) -> Copy:
    checksum = xxhash.xxh3_64_intdigest(content(number))
    return Copy(generation, f"{number:032x}", SIZE, src, slot * SLOT, checksum, generation)


def put(disk: Disk, *copies: Copy) -> None:
    for copy in copies:
        disk.write(copy, page(content(int(copy.item, 16))))
    disk.commit(copies)


def get(disk: Disk, found: Found) -> bytes:
    copy = Copy(0, found.item, found.size_bytes, found.at, 0, found.checksum, found.generation)
    view = page()
    disk.read(copy, view)
    return bytes(view[: found.size_bytes])


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "d", CAPACITY)
    put(disk, copy_of(1, 0, 1), copy_of(2, 1, 2))
    put(disk, copy_of(3, 2, 3))
    disk.erase([f"{2:032x}"])
    disk.write(copy_of(4, 3, 4), page(content(4)))  # never committed
    disk.close()
    again = Disk(tmp_path / "d", CAPACITY)
    assert {int(found.item, 16): get(again, found) for found in again.found()} == {1: content(1), 3: content(3)}
    again.close()


@MANY
@given(st.integers(0, 3 * SLOT - 1), st.integers(1, 255))
def test_any_flipped_byte_of_the_data_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    disk = Disk(folder, CAPACITY)
    put(disk, *(copy_of(number, number, number + 1) for number in range(3)))
    fd = os.open(folder / "blocks.data", os.O_RDWR)
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ flip]), at)
    os.close(fd)
    slot, inside = divmod(at, SLOT)
    matters = inside < RECORD_BYTES or HEADER_BYTES <= inside < HEADER_BYTES + SIZE
    for found in disk.found():
        number = int(found.item, 16)
        if number == slot and matters:
            with pytest.raises(Damaged):
                get(disk, found)
        else:
            assert get(disk, found) == content(number)
    disk.close()


@MANY
@given(st.data())
def test_any_cut_or_flip_of_the_index_loses_no_other_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = Index(folder / "blocks.index")
    for number in range(6):
        index.store([Found(f"{number:032x}", number * SLOT, SIZE, number, number + 1)])
    index.close()
    path = folder / "blocks.index"
    whole = bytearray(path.read_bytes())
    assert len(whole) == 7 * RECORD_BYTES
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
        expected = [number for number in range(6) if (number + 2) * RECORD_BYTES <= at]
    else:
        whole[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        expected = [number for number in range(6) if number + 1 != at // RECORD_BYTES]
    again = Index(path)
    assert [int(item, 16) for item in again.live] == expected
    again.store([Found(f"{9:032x}", 9 * SLOT, SIZE, 9, 99)])  # and it goes on from there
    again.close()
    third = Index(path)
    assert [int(item, 16) for item in third.live] == [*expected, 9]
    third.close()


def test_a_slot_that_was_used_again_belongs_to_the_newer_block(tmp_path: Path) -> None:
    """Stale index: the record of the newer block is lost, that of the older one points into the newer one's slot."""
    disk = Disk(tmp_path, CAPACITY)
    put(disk, copy_of(1, 0, 1))
    disk.write(copy_of(2, 0, 2), page(content(2)))
    disk.close()
    again = Disk(tmp_path, CAPACITY)
    (found,) = again.found()
    assert int(found.item, 16) == 1
    with pytest.raises(Damaged, match="stale"):
        get(again, found)
    put(again, copy_of(2, 0, 2))
    again.close()
    third = Disk(tmp_path, CAPACITY)
    assert [int(found.item, 16) for found in third.found()] == [2]
    third.close()


def test_the_same_key_stored_twice_reads_as_the_later_one(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CAPACITY)
    put(disk, copy_of(1, 0, 1))
    put(disk, copy_of(1, 1, 2))
    disk.close()
    again = Disk(tmp_path, CAPACITY)
    (found,) = again.found()
    assert (found.at, found.generation) == (SLOT, 2) and get(again, found) == content(1)
    again.close()


def test_a_long_index_is_rewritten_and_says_the_same(tmp_path: Path) -> None:
    index = Index(tmp_path / "blocks.index")
    index.store([Found(f"{1:032x}", 0, SIZE, 1, 1)])
    for generation in range(2, 2500):
        index.erase([f"{2:032x}"])
        index.store([Found(f"{2:032x}", SLOT, SIZE, 1, generation)]) if generation % 600 == 0 else index.live.update(
            {f"{2:032x}": Found(f"{2:032x}", SLOT, SIZE, 1, generation)}
        )
    index.store([Found(f"{3:032x}", 2 * SLOT, SIZE, 1, generation) for generation in range(2500, 6000)])
    index.close()
    assert (tmp_path / "blocks.index").stat().st_size <= 5 * RECORD_BYTES
    again = Index(tmp_path / "blocks.index")
    assert sorted(int(item, 16) for item in again.live) == [1, 2, 3]
    again.close()


def test_one_server_a_directory(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CAPACITY)
    with pytest.raises(CallerError, match="belongs to a memory server that runs"):
        Disk(tmp_path, CAPACITY)
    disk.close()
    Disk(tmp_path, CAPACITY).close()


def test_more_than_the_file_system_has(tmp_path: Path) -> None:
    with pytest.raises(
        CallerError, match=rf"tiers\.disk: 1\.02e\+03 TiB|tiers\.disk: .* asked for, {tmp_path} has .* free"
    ):
        Disk(tmp_path, 1 << 50)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="No such file or directory"):
        Disk(tmp_path / "no" / "where", CAPACITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(CallerError, match=r"tiers\.disk"):
        Disk(tmp_path / "file", CAPACITY)
