"""What is to be lifted to host, in order, without a pass over it. Pure; owned by `told.py`.

A missing block is one that somebody wants and that lies below host only. It stands in one lane: all blocks of a lane
have one size and come from one place, so what holds for one by its deadline holds for all of later, or earlier, ones.

    order   earliest deadline first, then most seconds saved, then along the path from its root
"""

import math
from collections.abc import Iterable

from sortedcontainers import SortedList

from outrider.wants import Want

Entry = tuple[float, float, str, int, str]  # by_s, -saved_s, wanted item, position on its path, block
Lane = tuple[str, int]  # cache, hybrid, coming (to the cache), disk; bytes of a block


class Lifts:
    """Missing blocks by lane. A block stands there once for every want that names it; its first place counts."""

    def __init__(self) -> None:
        self._missing: dict[str, tuple[Lane, list[Entry]]] = {}
        self._lanes: dict[Lane, SortedList] = {}

    def __len__(self) -> int:
        return len(self._missing)

    def __contains__(self, item: str) -> bool:
        return item in self._missing

    def lanes(self) -> list[Lane]:
        return list(self._lanes)

    def put(self, item: str, lane: Lane, wants: Iterable[tuple[Want, int]]) -> None:
        """It is missing, under these wants, with its position on each one's path."""
        entries = sorted((want.by_s, -want.saved_s, want.item, position, item) for want, position in wants)
        if self._missing.get(item) == (lane, entries):
            return
        self.drop(item)
        self._missing[item] = (lane, entries)
        self._lanes.setdefault(lane, SortedList()).update(entries)

    def drop(self, item: str) -> None:
        """It is not missing, or not wanted."""
        if item not in self._missing:
            return
        lane, entries = self._missing.pop(item)
        for entry in entries:
            self._lanes[lane].remove(entry)
        if not self._lanes[lane]:
            del self._lanes[lane]

    def after(self, lane: Lane, cursor: tuple[float | str, ...]) -> Entry | None:
        """The next block of a lane after `cursor`: an entry, or the head of one, (by_s,)."""
        entries = self._lanes.get(lane)
        at = entries.bisect_right(cursor) if entries is not None else 0
        entry: Entry | None = entries[at] if entries is not None and at < len(entries) else None
        return entry

    def first(self, entry: Entry) -> bool:
        """Is this the block's first place?"""
        return self._missing[entry[-1]][1][0] == entry

    def next_by_s(self, lane: Lane, after_s: float) -> float:
        """The first deadline of a lane after `after_s`; infinity where there is none."""
        entry = self.after(lane, (after_s, math.inf))
        return entry[0] if entry else math.inf
