"""Space and link time: what is free, what is taken, what is booked. Pure; owned by one policy object.

    capacity = free + used       in every place, after every call (law 2)
    a link with n slots carries at most n moves at any moment

Room at the far end is taken when a move is booked, not when it lands: no move starts without room at its end.
"""

from outrider.errors import LawBroken
from outrider.topology import Topology
from outrider.wants import Drop, Move


class Ledger:
    """Free bytes of every place and booked seconds of every link slot of a topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.used_bytes = {place.name: 0 for place in topology.places}
        self._busy_until_s = {(link.src, link.dst): [0.0] * link.slots for link in topology.links}

    def capacity_bytes(self, place: str) -> int:
        return self.topology.place(place).capacity_bytes

    def free_bytes(self, place: str) -> int:
        return self.capacity_bytes(place) - self.used_bytes[place]

    def take(self, place: str, size_bytes: int) -> bool:
        """Take room for an item that is written in place, not moved; False (and nothing taken) without room."""
        if size_bytes > self.free_bytes(place):
            return False
        self.used_bytes[place] += size_bytes
        return True

    def give(self, place: str, size_bytes: int) -> None:
        """Give back what `take` or `book` took. LawBroken when more comes back than was taken."""
        self.used_bytes[place] -= size_bytes
        if self.used_bytes[place] < 0:
            raise LawBroken(2, f"{place} gave back {size_bytes} bytes that it did not hold")

    def drop(self, drop: Drop) -> None:
        self.give(drop.place, drop.size_bytes)

    def book(self, item: str, src: str, dst: str, size_bytes: int, start_s: float, by_s: float) -> Move | None:
        """Book one hop that ends by `by_s`: room at `dst` and time on the link. None: no link, no room, or late.

        The slot that frees first carries it, the lowest slot among equals (law 7).
        """
        link = self.topology.link(src, dst)
        if link is None or size_bytes > self.free_bytes(dst):
            return None
        slots = self._busy_until_s[src, dst]
        slot = min(range(len(slots)), key=lambda i: (slots[i], i))
        begin_s = max(start_s, slots[slot])
        end_s = begin_s + link.hop_s(size_bytes)
        if end_s > by_s:
            return None
        slots[slot] = end_s
        self.used_bytes[dst] += size_bytes
        return Move(item, src, dst, size_bytes, begin_s, end_s)

    def refund(self, move: Move) -> None:
        """A booked move failed or is not wanted any more: its room at the far end is free again.

        Its link time stays booked: what was sent cannot be un-sent (law 4).
        """
        self.give(move.dst, move.size_bytes)

    def check(self) -> None:
        """Law 2 over all places; raises LawBroken with the place that breaks it."""
        for place in self.topology.places:
            used_bytes = self.used_bytes[place.name]
            if not 0 <= used_bytes <= place.capacity_bytes:
                raise LawBroken(2, f"{place.name} holds {used_bytes} bytes, capacity {place.capacity_bytes}")
