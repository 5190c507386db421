"""Who leaves a tier so that another fits, and what each block is worth. Pure; owned by `traffic.py`.

Whatever changes a block marks it (`Residency.mark`); `file` then puts it where it belongs in the order of each place.
So an event costs what it names and a logarithm of how many blocks there are, never a pass over them.
"""

from outrider.memory import foresee
from outrider.memory.order import Order, level_of
from outrider.memory.paths import Paths
from outrider.memory.residency import Block, Residency
from outrider.memory.settings import SOURCES, Settings


class Room:
    """The order of eviction in every place."""

    def __init__(self, settings: Settings, residency: Residency, paths: Paths) -> None:
        self._settings = settings
        self._residency = residency
        self._paths = paths
        self._orders = {place: Order() for place in residency.places}
        self._touches = 0
        self._now = 0.0

    def begin(self, now: float) -> None:
        """A new event."""
        self._now = now

    def touch(self, items: tuple[str, ...]) -> None:
        """These were used now, as one chain: the deepest counts as touched first, so that leaves leave first."""
        for item in reversed(items):
            block = self._residency.blocks.get(item)
            if block is not None:
                self._touches += 1
                block.touched, block.touched_s, block.ended = self._touches, self._now, False
                self._residency.mark(block)

    def file(self, item: str) -> None:
        """Something about this block changed."""
        block = self._residency.blocks.get(item)
        for place, order in self._orders.items():
            if block is None or not self._residency.evictable(block, place):
                order.drop(item)
            elif item in self._paths.told:
                self._file_under(block, order, self._likely(block, order))
            else:
                order.put_untold(item, block.touched, self._price(block, place))

    def victim(self, place: str) -> tuple[float, Block] | None:
        """The block that leaves `place` next, with its worth; None where none may. All marks must have been filed.

        Least worth first, among equals the one touched first; told blocks within one level of worth count as equal.
        """
        blocks, order = self._residency.blocks, self._orders[place]
        firsts = [*order.firsts(), *self._lowest(order)]
        worths = [(self.worth(blocks[item], place), blocks[item].touched, item) for item in firsts]
        if not worths:
            return None
        worth, _, item = min(worths)
        return worth, blocks[item]

    def worth(self, block: Block, place: str) -> float:
        """Expected seconds saved per byte-second by having this block in `place`."""
        length, size_bytes = self._paths.length, block.size_bytes
        wants = [(want, size_bytes * length(want.item)) for want, _ in self._paths.wants_of(block.item)]
        if wants:
            return foresee.told_worth(wants, self._now)
        return foresee.untold_worth(self._price(block, place), self._now - block.touched_s)

    def _price(self, block: Block, place: str) -> float:
        """Seconds per byte to have it back once it left `place`; 0 where its path is over."""
        if block.ended:
            return 0.0
        lower = self._residency.lies(block, SOURCES if place == "host" else ("disk",) if place == "hybrid" else ())
        return 1.0 / (self._settings.read_rate(lower) if lower else self._settings.recompute)

    def _lowest(self, order: Order) -> list[str]:
        """The told block worth least, filed under a want which shows that."""
        while (lowest := order.lowest(self._now)) is not None:
            level, item = lowest
            block = self._residency.blocks[item]
            better = (name for name in self._paths.told[item] if level_of(self._under(block, name)) > level)
            name = next(better, None)
            if name is None:
                return [item]
            self._file_under(block, order, name)
        return []

    def _likely(self, block: Block, order: Order) -> str:
        """A want that names this block, likely its best: the one it is filed under, or the newest.

        Under whichever it is filed, it is worth at least that; `_lowest` looks at the others before it leaves.
        """
        namers = self._paths.told[block.item]
        newest, kind = next(reversed(namers)), order.kind(block.item)
        if isinstance(kind, tuple) and kind[0] in namers:
            return max(kind[0], newest, key=lambda name: self._under(block, name))
        return newest

    def _under(self, block: Block, name: str) -> float:
        return foresee.told_worth([(self._paths.wants[name], block.size_bytes * self._paths.length(name))], self._now)

    def _file_under(self, block: Block, order: Order, name: str) -> None:
        want, path_bytes = self._paths.wants[name], block.size_bytes * self._paths.length(name)
        order.put_told(block.item, block.touched, block.size_bytes, want, path_bytes, self._now)
