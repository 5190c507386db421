"""Which blocks belong to which request, and which of them somebody wants back. Pure; owned by `policy.py`.

A path is a named chain of blocks, root first; its name is the gateway's request id. A want names a path or a single
block. Either may come first: a want for a path not yet remembered waits for it. All is bounded, oldest out first.

A path whose chain continues in a newer path is superseded by it: the older one no longer holds its blocks, so that the
end of a session ends them all, while blocks that other sessions share (a system prompt) stay held by those.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from sortedcontainers import SortedList

from outrider.wants import Want

KEY_DIGITS = 32

T = TypeVar("T")


@dataclass(slots=True)
class Path:
    """A remembered chain; `holding` while it is neither superseded nor ended."""

    items: tuple[str, ...]
    holding: bool = True


class Paths:
    """Paths by name, wants by item, and both by block."""

    def __init__(self, paths_max: int, wants_max: int) -> None:
        self._paths_max = paths_max
        self._wants_max = wants_max
        self._paths: dict[str, Path] = {}
        self._tips: dict[str, dict[str, None]] = {}  # last block -> names of the paths that end there
        self._holders: dict[str, int] = {}  # block -> paths that hold it
        self.wants: dict[str, Want] = {}
        self.told: dict[str, dict[str, int]] = {}  # block -> wanted items that name it, with its position there
        self.deadlines = SortedList()  # (by_s, item) of every want
        self.changed: dict[str, None] = {}  # blocks whose wants changed
        self._returns: dict[str, dict[str, None]] = {}  # last block -> wanted items whose path ends there

    def items(self, name: str) -> tuple[str, ...]:
        """Blocks of a path, or the block itself where `name` is a key; empty for a path not remembered."""
        path = self._paths.get(name)
        if path is not None:
            return path.items
        is_key = len(name) == KEY_DIGITS and all(digit in "0123456789abcdef" for digit in name)
        return (name,) if is_key else ()

    def length(self, name: str) -> int:
        path = self._paths.get(name)
        return len(path.items) if path else 1

    def remember(self, name: str, items: tuple[str, ...]) -> None:
        """Name a chain, replacing an older one of that name and superseding the paths that it continues."""
        want = self.wants.get(name)
        self.drop_want(name)
        self._forget(name)
        for item in items:
            for older in list(self._tips.get(item, ())):
                self._let_go(older)
            self._holders[item] = self._holders.get(item, 0) + 1
        self._paths[name] = Path(items)
        if items:
            self._tips.setdefault(items[-1], {})[name] = None
        if want is not None:
            self.add_want(want)
        while len(self._paths) > self._paths_max:
            oldest = next(iter(self._paths))
            self.drop_want(oldest)
            self._forget(oldest)

    def end(self, name: str) -> list[str]:
        """The path's value is gone; its blocks that no other path holds and no want names, root first."""
        self.drop_want(name)
        items = self.items(name)
        if name in self._paths:
            self._let_go(name)
        return [item for item in items if item not in self._holders and item not in self.told]

    def add_want(self, want: Want) -> None:
        """Put a want in place of the older one of the same item."""
        self.drop_want(want.item)
        self.wants[want.item] = want
        self.deadlines.add((want.by_s, want.item))
        items = self.items(want.item)
        for position, item in enumerate(items):
            self.told.setdefault(item, {})[want.item] = position
            self.changed[item] = None
        if items:
            self._returns.setdefault(items[-1], {})[want.item] = None
        if len(self.wants) > self._wants_max:
            self.drop_want(next(iter(self.wants)))

    def drop_want(self, name: str) -> Want | None:
        want = self.wants.pop(name, None)
        if want is not None:
            self.deadlines.remove((want.by_s, name))
            items = self.items(name)
            for item in items:
                _unname(self.told, item, name)
                self.changed[item] = None
            if items:
                _unname(self._returns, items[-1], name)
        return want

    def wants_of(self, item: str) -> Iterator[tuple[Want, int]]:
        """Wants that name this block, with its position on each one's path."""
        for name, position in self.told.get(item, {}).items():
            yield self.wants[name], position

    def returned(self, items: tuple[str, ...]) -> list[Want]:
        """Wants whose whole path lies within the chain `items`: their context came back."""
        return [self.wants[name] for item in dict.fromkeys(items) for name in self._returns.get(item, ())]

    def _let_go(self, name: str) -> None:
        path = self._paths[name]
        if path.holding:
            path.holding = False
            for item in path.items:
                self._holders[item] -= 1
                if not self._holders[item]:
                    del self._holders[item]
        if path.items:
            _unname(self._tips, path.items[-1], name)

    def _forget(self, name: str) -> None:
        if name in self._paths:
            self._let_go(name)
            del self._paths[name]


def _unname(names: dict[str, dict[str, T]], item: str, name: str) -> None:
    """Take `name` from those of `item`, and `item` away with the last of them."""
    namers = names.get(item, {})
    namers.pop(name, None)
    if not namers:
        names.pop(item, None)
