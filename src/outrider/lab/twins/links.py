"""Modelled links, first come, first served over a link's slots, as slow as `topology.Link` says; crews of threads."""

from collections import deque
from collections.abc import Callable

from outrider.lab.clock import Clock
from outrider.topology import Link

Way = tuple[str, str]  # source, destination


class Lane:
    """One link under way. `moved_bytes` counts what was sent: all of it, once nothing is under way any more."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self.link, self.clock = link, clock
        self.moved_bytes = 0
        self._booked_s = 0.0
        self._busy_until_s = [0.0] * link.slots

    @property
    def way(self) -> Way:
        return self.link.src, self.link.dst

    def busy_s(self) -> float:
        """Seconds of its slots in use up to now; what is booked beyond is one stretch a slot, from now on."""
        return self._booked_s - sum(max(0.0, until_s - self.clock.now) for until_s in self._busy_until_s)

    def send(self, size_bytes: int, do: Callable[[], object]) -> None:
        """Carry so many bytes after those that were sent before, then `do`; the slot that frees first carries them."""
        slot = min(range(len(self._busy_until_s)), key=lambda i: (self._busy_until_s[i], i))
        hop_s = self.link.hop_s(size_bytes)
        self._busy_until_s[slot] = max(self.clock.now, self._busy_until_s[slot]) + hop_s
        self._booked_s += hop_s
        self.moved_bytes += size_bytes
        self.clock.at(self._busy_until_s[slot], do)


Task = Callable[[Callable[[], None]], object]  # is given what it must call when it is over


class Crew:
    """So many threads before one queue: a task begins when one of them is free, oldest first."""

    def __init__(self, threads: int) -> None:
        self._free = threads
        self._queue: deque[Task] = deque()

    def start(self, task: Task) -> None:
        self._queue.append(task)
        self._next()

    def _next(self) -> None:
        if self._free and self._queue:
            self._free -= 1
            self._queue.popleft()(self._over)

    def _over(self) -> None:
        self._free += 1
        self._next()
