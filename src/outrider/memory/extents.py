"""Where in a tier a block lies: first-fit extents over [0, capacity). Pure; owned by `residency.py`, one a tier.

    |####|......|##|....|########|      free extents are kept sorted, disjoint and never adjacent

The ledger counts bytes, this places them. Blocks of one size always fit the first hole, so a search is short.
"""

from bisect import bisect_left

from outrider.errors import LawBroken


class Extents:
    """Free ranges of one tier."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._starts = [0] if capacity_bytes else []
        self._sizes = [capacity_bytes] if capacity_bytes else []

    def free_bytes(self) -> int:
        return sum(self._sizes)

    def take(self, size_bytes: int) -> int | None:
        """Offset of the lowest free range that holds `size_bytes`, now taken; None where there is none."""
        for index, free in enumerate(self._sizes):
            if free >= size_bytes:
                start = self._starts[index]
                self._cut(index, start, size_bytes)
                return start
        return None

    def take_at(self, start: int, size_bytes: int) -> bool:
        """Take exactly [start, start + size_bytes); False, and nothing taken, where any of it is not free."""
        index = bisect_left(self._starts, start + 1) - 1
        if start < 0 or index < 0 or start + size_bytes > self._starts[index] + self._sizes[index]:
            return False
        self._cut(index, start, size_bytes)
        return True

    def give(self, start: int, size_bytes: int) -> None:
        """Give a range back, joined with its free neighbours. LawBroken where part of it is free already."""
        index = bisect_left(self._starts, start)
        before = index > 0 and self._starts[index - 1] + self._sizes[index - 1]
        after = index < len(self._starts) and self._starts[index]
        if (index > 0 and before > start) or (index < len(self._starts) and start + size_bytes > after):
            raise LawBroken(2, f"extent [{start}, {start + size_bytes}) was given back twice")
        if index > 0 and before == start:
            index -= 1
            self._sizes[index] += size_bytes
        else:
            self._starts.insert(index, start)
            self._sizes.insert(index, size_bytes)
        if index + 1 < len(self._starts) and self._starts[index] + self._sizes[index] == self._starts[index + 1]:
            self._sizes[index] += self._sizes.pop(index + 1)
            self._starts.pop(index + 1)

    def _cut(self, index: int, start: int, size_bytes: int) -> None:
        """Take [start, start + size_bytes) out of free range `index`, which holds it."""
        first, size = self._starts[index], self._sizes[index]
        head, tail = start - first, first + size - start - size_bytes
        keep = [(first, head)] * (head > 0) + [(start + size_bytes, tail)] * (tail > 0)
        self._starts[index : index + 1] = [at for at, _ in keep]
        self._sizes[index : index + 1] = [length for _, length in keep]
