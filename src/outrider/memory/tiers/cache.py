"""The DRAM cache of an emulated device: frames held, filled from the medium, soiled, written back. Live.

Owned by `emulated.py`, which copies bytes in and out. One lock guards the books (`lines.py`); bytes are copied and the
medium is read outside of it, between `hold` and `release`, which keep a frame from being taken. Nobody waits while
holding a frame, so every wait ends.

    dirty lines, those being written among them, are at most a quarter of the cache, pinned ones at most half of it:
    a quarter can always be taken, even while the medium refuses every write
"""

import contextlib
import errno
import mmap
import threading

import numpy as np

from outrider.memory.tiers.lines import Ints, Lines, Place, place_of, runs
from outrider.memory.tiers.medium import Medium

NONE: Ints = np.empty(0, np.int64)


class Cache:
    """`frames` frames of `line_bytes` before `lines` lines of `medium`."""

    def __init__(self, medium: Medium, lines: int, frames: int, line_bytes: int, piece: int, retry_s: float) -> None:
        self.piece, self.line_bytes = piece, line_bytes  # piece: lines that one `hold` asks for at most
        self._retry_s = retry_s  # rest of the write-back after the medium refused
        self.lines = Lines(lines, frames)
        self.lock = threading.Lock()
        self.closed = False
        self.hits = self.misses = self.hit_bytes = self.miss_bytes = self.prefetched = self.prefetch_hits = 0
        self.joined = self.write_stalls = self.written_back = self.read_failures = self.write_failures = 0
        self._medium = medium
        self._map = mmap.mmap(-1, frames * line_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # large pages (private memory only): fast copies, faster direct reads
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.bytes[:: mmap.PAGESIZE] = 0  # first touch now, not in somebody's read
        self._view = memoryview(self._map)
        self._dirty_max = max(frames // 4, piece)
        self._changed = threading.Condition(self.lock)  # something was filled, cleaned or released
        self._waiting = 0  # threads that wait for it
        self._work = threading.Condition(self.lock)  # the write-back is wanted
        self._reserved = 0  # frames that writers under way will soil
        self._writing = np.zeros(frames, np.bool_)
        self._urgent = False
        self._refused: OSError | None = None  # by the medium, at the last write-back
        self._thread = threading.Thread(target=self._write_back_all, name="outrider-write-back", daemon=True)
        self._thread.start()

    def hold(self, first: int, stop: int) -> tuple[Ints, Place, Ints]:
        """Frames of lines [first, stop), all held, and positions of the fresh ones, for the caller to fill.

        In between the same frames as numpy indexes them fastest. OSError once the cache is closed.
        """
        lines = self.lines
        with self.lock:
            while True:
                if self.closed:
                    raise OSError(errno.ESHUTDOWN, "the device was closed")
                frames = lines.frames(first, stop)
                fresh = np.flatnonzero(frames < 0) if min(frames.tolist()) < 0 else NONE
                here = place_of(np.delete(frames, fresh) if len(fresh) else frames)
                if lines.some_filling and lines.filling[here].any():
                    self.joined += 1
                    self._wait(None)
                    continue
                lines.held[here] += 1
                if len(fresh):
                    taken = lines.claim(len(fresh))
                    if taken is None:
                        lines.held[here] -= 1
                        self._hurry()
                        self._wait(self._retry_s)
                        continue
                    lines.enter(first + fresh, taken)
                    frames[fresh] = taken
                    here = place_of(frames)
                lines.used[here] = True
                return frames, here, fresh

    def fill(self, first: int, frames: Ints, fresh: Ints, wanted: Ints | None = None) -> None:
        """Fetch the fresh lines, or those at positions `wanted` only: the caller overwrites the others whole.

        OSError where the medium cannot read; then the fresh frames are dropped and all are released.
        """
        fetch = fresh if wanted is None else wanted
        try:
            for start, stop in runs(fetch):
                part = frames[fetch[start:stop]]
                self._medium.read((first + int(fetch[start])) * self.line_bytes, self._views(part))
        except OSError:
            with self.lock:
                self.lines.drop(frames[fresh])
                self.lines.held[np.delete(frames, fresh)] -= 1
                self.read_failures += 1
                self._changed.notify_all()
            raise
        if wanted is None and len(fresh):
            with self.lock:
                self.lines.filled(frames[fresh])
                self._changed.notify_all()

    def release(self, frames: Place, lines: int, missed: int, size_bytes: int, missed_bytes: int) -> None:
        """A read of so many lines and bytes is over, of which some were missed: hold its frames no longer."""
        with self.lock:
            self.lines.held[frames] -= 1
            self.misses += missed
            self.hits += lines - missed
            self.miss_bytes += missed_bytes
            self.hit_bytes += size_bytes - missed_bytes
            if self.lines.some_ahead:
                self.prefetch_hits += self.lines.met(frames)
            if self._waiting:
                self._changed.notify_all()

    def fetched_ahead(self, frames: Ints, fresh: Ints) -> None:
        """Release frames that were filled for a later reader."""
        with self.lock:
            self.lines.held[frames] -= 1
            self.lines.came_ahead(frames[fresh])
            self.prefetched += len(fresh)
            self._changed.notify_all()

    def admit(self, count: int) -> None:
        """Wait until so many more lines may be dirty. OSError where the medium takes none."""
        with self.lock:
            failures, stalled = self.write_failures, False
            while np.count_nonzero(self.lines.dirty | self._writing) + self._reserved + count > self._dirty_max:
                if self.closed:
                    raise OSError(errno.ESHUTDOWN, "the device was closed")
                if self._refused is not None and self.write_failures > failures:
                    raise OSError(self._refused.errno or errno.EIO, f"no write-back: {self._refused.strerror}")
                self.write_stalls += not stalled
                stalled = True
                self._hurry()
                self._wait(self._retry_s)
            self._reserved += count

    def soiled(self, frames: Place | None, reserved: int) -> None:
        """A write into held frames is over: they are dirty and held no longer. None: it failed before."""
        with self.lock:
            self._reserved -= reserved
            if frames is not None:
                self.lines.soil(frames)
                self.lines.filled(frames)
                self.lines.held[frames] -= 1
                if self.lines.dirty_frames > self._dirty_max // 2:
                    self._hurry()
            self._changed.notify_all()

    def pin(self, lines: Ints, budget: int) -> int:
        """Pin these lines, if no more than `budget` are pinned then; how many there would be."""
        with self.lock:
            count = self.lines.pinned_lines + self.lines.new_pins(lines)
            if count <= budget:
                self.lines.pin(lines, 1)
            return count

    def unpin(self, lines: Ints) -> None:
        with self.lock:
            self.lines.pin(lines, -1)
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when all that was written before is on the medium; OSError where some of it is not: it stays dirty."""
        with self.lock:
            while self._writing.any():
                self._wait(None)
            frames = self._take_dirty()
        self._write_back(frames)
        self._medium.sync()

    def close(self) -> None:
        """End the write-back; what is dirty is forgotten with the rest. Waiting callers get OSError."""
        with self.lock:
            self.closed = True
            self._work.notify_all()
            self._changed.notify_all()
        self._thread.join()

    def free(self) -> None:
        """Give the memory back, after `close` and after the last reader."""
        self._view.release()
        del self.bytes
        with contextlib.suppress(BufferError):  # a reader is still there: the pages go with it
            self._map.close()

    def _views(self, frames: Ints) -> list[memoryview]:
        """The bytes of these frames, neighbours in one view."""
        size = self.line_bytes
        return [self._view[int(frames[a]) * size : (int(frames[a]) + b - a) * size] for a, b in runs(frames)]

    def _wait(self, timeout_s: float | None) -> None:
        """Until something was filled, cleaned or released; the lock is held before and after."""
        self._waiting += 1
        try:
            self._changed.wait(timeout_s)
        finally:
            self._waiting -= 1

    def _hurry(self) -> None:
        self._urgent = True
        self._work.notify()

    def _write_back_all(self) -> None:
        while True:
            with self.lock:
                self._work.wait_for(lambda: self._urgent or self.closed)
                if self.closed:
                    return
                self._urgent = False
                frames = self._take_dirty()
            try:
                self._write_back(frames)
            except OSError:
                with self.lock:
                    self._work.wait_for(lambda: self.closed, self._retry_s)

    def _take_dirty(self) -> Ints:
        """Dirty frames, in the order of their lines: held, and clean unless somebody writes to them again."""
        frames = self.lines.frame_of[self.lines.dirty_lines()]
        frames = frames[~self._writing[frames]]
        self.lines.clean(frames)
        self.lines.held[frames] += 1
        self._writing[frames] = True
        return frames

    def _write_back(self, frames: Ints) -> None:
        """Write taken frames to the medium, a piece at a time. OSError: what failed and all after it are dirty."""
        for begin in range(0, len(frames), self.piece):
            part = frames[begin : begin + self.piece]
            try:
                lines = self.lines.line_of[part]
                for start, stop in runs(lines):
                    self._medium.write(int(lines[start]) * self.line_bytes, self._views(part[start:stop]))
            except OSError as error:
                with self.lock:
                    self._refused = error
                    self.write_failures += 1
                    self.lines.soil(frames[begin:])
                    self._written(frames[begin:])
                raise
            with self.lock:
                self._refused = None
                self.written_back += len(part)
                self._written(part)

    def _written(self, frames: Ints) -> None:
        self._writing[frames] = False
        self.lines.held[frames] -= 1
        self._changed.notify_all()
