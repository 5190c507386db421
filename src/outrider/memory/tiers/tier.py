"""What `move.py` needs of a tier below host: the same few calls, whichever tier it is. Live; decides nothing."""

import errno
from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

from outrider.memory.events import Copy, Span


class Damaged(Exception):
    """A tier does not hold what was stored; the reason is `checksum`, `stale` or `short`."""


class Tier(Protocol):
    """`write` and `commit` are called by one thread at a time, `read` by any. All may raise OSError."""

    @property
    def where(self) -> str:
        """What it lies on, for people."""

    def read(self, copy: Copy, padded: memoryview) -> None:
        """Read one block into its extent, whole pages, and verify it. Damaged where it is not what was stored."""

    def write(self, copy: Copy, padded: memoryview) -> None:
        """Write one block from its extent."""

    def commit(self, copies: Iterable[Copy]) -> None:
        """Make written blocks last as long as this tier makes anything last."""

    def close(self) -> None:
        """Give everything back."""


class Cached(Tier, Protocol):
    """A tier with a cache of its own that can be told what will be read."""

    def prefetch(self, copies: Iterable[Copy], pin: bool, done: Callable[[Copy, str], None]) -> None:
        """Bring blocks into the cache; `done` is called once a copy, from any thread, with why it failed or ''."""

    def unpin(self, spans: Iterable[Span]) -> None:
        """These bytes may leave the cache."""


def name_of(code: int | None) -> str:
    """`ENOSPC`, `EIO`, ...: an errno as events carry it."""
    return errno.errorcode.get(code or 0, "EIO")


def verify(copy: Copy, padded: memoryview) -> None:
    """Damaged where the bytes are not those that were put (law 1)."""
    if xxhash.xxh3_64_intdigest(padded[: copy.size_bytes]) != copy.checksum:
        raise Damaged("checksum")
