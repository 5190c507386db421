"""Which line of the device lies in which frame of its cache, and which frame goes next. Pure; owned by `emulated.py`.

    line    line_bytes of the device, numbered from its start        frame    line_bytes of the cache
    filling   its bytes are not there yet: nobody may read it        held     somebody copies from or to it
    dirty     newer than the medium                                  pinned   stays, whatever is needed

A frame may be taken when it is none of these. Among those, frames not used since the last sweep go first, round robin
(not recently used, with a hand), so that what is fetched together lies together and is copied in one piece.
"""

from itertools import pairwise
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Place = Ints | slice
NEAR_FRAMES = 256  # looked at behind the hand before the whole cache is


class Lines:
    """The books of a cache of `frames` frames before a device of `lines` lines."""

    def __init__(self, lines: int, frames: int) -> None:
        self.frame_of = np.full(lines, -1, np.int64)
        self.line_of = np.full(frames, -1, np.int64)
        self.pins = np.zeros(lines, np.int32)
        self.held = np.zeros(frames, np.int32)
        self.filling = np.zeros(frames, np.bool_)
        self.dirty = np.zeros(frames, np.bool_)
        self.used = np.zeros(frames, np.bool_)
        self.ahead = np.zeros(frames, np.bool_)  # fetched ahead and not read yet
        self.pinned = np.zeros(frames, np.bool_)
        self.pinned_lines = self.dirty_frames = self.evicted = self.some_ahead = self.some_filling = 0
        self._hand = 0

    def frames(self, first: int, end: int) -> Ints:
        """Frames of lines [first, end), -1 for those that are not in the cache."""
        return self.frame_of[first:end].copy()

    def lacks(self, first: int, stop: int) -> bool:
        """Is any of the lines [first, stop) that the device has not in the cache?"""
        return bool((self.frame_of[first:stop] < 0).any())

    def claim(self, count: int) -> Ints | None:
        """`count` frames for new lines, ascending from the hand; None, and nothing changed, where too few are free."""
        near = slice(self._hand, self._hand + max(NEAR_FRAMES, 2 * count))
        taken = self._hand + np.flatnonzero(self._free(near) & ~self.used[near])[:count]
        if len(taken) < count:
            whole = slice(None)
            free = self._free(whole)
            idle = np.flatnonzero(free & ~self.used)
            if len(idle) < count:
                idle = np.flatnonzero(free)
                if len(idle) < count:
                    return None
                self.used[idle] = False
            start = int(np.searchsorted(idle, self._hand))
            taken = np.concatenate((idle[start:], idle[:start]))[:count]
        self._hand = int(taken[-1]) + 1
        return taken

    def _free(self, part: slice) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Which of these frames may be taken."""
        kept: np.ndarray[Any, np.dtype[np.bool_]] = self.dirty[part] | self.filling[part] | self.pinned[part]
        free: np.ndarray[Any, np.dtype[np.bool_]] = ~kept & (self.held[part] == 0)
        return free

    def enter(self, lines: Ints, frames: Ints) -> None:
        """Claimed frames now belong to these lines, filling and held once; what was in them is forgotten."""
        old = self.line_of[frames]
        gone = old[old >= 0]
        self.frame_of[gone] = -1
        self.evicted += len(gone)
        self.frame_of[lines] = frames
        self.line_of[frames] = lines
        self.pinned[frames] = self.pins[lines] > 0
        self.filling[frames] = True
        self.some_filling += len(frames)
        self.held[frames] = 1
        self.met(frames)

    def filled(self, frames: Place) -> None:
        """Their bytes are there, or will never be."""
        self.some_filling -= int(np.count_nonzero(self.filling[frames]))
        self.filling[frames] = False

    def drop(self, frames: Ints) -> None:
        """Filling failed: these frames hold nothing."""
        self.frame_of[self.line_of[frames]] = -1
        self.line_of[frames] = -1
        self.pinned[frames] = False
        self.filled(frames)
        self.held[frames] -= 1

    def came_ahead(self, frames: Ints) -> None:
        """These were fetched for a reader that is yet to come."""
        self.ahead[frames] = True
        self.some_ahead += len(frames)

    def met(self, frames: Place) -> int:
        """These are read, or leave; how many of them were fetched ahead and not read since."""
        count = int(np.count_nonzero(self.ahead[frames]))
        if count:
            self.ahead[frames] = False
            self.some_ahead -= count
        return count

    def soil(self, frames: Place) -> None:
        """These are newer than the medium."""
        self.dirty_frames += int(np.count_nonzero(~self.dirty[frames]))
        self.dirty[frames] = True

    def clean(self, frames: Ints) -> None:
        self.dirty_frames -= int(np.count_nonzero(self.dirty[frames]))
        self.dirty[frames] = False

    def dirty_lines(self) -> Ints:
        """Ascending, so that neighbours are written together."""
        return np.sort(self.line_of[self.dirty])

    def new_pins(self, lines: Ints) -> int:
        """How many of these lines, each named once, are not pinned yet."""
        return int(np.count_nonzero(self.pins[lines] == 0))

    def pin(self, lines: Ints, by: int) -> None:
        """Pin these lines once more (`by` 1) or once less (-1), in the cache or not."""
        before = self.pins[lines] > 0
        self.pins[lines] = np.maximum(self.pins[lines] + by, 0)
        after = self.pins[lines] > 0
        self.pinned_lines += int(np.count_nonzero(after)) - int(np.count_nonzero(before))
        frames = self.frame_of[lines]
        self.pinned[frames[frames >= 0]] = after[frames >= 0]

    def check(self) -> None:
        """The books agree with themselves; tests call it."""
        inside = np.flatnonzero(self.frame_of >= 0)
        frames = self.frame_of[inside]
        assert np.array_equal(self.line_of[frames], inside), "a frame is not its line's"
        assert len(frames) == np.count_nonzero(self.line_of >= 0), "a frame is used that no line has"
        assert self.some_filling == np.count_nonzero(self.filling)
        assert self.some_ahead == np.count_nonzero(self.ahead)
        assert self.dirty_frames == np.count_nonzero(self.dirty)
        assert self.pinned_lines == np.count_nonzero(self.pins)
        assert np.array_equal(self.pinned[frames], self.pins[inside] > 0)
        assert (self.held >= 0).all() and not self.dirty[self.line_of < 0].any()


class Streams:
    """Readers that go through the device in order: seen twice in a row, the next lines are worth fetching."""

    def __init__(self, streams: int, ahead_lines: int) -> None:
        self._ends: dict[int, tuple[int, int]] = {}  # where a stream stopped -> (reads in a row, fetched up to)
        self._streams, self._ahead_lines = streams, ahead_lines

    def saw(self, first: int, end: int) -> tuple[int, int] | None:
        """A read of lines [first, end): which lines to fetch ahead of the next one, if any."""
        for stop in (first, first + 1):  # the next read may begin in the line where the last one stopped
            if stop in self._ends:
                run, fetched = self._ends.pop(stop)
                break
        else:
            run, fetched = 0, end
        begin = max(fetched, end)
        stop = end + self._ahead_lines
        worth = run > 0 and begin - end <= self._ahead_lines // 2
        self._ends[end] = (run + 1, stop if worth else begin)
        while len(self._ends) > self._streams:
            del self._ends[next(iter(self._ends))]
        return (begin, stop) if worth and begin < stop else None


def place_of(frames: Ints) -> Place:
    """Frames as a slice where they rise by one each: numpy indexes by either, by a slice several times as fast."""
    numbers = frames.tolist()  # plain integers: cheaper than numpy for so few
    first, count = numbers[0] if numbers else 0, len(numbers)
    return slice(first, first + count) if numbers == list(range(first, first + count)) else frames


def runs(numbers: Ints) -> list[tuple[int, int]]:
    """Positions [start, end) within which the numbers rise by one each: what can be copied in one piece."""
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges = [0, *cuts.tolist(), len(numbers)]
    return list(pairwise(edges))
