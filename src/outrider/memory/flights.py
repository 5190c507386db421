"""Copies in flight between the tiers: started, booked, ended once each. Pure; owned by `policy.py`."""

from outrider.errors import LawBroken
from outrider.memory.events import Copy
from outrider.memory.residency import Block, Residency
from outrider.wants import Move

OPEN_END_S = 1e18  # deadline of a copy that has none


class Flights:
    """Every copy under way, by its number."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._flying: dict[int, tuple[Block, Move]] = {}
        self._busy_until_s: dict[tuple[str, str], float] = {}
        self._bound_for: dict[str, int] = {}
        self._numbers = 0

    def bound_for(self, place: str) -> int:
        """Copies in flight to `place`."""
        return self._bound_for.get(place, 0)

    def any(self) -> bool:
        return bool(self._flying)

    def end_s(self, block: Block, src: str, dst: str, now: float) -> float:
        """When a copy asked for now would end, after those already booked on that link."""
        link = self._residency.ledger.topology.link(src, dst)
        if link is None:
            raise LawBroken(2, f"no link from {src} to {dst}", block.tale())
        begin_s = max(now, self._busy_until_s.get((src, dst), 0.0))
        return begin_s + link.hop_s(self._residency.room_bytes(dst, block.size_bytes))

    def start(self, block: Block, src: str, dst: str, start: int, now: float, by_s: float = OPEN_END_S) -> Copy:
        """Book a copy into the extent `start` of `dst`. The caller has found it room and time (`end_s`)."""
        move = self._residency.start(block, src, dst, start, now, by_s)
        if move is None:
            raise LawBroken(2, f"{dst} has an extent for {block.item} but no bytes or no time", block.tale())
        self._busy_until_s[src, dst] = move.end_s
        self._numbers += 1
        self._flying[self._numbers] = (block, move)
        self._bound_for[dst] = self.bound_for(dst) + 1
        src_at = block.at["hybrid" if src == "cache" else src]  # the cache has no addresses of its own
        return Copy(self._numbers, block.item, block.size_bytes, src_at, start, block.checksum, block.generation)

    def end(self, number: int) -> tuple[Block, Move]:
        """A copy ended, well or not. LawBroken for one that is not in flight: nothing lands twice (law 4)."""
        if number not in self._flying:
            raise LawBroken(4, f"copy {number} ended, but is not in flight")
        block, move = self._flying.pop(number)
        self._bound_for[move.dst] -= 1
        return block, move
