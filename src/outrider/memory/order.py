"""The blocks that may leave one place, in the order in which they should. Pure; owned by `room.py`, one a place.

A pass over all blocks at every eviction would cost more than the blocks are worth, so they are kept in an order that
time does not change:

    untold  blocks that nobody wants, one queue for each price of losing them (0: their path is over). All lose worth
            alike while nobody touches them, so within a queue the one touched first is worth least, at any time
    told    blocks under a want, one group for each want and size, least touched first. Groups stand at levels, 32 to
            a doubling of worth. A want gains worth until its time and loses it afterwards: a group that has gained
            is found out when it is looked at, one that loses is moved down at a moment known beforehand

Of the lowest level the first few groups are compared exactly. So what leaves is worth less than all others, or, where
very many wants are about equal, within one level of that: 2 %, where estimates err by far more.
"""

import math
from dataclasses import dataclass, field

from sortedcontainers import SortedList

from outrider.memory import foresee
from outrider.wants import Want

LEVELS = 32  # in every doubling of worth
LOOKED_AT = 8  # groups of the lowest level that are compared exactly
LEAST = 1e-300  # worths beyond it, or its inverse, are all one

Kind = float | tuple[str, int]  # untold: seconds lost per byte; told: (wanted item, bytes of the block)


def level_of(worth: float) -> int:
    return math.floor(math.log2(min(max(worth, LEAST), 1.0 / LEAST)) * LEVELS)


@dataclass(slots=True)
class Group:
    """Blocks of one size under one want; `level` is never above the one at which they really stand."""

    want: Want
    path_bytes: int
    level: int = 0
    falls_s: float = math.inf  # from then on `level` would be too high
    blocks: SortedList = field(default_factory=SortedList)  # (touched, item)

    def worth(self, now: float) -> float:
        return foresee.told_worth([(self.want, self.path_bytes)], now)

    def rate(self, now: float) -> None:
        self.level = level_of(self.worth(now))
        least = 2.0 ** (self.level / LEVELS)
        self.falls_s = foresee.falls_s(self.want.by_s, self.want.saved_s / (self.path_bytes * least), now)


class Order:
    """Every evictable block of a place, once."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[Kind, int]] = {}  # block -> where it is filed, and under which touch
        self._untold: dict[float, SortedList] = {}  # price -> (touched, item)
        self._told: dict[tuple[str, int], Group] = {}
        self._levels = SortedList()  # (level, kind) of every group
        self._falls = SortedList()  # (moment, kind) of every group

    def kind(self, item: str) -> Kind | None:
        filed = self._kinds.get(item)
        return filed[0] if filed else None

    def drop(self, item: str) -> None:
        """It may not leave, or has left."""
        if item not in self._kinds:
            return
        kind, touched = self._kinds.pop(item)
        if isinstance(kind, tuple):
            group = self._told[kind]
            group.blocks.remove((touched, item))
            if not group.blocks:
                self._unfile(kind, group)
                del self._told[kind]
        else:
            self._untold[kind].remove((touched, item))

    def put_untold(self, item: str, touched: int, price: float) -> None:
        if self._kinds.get(item) == (price, touched):
            return
        self.drop(item)
        self._kinds[item] = (price, touched)
        self._untold.setdefault(price, SortedList()).add((touched, item))

    def put_told(self, item: str, touched: int, size_bytes: int, want: Want, path_bytes: int, now: float) -> None:
        """File it under `want`; the others of that group hear of new terms too."""
        kind = (want.item, size_bytes)
        group = self._told.get(kind)
        if group is not None and (group.want, group.path_bytes) != (want, path_bytes):
            self._unfile(kind, group)
            group.want, group.path_bytes = want, path_bytes
            self._file(kind, group, now)
        if self._kinds.get(item) == (kind, touched):
            return
        self.drop(item)
        group = self._told.get(kind)
        if group is None:
            group = self._told[kind] = Group(want, path_bytes)
            self._file(kind, group, now)
        self._kinds[item] = (kind, touched)
        group.blocks.add((touched, item))

    def firsts(self) -> list[str]:
        """Of every untold queue the block that is worth least."""
        return [queue[0][1] for queue in self._untold.values() if queue]

    def lowest(self, now: float) -> tuple[int, str] | None:
        """(level, block) of the told block that is worth least under the want it is filed under."""
        while self._falls and self._falls[0][0] <= now:
            self._refile(self._falls[0][1], now)
        while self._levels:
            lowest = self._levels[0][0]
            heads = [kind for level, kind in self._levels[:LOOKED_AT] if level == lowest]
            risen = [kind for kind in heads if level_of(self._told[kind].worth(now)) > lowest]
            for kind in risen:
                self._refile(kind, now)
            if not risen:
                return lowest, min((self._told[kind].worth(now), *self._told[kind].blocks[0]) for kind in heads)[-1]
        return None

    def _refile(self, kind: tuple[str, int], now: float) -> None:
        group = self._told[kind]
        self._unfile(kind, group)
        self._file(kind, group, now)

    def _file(self, kind: tuple[str, int], group: Group, now: float) -> None:
        group.rate(now)
        self._levels.add((group.level, kind))
        self._falls.add((group.falls_s, kind))

    def _unfile(self, kind: tuple[str, int], group: Group) -> None:
        self._levels.remove((group.level, kind))
        self._falls.remove((group.falls_s, kind))
