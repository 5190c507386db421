"""An emulated CXL-hybrid device: a DRAM cache of stated size before a file on disk. Live; implements `device.py`.

    read      lines in the cache are copied out; the others are fetched first, neighbours in one go
    write     goes to the cache; lines that are overwritten in part are fetched first. Written back in the background
    prefetch  by its own detector, for readers that go in order; and as told, with pins

The books and the bytes are in `cache.py`. What is emulated and what is not (nanosecond loads, coherence, power-fail
domains) is told in docs/hardware.md.
"""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from outrider.errors import CallerError
from outrider.memory.tiers.arena import available_bytes
from outrider.memory.tiers.cache import Cache
from outrider.memory.tiers.device import Range, Ticket, check_range
from outrider.memory.tiers.lines import Ints, Place, Streams, runs
from outrider.memory.tiers.medium import Medium
from outrider.memory.tiers.spec import show_bytes
from outrider.memory.tiers.throttle import Profile, Throttle

LINE_BYTES = 1 << 16
MEMORY_RATE, FILE_RATE = 8e9, 1.2e9  # bytes/s, measured on two cores and a cloud volume
PIECE_BYTES = 4 << 20  # one turn of a long read or write
AHEAD_BYTES = 8 << 20  # what its own prefetcher fetches ahead of a reader that goes in order
PREFETCHERS = 2
TICKETS_MAX = 1024
FRAMES_MIN = 16
RETRY_S = 0.5  # rest of the write-back after the medium refused
Order = tuple[Ticket, Sequence[tuple[int, int]], Ints | None]  # to fetch: lines [first, stop); and what it pinned


def expected_rates(profile: Profile | None) -> tuple[float, float, float]:
    """Bytes/s of hits, misses and writes, until they are measured."""
    read, write = (profile.read, profile.write) if profile else (MEMORY_RATE, MEMORY_RATE)
    return min(MEMORY_RATE, read), min(FILE_RATE, read), min(FILE_RATE, write)


class Emulated:
    """`size_bytes` of zeros at first, gone at the end. See `HybridDevice` for the calls."""

    def __init__(
        self,
        directory: Path,
        size_bytes: int,
        cache_bytes: int,
        profile: Profile | None = None,
        line_bytes: int = LINE_BYTES,
        medium: Callable[[Path, int], Medium] = Medium,
        retry_s: float = RETRY_S,
    ) -> None:
        self._line_count, frames = size_bytes // line_bytes, cache_bytes // line_bytes
        if frames < FRAMES_MIN:
            least = show_bytes(FRAMES_MIN * line_bytes)
            raise CallerError(f"tiers.hybrid: a cache of {show_bytes(cache_bytes)}. Use cache={least} or more.")
        if cache_bytes > (free_bytes := available_bytes()):
            asked, free = show_bytes(cache_bytes), show_bytes(free_bytes)
            raise CallerError(f"tiers.cache: {asked} asked for, this machine has {free} free. Lower cache=SIZE.")
        self.kind = "emulated: a DRAM cache before a file"
        self.size_bytes, self.cache_bytes, self.line_bytes = (
            self._line_count * line_bytes,
            frames * line_bytes,
            line_bytes,
        )
        self.pin_bytes = frames // 2 * line_bytes
        self.hit_rate, self.miss_rate, self.write_rate = expected_rates(profile)
        self._medium = medium(directory, self.size_bytes)
        piece = max(1, min(frames // 8, PIECE_BYTES // line_bytes))
        self._cache = Cache(self._medium, self._line_count, frames, line_bytes, piece, retry_s)
        self._throttle = Throttle(profile) if profile else None
        self._streams = Streams(8, min(AHEAD_BYTES // line_bytes, frames // 8))
        self._written_bytes = 0
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._prefetch_all, name="outrider-device", daemon=True) for _ in range(PREFETCHERS)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, at: int, into: memoryview) -> None:
        check_range(at, len(into), self.size_bytes)
        target, cache, missed = np.frombuffer(into, np.uint8), self._cache, False
        due_s = self._throttle.begin_read(len(into)) if self._throttle else 0.0
        began_s = time.monotonic() if self._throttle else 0.0
        for begin, end, first, stop in self._pieces(at, at + len(into)):
            frames, place, fresh = cache.hold(first, stop)
            if len(fresh):
                missed = True
                cache.fill(first, frames, fresh)
            for source, low, length in self._spans(begin, end, frames, place):
                np.copyto(target[low - at : low - at + length], cache.bytes[source : source + length])
            missed_bytes = self._bytes_in(first + fresh, begin, end) if len(fresh) else 0
            cache.release(place, stop - first, len(fresh), end - begin, missed_bytes)
        self._own_prefetch(at, len(into))
        if self._throttle:
            self._throttle.end(due_s, began_s if missed else None)

    def write(self, at: int, data: memoryview) -> None:
        check_range(at, len(data), self.size_bytes)
        source, cache = np.frombuffer(data, np.uint8), self._cache
        due_s = self._throttle.begin_write(len(data)) if self._throttle else 0.0
        for begin, end, first, stop in self._pieces(at, at + len(data)):
            cache.admit(stop - first)
            try:
                frames, place, fresh = cache.hold(first, stop)
                cuts = {0: begin > first * self.line_bytes, stop - first - 1: end < stop * self.line_bytes}
                if stop - first == 1:
                    cuts = {0: end - begin < self.line_bytes}
                partly = [position for position in fresh.tolist() if cuts.get(position)]
                cache.fill(first, frames, fresh, np.array(partly, np.int64))
            except OSError:
                cache.soiled(None, stop - first)
                raise
            for target, low, length in self._spans(begin, end, frames, place):
                np.copyto(cache.bytes[target : target + length], source[low - at : low - at + length])
            cache.soiled(place, stop - first)
        with cache.lock:
            self._written_bytes += len(data)
        if self._throttle:
            self._throttle.end(due_s)

    def prefetch(
        self, ranges: Sequence[Range], pin: bool = False, done: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        ticket = Ticket(done)
        lines, budget = self._lines_of(ranges), self.pin_bytes // self.line_bytes
        if pin and (count := self._cache.pin(lines, budget)) > budget:
            asked, most = show_bytes(count * self.line_bytes), show_bytes(self.pin_bytes)
            ticket.end(f"{asked} would be pinned, the device pins {most} at most. Unpin some first.", errno.EDQUOT)
            return ticket
        parts = [(at // self.line_bytes, self._end(at + size)) for at, size in ranges if size]
        self._queue((ticket, parts, lines if pin else None), TICKETS_MAX)
        return ticket

    def unpin(self, ranges: Sequence[Range]) -> None:
        self._cache.unpin(self._lines_of(ranges))

    def flush(self) -> None:
        self._cache.flush()

    def stats(self) -> dict[str, Any]:
        cache, lines, size = self._cache, self._cache.lines, self.line_bytes
        with cache.lock:
            return {
                "kind": self.kind,
                "medium": self._medium.where,
                "profile": self._throttle.profile.name if self._throttle else "none",
                "size_bytes": self.size_bytes,
                "cache_bytes": self.cache_bytes,
                "line_bytes": size,
                "pin_budget_bytes": self.pin_bytes,
                "hits": cache.hits,
                "misses": cache.misses,
                "hit_bytes": cache.hit_bytes,
                "miss_bytes": cache.miss_bytes,
                "written_bytes": self._written_bytes,
                "prefetched": cache.prefetched,
                "prefetch_hits": cache.prefetch_hits,
                "pinned": lines.pinned_lines,
                "pinned_bytes": lines.pinned_lines * size,
                "prefetched_bytes": cache.prefetched * size,
                "dirty": lines.dirty_frames,
                "written_back": cache.written_back,
                "written_back_bytes": cache.written_back * size,
                "evicted": lines.evicted,
                "joined": cache.joined,
                "write_stalls": cache.write_stalls,
                "read_failures": cache.read_failures,
                "write_failures": cache.write_failures,
            }

    def close(self) -> None:
        with self._cache.lock:
            if self._cache.closed:
                return
        self._cache.close()
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join()
        self._medium.close()
        self._cache.free()

    def _end(self, at: int) -> int:
        """The first line that begins at or behind `at`."""
        return -(-at // self.line_bytes)

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """[begin, end) cut at line borders into parts small enough to hold: (begin, end, first line, line after)."""
        while begin < end:
            first = begin // self.line_bytes
            stop = min(end, (first + self._cache.piece) * self.line_bytes)
            yield begin, stop, first, self._end(stop)
            begin = stop

    def _spans(self, begin: int, end: int, frames: Ints, place: Place) -> Iterator[tuple[int, int, int]]:
        """Where [begin, end) lies in the cache, in as few parts as possible: (offset there, offset, length)."""
        size = self.line_bytes
        base = begin - begin % size
        for start, stop in [(0, len(frames))] if isinstance(place, slice) else runs(frames):
            low, high = max(begin, base + start * size), min(end, base + stop * size)
            yield int(frames[start]) * size + low - base - start * size, low, high - low

    def _lines_of(self, ranges: Sequence[Range]) -> Ints:
        """The lines of these ranges, each once."""
        for at, size_bytes in ranges:
            check_range(at, size_bytes, self.size_bytes)
        parts = [np.arange(at // self.line_bytes, self._end(at + size)) for at, size in ranges if size]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def _bytes_in(self, lines: Ints, begin: int, end: int) -> int:
        """How many bytes of [begin, end) lie in these lines."""
        lows = lines * self.line_bytes
        return int(np.sum(np.minimum(end, lows + self.line_bytes) - np.maximum(begin, lows)))

    def _own_prefetch(self, at: int, size_bytes: int) -> None:
        """Where a reader goes in order, fetch ahead of it, unless enough waits already."""
        if not size_bytes:
            return
        with self._cache.lock:
            part = self._streams.saw(at // self.line_bytes, self._end(at + size_bytes))
            if part is None or not self._cache.lines.lacks(*part):
                return
        self._queue((Ticket(), [(part[0], min(part[1], self._line_count))], None), PREFETCHERS)

    def _queue(self, order: Order, most: int) -> None:
        """Have it fetched; it fails at once where too many wait, or the device was closed."""
        if self._cache.closed:
            self._fail(order, "the device was closed", errno.ESHUTDOWN)
        elif self._orders.qsize() >= most:
            self._fail(order, f"{most} prefetches wait already. Wait for some.", errno.EAGAIN)
        else:
            self._orders.put(order)

    def _fail(self, order: Order, why: str, code: int) -> None:
        ticket, _, pinned = order
        if pinned is not None:
            self._cache.unpin(pinned)
        ticket.end(why, code)

    def _prefetch_all(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                for first, stop in order[1]:
                    for begin in range(first, stop, self._cache.piece):
                        self._fetch(begin, min(begin + self._cache.piece, stop))
            except OSError as error:
                self._fail(order, error.strerror or str(error), error.errno or errno.EIO)
            else:
                order[0].end()

    def _fetch(self, first: int, stop: int) -> None:
        began_s = time.monotonic()
        frames, _, fresh = self._cache.hold(first, stop)
        self._cache.fill(first, frames, fresh)
        self._cache.fetched_ahead(frames, fresh)
        if self._throttle and len(fresh):
            self._throttle.end(began_s, began_s)
