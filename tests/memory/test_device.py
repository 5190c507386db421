"""The emulated hybrid device against a plain bytearray: whatever is asked, in whatever order, bytes stay right."""

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.errors import CallerError
from outrider.memory.tiers.device import Range, Ticket
from outrider.memory.tiers.emulated import Emulated
from outrider.memory.tiers.medium import Medium

LINE = 4096
LINES, FRAMES = 80, 16
SIZE = LINES * LINE


class Fragile(Medium):
    """The real file, with errors on demand: the errno that the next reads or writes end with, 0 for none."""

    read_errno = write_errno = 0

    def read(self, at: int, buffers) -> None:  # type: ignore[no-untyped-def]
        if self.read_errno:
            raise OSError(self.read_errno, os.strerror(self.read_errno))
        super().read(at, buffers)

    def write(self, at: int, buffers) -> None:  # type: ignore[no-untyped-def]
        if self.write_errno:
            raise OSError(self.write_errno, os.strerror(self.write_errno))
        super().write(at, buffers)


def device(folder: Path, frames: int = FRAMES) -> tuple[Emulated, Fragile]:
    made: list[Fragile] = []

    def medium(directory: Path, size_bytes: int) -> Medium:
        made.append(Fragile(directory, size_bytes))
        return made[0]

    return Emulated(folder, SIZE, frames * LINE, line_bytes=LINE, medium=medium, retry_s=0.002), made[0]


def failure(call: Callable[[], object]) -> int:
    """The errno that a call ends with, 0 where it ends well."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def lines_of(ranges: list[Range]) -> set[int]:
    return {line for at, size in ranges if size for line in range(at // LINE, -(-(at + size) // LINE))}


RANGES = st.tuples(
    st.integers(0, SIZE - 1), st.sampled_from([1, 7, LINE, LINE + 1, 3 * LINE, 9 * LINE, 20 * LINE])
).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))
WHOLE = st.tuples(st.integers(0, LINES - 1), st.integers(1, 6)).map(
    lambda pair: (pair[0] * LINE, min(pair[1], LINES - pair[0]) * LINE)
)


class Oracle(RuleBasedStateMachine):
    """Every read equals the bytearray's; pins are counted by line; what cannot be done is said and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.device, self.medium = device(Path(self.folder.name))
        self.truth = bytearray(SIZE)
        self.pins: dict[int, int] = {}
        self.pinned: list[list[Range]] = []
        self.tickets: list[Ticket] = []

    @rule(where=st.one_of(RANGES, WHOLE))
    def read(self, where: Range) -> None:
        at, size = where
        into = bytearray(b"\xaa" * size)
        self.device.read(at, memoryview(into))
        assert into == self.truth[at : at + size]

    @rule(where=st.one_of(RANGES, WHOLE), seed=st.integers(0, 255))
    def write(self, where: Range, seed: int) -> None:
        at, size = where
        data = bytes((seed + n) % 251 for n in range(size))
        self.device.write(at, memoryview(data))
        self.truth[at : at + size] = data

    @rule(ranges=st.lists(st.one_of(RANGES, WHOLE), min_size=1, max_size=3), pin=st.booleans())
    def prefetch(self, ranges: list[Range], pin: bool) -> None:
        over = (
            len(lines_of(ranges) | {line for line, count in self.pins.items() if count}) * LINE > self.device.pin_bytes
        )
        ticket = self.device.prefetch(ranges, pin)
        if pin and over:
            assert not ticket.wait(0) and "the device pins 32 KiB at most" in ticket.why
            return
        self.tickets.append(ticket)
        if not pin and len(self.tickets) % 2:
            return  # reads and writes go on beside it
        assert ticket.wait(5), ticket.why
        if pin:
            self.pinned.append(ranges)
            for line in lines_of(ranges):
                self.pins[line] = self.pins.get(line, 0) + 1

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        ranges = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.device.unpin(ranges)
        for line in lines_of(ranges):
            self.pins[line] -= 1

    @rule()
    def flush(self) -> None:
        self.device.flush()
        assert self.device.stats()["dirty"] == 0
        on_medium = os.pread(self.medium._fd, SIZE, 0) if not _direct(self.medium._fd) else _read_all(self.medium._fd)
        assert on_medium == self.truth

    @rule(where=WHOLE, code=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def a_read_of_the_medium_fails(self, where: Range, code: int) -> None:
        """What is in the cache is still given, rightly; the rest is an error, never other bytes."""
        at, size = where
        self.medium.read_errno = code
        into = bytearray(size)
        misses = self.device.stats()["misses"]
        error = failure(lambda: self.device.read(at, memoryview(into)))
        assert error == code or (into == self.truth[at : at + size] and self.device.stats()["misses"] == misses)
        ticket = self.device.prefetch([where])
        assert ticket.wait(5) or ticket.errno == code
        self.medium.read_errno = 0

    @rule(where=WHOLE)
    def the_write_back_fails(self, where: Range) -> None:
        """Nothing dirty is lost: it stays readable, and `flush` says that it is not on the medium."""
        at, size = where
        self.medium.write_errno = errno.ENOSPC
        data = os.urandom(1) * min(size, LINE)
        error = failure(lambda: self.device.write(at, memoryview(data)))
        if not error:
            self.truth[at : at + len(data)] = data
            error = failure(self.device.flush)
        assert error == errno.ENOSPC  # of the write itself, where as much was dirty as may be
        self.medium.write_errno = 0

    @invariant()
    def the_books_agree(self) -> None:
        with self.device._cache.lock:
            lines = self.device._cache.lines
            lines.check()
            assert {line: count for line, count in self.pins.items() if count} == {
                int(line): int(lines.pins[line]) for line in np.flatnonzero(lines.pins)
            }
            assert lines.dirty_frames <= FRAMES // 4
            pinned = np.flatnonzero(lines.pins)
            assert (lines.frame_of[pinned] >= 0).all(), "a pinned line left the cache"

    def teardown(self) -> None:
        self.device.flush()
        self.device.close()
        assert not any(ticket.open for ticket in self.tickets), "a prefetch that nobody ends"
        self.folder.cleanup()


def _direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _read_all(fd: int) -> bytes:
    import mmap

    page = mmap.mmap(-1, SIZE)
    assert os.preadv(fd, [page], 0) == SIZE
    return bytes(page)


TestOracle = Oracle.TestCase
TestOracle.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_a_fresh_device_is_zeros_and_forgets_at_its_end(tmp_path: Path) -> None:
    for _ in range(2):
        hybrid, _ = device(tmp_path)
        into = bytearray(b"x" * SIZE)
        hybrid.read(0, memoryview(into))
        assert into == bytes(SIZE)
        hybrid.write(0, memoryview(b"y" * SIZE))
        hybrid.close()
        assert list(tmp_path.iterdir()) == []  # the file has no name


def test_hits_misses_and_bytes_are_counted(tmp_path: Path) -> None:
    hybrid, _ = device(tmp_path)
    into = memoryview(bytearray(3 * LINE))
    hybrid.read(0, into)
    hybrid.read(LINE // 2, into[:LINE])
    stats = hybrid.stats()
    assert (stats["misses"], stats["hits"]) == (3, 2)
    assert (stats["miss_bytes"], stats["hit_bytes"]) == (3 * LINE, LINE)
    assert hybrid.prefetch([(40 * LINE, 2 * LINE)], pin=True).wait(5)
    hybrid.read(40 * LINE, into[: 2 * LINE])
    stats = hybrid.stats()
    assert stats["prefetched"] >= 2 and stats["prefetch_hits"] >= 2 and stats["misses"] == 3
    assert stats["pinned_bytes"] == 2 * LINE
    assert stats["kind"].startswith("emulated") and stats["medium"] == str(tmp_path) and stats["profile"] == "none"
    hybrid.close()


def test_a_pinned_line_survives_a_scan_and_an_unpinned_one_does_not(tmp_path: Path) -> None:
    hybrid, _ = device(tmp_path)
    kept, loose = (0, 2 * LINE), (4 * LINE, 2 * LINE)
    assert hybrid.prefetch([kept], pin=True).wait(5) and hybrid.prefetch([loose]).wait(5)
    for at in range(10 * LINE, SIZE, 3 * LINE):  # not in order: no prefetches of its own
        hybrid.read(at, memoryview(bytearray(LINE)))
    for where, missed in ((kept, 0), (loose, 2)):
        before = hybrid.stats()["misses"]
        hybrid.read(where[0], memoryview(bytearray(where[1])))
        assert hybrid.stats()["misses"] - before == missed
    hybrid.close()


def test_a_reader_that_goes_in_order_finds_what_comes_next(tmp_path: Path) -> None:
    hybrid, _ = device(tmp_path, frames=64)
    for at in range(0, 64 * LINE, LINE):
        hybrid.read(at, memoryview(bytearray(LINE)))
        while hybrid._orders.qsize():
            pass
    stats = hybrid.stats()
    assert stats["misses"] < 40 and stats["prefetched"] >= 24, stats
    hybrid.close()


def test_a_prefetch_says_how_it_ended_once(tmp_path: Path) -> None:
    hybrid, medium = device(tmp_path)
    ended: list[Ticket] = []
    good = hybrid.prefetch([(0, LINE)], pin=True, done=ended.append)
    assert good.wait(5) and not good.open
    medium.read_errno = errno.EIO
    bad = hybrid.prefetch([(9 * LINE, LINE)], pin=True, done=ended.append)
    assert not bad.wait(5) and (bad.errno, bad.why) == (errno.EIO, "Input/output error")
    over = hybrid.prefetch([(0, SIZE)], pin=True, done=ended.append)
    assert over.errno == errno.EDQUOT and over.why == (
        "320 KiB would be pinned, the device pins 32 KiB at most. Unpin some first."
    )
    assert hybrid.stats()["pinned"] == 1, "what failed pins nothing"
    hybrid.close()
    late = hybrid.prefetch([(0, LINE)], done=ended.append)
    assert late.errno == errno.ESHUTDOWN
    assert ended == [good, bad, over, late]


def test_writes_wait_for_the_write_back_and_hear_when_it_cannot_go_on(tmp_path: Path) -> None:
    hybrid, medium = device(tmp_path)
    medium.write_errno = errno.ENOSPC
    with pytest.raises(OSError, match="no write-back: No space left") as caught:
        hybrid.write(0, memoryview(b"z" * (FRAMES * LINE)))
    assert caught.value.errno == errno.ENOSPC and hybrid.stats()["write_stalls"] == 1
    medium.write_errno = 0
    hybrid.write(0, memoryview(b"z" * (FRAMES * LINE)))
    hybrid.flush()
    into = bytearray(FRAMES * LINE)
    hybrid.read(0, memoryview(into))
    assert into == b"z" * len(into)
    hybrid.close()


def test_many_threads_each_with_its_own_bytes(tmp_path: Path) -> None:
    """Ranges that share lines but no bytes; a cache far too small; a prefetcher in between."""
    hybrid, _ = device(tmp_path)
    wrong: list[str] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        own = range(number * 700, SIZE - 700, 4 * 700)
        truth: dict[int, bytes] = {}
        for turn in range(150):
            at = int(rng.choice(own))
            if turn % 3:
                into = bytearray(700)
                hybrid.read(at, memoryview(into))
                if into != truth.get(at, bytes(700)):
                    wrong.append(f"thread {number} turn {turn} at {at}")
            else:
                truth[at] = bytes([int(rng.integers(256))]) * 700
                hybrid.write(at, memoryview(truth[at]))
            if turn % 50 == 7:
                hybrid.prefetch([(at, 700)])
                hybrid.flush()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    hybrid._cache.lines.check()
    hybrid.close()


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match=r"tiers\.hybrid: a cache of 60 KiB\. Use cache=64 KiB or more\."):
        Emulated(tmp_path, SIZE, 15 * LINE, line_bytes=LINE)
    with pytest.raises(CallerError, match=r"asked for, .* has .* free\. Lower hybrid=SIZE"):
        Emulated(tmp_path, 1 << 50, FRAMES << 16)
    with pytest.raises(CallerError, match="No such file or directory"):
        Emulated(tmp_path / "no" / "where", SIZE, FRAMES * LINE, line_bytes=LINE)
    hybrid, _ = device(tmp_path)
    with pytest.raises(ValueError, match="is not within the device"):
        hybrid.read(SIZE - 1, memoryview(bytearray(2)))
    hybrid.close()
