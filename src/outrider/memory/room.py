"""Making room: which blocks leave a tier so that another fits, and what each is worth. Pure; owned by `policy.py`."""

from collections.abc import Iterator
from itertools import chain

from outrider.memory import foresee, plan
from outrider.memory.paths import Paths
from outrider.memory.residency import Block, Residency
from outrider.memory.settings import SOURCES, Settings


class Room:
    """Finds extents, evicting as it must. `evicted` lists what left since `begin`, for the policy to account for."""

    def __init__(self, settings: Settings, residency: Residency, paths: Paths) -> None:
        self._settings = settings
        self._residency = residency
        self._paths = paths
        self._order: dict[str, Iterator[tuple[float, Block]]] = {}
        self._touches = 0
        self._now = 0.0
        self.evicted: list[tuple[Block, str]] = []

    def begin(self, now: float) -> None:
        """A new event: orders of eviction are worked out afresh, where one is needed at all."""
        self._order, self._now = {}, now

    def touch(self, items: tuple[str, ...]) -> None:
        """These were used now, as one chain: the deepest counts as touched first, so that leaves leave first."""
        for item in reversed(items):
            block = self._residency.blocks.get(item)
            if block is not None:
                self._touches += 1
                block.touched, block.touched_s, block.ended = self._touches, self._now, False

    def find(self, place: str, size_bytes: int, below: float | None = None) -> int | None:
        """An extent for `size_bytes` in `place`, evicting blocks worth less than `below` (None: any) to get it.

        None where what is leased, drafted or moving, or worth more, leaves too little room.
        """
        room_bytes = self._residency.room_bytes(place, size_bytes)
        extents = self._residency.extents[place]
        start = extents.take(room_bytes)
        if start is not None or room_bytes > extents.capacity_bytes:
            return start
        if place not in self._order:
            blocks = [block for block in self._residency.blocks.values() if self._residency.evictable(block, place)]
            self._order[place] = plan.victims(blocks, lambda block: self.worth(block, place))
        for worth, block in self._order[place]:
            if below is not None and worth >= below:
                self._order[place] = chain([(worth, block)], self._order[place])
                return None
            if self._residency.blocks.get(block.item) is block and self._residency.evictable(block, place):
                self._residency.leave(block, place, "evict", self._now)
                self.evicted.append((block, place))
                start = extents.take(room_bytes)
                if start is not None:
                    return start
        return None

    def worth(self, block: Block, place: str) -> float:
        """Expected seconds saved per byte-second by having this block in `place`."""
        length, size_bytes = self._paths.length, block.size_bytes
        wants = [(want, size_bytes * length(want.item)) for want, _ in self._paths.wants_of(block.item)]
        if wants:
            return foresee.told_worth(wants, self._now)
        if block.ended:
            return 0.0
        lower = self._residency.lies(block, SOURCES if place == "host" else ("disk",) if place == "hybrid" else ())
        rate = self._settings.read_rate(lower) if lower else self._settings.recompute
        return foresee.untold_worth(1.0 / rate, self._now - block.touched_s)
