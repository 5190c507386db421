"""Virtual time: things to do, each at its moment. No wall time, no randomness; the same calls give the same order.

What was asked for first happens first where moments are equal. A moment that has passed means: now, after everything
that was asked for before. Run by the simulator; `clock()` is what a twin of `move.py` reads in place of the real one.
"""

import math
from collections.abc import Callable
from heapq import heappop, heappush


class Timer:
    """One thing to do at `at_s`; None once it is done or cancelled."""

    __slots__ = ("at_s", "do")

    def __init__(self, at_s: float, do: Callable[[], object]) -> None:
        self.at_s = at_s
        self.do: Callable[[], object] | None = do

    def cancel(self) -> None:
        """It will not happen. No effect when it has."""
        self.do = None


class Clock:
    """`now` in seconds since the simulation's start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = 0
        self._heap: list[tuple[float, int, Timer]] = []

    def __call__(self) -> float:
        return self.now

    def at(self, at_s: float, do: Callable[[], object]) -> Timer:
        """Do this at that moment."""
        timer = Timer(max(at_s, self.now), do)
        self._numbers += 1
        heappush(self._heap, (timer.at_s, self._numbers, timer))
        return timer

    def run(self, until_s: float = math.inf) -> None:
        """Let time pass until nothing is left to do, or until `until_s`."""
        while self._heap and self._heap[0][0] <= until_s:
            at_s, _, timer = heappop(self._heap)
            do = timer.do
            if do is None:
                continue
            timer.do = None
            self.now = at_s
            do()
        if math.isfinite(until_s):
            self.now = max(self.now, until_s)
