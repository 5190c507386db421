"""A CXL-hybrid device: byte-addressable memory with a small fast cache before a large slow medium. One interface.

    emulated.py   a DRAM cache before a file on disk, with its own prefetcher and write-back
    mapped.py     a real one: /dev/dax*, or a CPU-less NUMA node

`hybrid.py` opens one and keeps blocks on it; nothing above knows which it is.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Range = tuple[int, int]  # [at, at + size_bytes)


class HybridDevice(Protocol):
    """All calls are thread-safe and let other threads run while they copy. Overlapping reads and writes see a mixture.

    Errors of the medium are OSError: a read that fails gives no bytes, and what was written stays readable until it is
    on the medium or `flush` has said that it is not.
    """

    kind: str  # for people: what this is, and whether it is emulated
    size_bytes: int
    line_bytes: int  # reads and writes of whole lines cost least
    cache_bytes: int  # of its own cache, as far as that is known
    pin_bytes: int  # how much of it may be pinned; 0: the device cannot pin
    hit_rate: float  # bytes/s to be expected of what its cache holds, of the rest, and of writes
    miss_rate: float
    write_rate: float

    def read(self, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes at `at`."""

    def write(self, at: int, data: memoryview) -> None:
        """Store `data` at `at`; later reads see it."""

    def prefetch(
        self, ranges: Sequence[Range], pin: bool = False, done: "Callable[[Ticket], None] | None" = None
    ) -> "Ticket":
        """Bring ranges into the device's cache. `pin`: to stay until `unpin`; refused where the budget is spent."""

    def unpin(self, ranges: Sequence[Range]) -> None:
        """Undo one pin of these ranges; what is not pinned stays as it is."""

    def flush(self) -> None:
        """Return when everything written before is on the medium; OSError where it is not."""

    def stats(self) -> dict[str, Any]:
        """What it is, and counters since the start."""

    def close(self) -> None:
        """End its threads; tickets that are still open fail. Must be the last call."""


class Ticket:
    """One prefetch under way: ends once, done or failed."""

    def __init__(self, done: "Callable[[Ticket], None] | None" = None) -> None:
        self.why = ""  # in a sentence, once it failed
        self.errno = 0
        self._done = done
        self._ended = threading.Event()

    @property
    def open(self) -> bool:
        return not self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once it is done; False where it failed, or has not ended in time."""
        return self._ended.wait(timeout_s) and not self.why

    def end(self, why: str = "", errno: int = 0) -> None:
        """The device says how it ended; the callback runs on this thread."""
        self.why, self.errno = why, errno
        self._ended.set()
        if self._done is not None:
            self._done(self)


def check_range(at: int, size_bytes: int, capacity_bytes: int) -> None:
    """ValueError for bytes that the device does not have."""
    if at < 0 or size_bytes < 0 or at + size_bytes > capacity_bytes:
        raise ValueError(f"[{at}, {at + size_bytes}) is not within the device's {capacity_bytes} bytes")
