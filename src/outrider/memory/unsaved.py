"""Blocks still to be saved to one tier: what somebody waits for first, then the oldest. Pure; owned by `traffic.py`."""

from collections import OrderedDict
from collections.abc import Iterator


class Unsaved:
    """A queue of blocks, each once, from which any can be taken."""

    def __init__(self) -> None:
        self._urgent: OrderedDict[str, None] = OrderedDict()
        self._others: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    def __contains__(self, item: str) -> bool:
        return item in self._urgent or item in self._others

    def __iter__(self) -> Iterator[str]:
        yield from self._urgent
        yield from self._others

    def add(self, item: str, urgent: bool = False) -> None:
        """To the end of the queue, where it is not in it; ahead of those that nobody waits for if it is urgent."""
        if urgent and item not in self._urgent:
            self._others.pop(item, None)
            self._urgent[item] = None
        elif not urgent and item not in self._urgent:
            self._others.setdefault(item)

    def drop(self, item: str) -> None:
        self._urgent.pop(item, None)
        self._others.pop(item, None)

    def pop(self) -> str | None:
        """The next one, taken out; None where there is none."""
        queue = self._urgent or self._others
        return queue.popitem(last=False)[0] if queue else None
