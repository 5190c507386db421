"""A dict that forgets its least recently used entry at a bound. Pure; every map that clients can grow is one."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `bound` entries; reading or writing one makes it the most recent."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> list[V]:
        """Store; return what had to go (never the new value)."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        gone = []
        while len(self._entries) > self.bound:
            gone.append(self._entries.popitem(last=False)[1])
        return gone

    def ensure(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made first if it is new."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def pop(self, key: K) -> V | None:
        return self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def values(self) -> Iterator[V]:
        """Least recent first."""
        return iter(self._entries.values())
