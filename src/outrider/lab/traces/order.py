"""Which calls a call waited for, read from the times of a recorded run. Pure.

Of all calls answered before it began, those that no other answered call had followed:

    plan ----.  review-1 --.      fix waits for both reviews, not for plan; review-2 began while review-1 ran,
             |  review-2 -----.   so it waits for plan alone
             `----------------`-- fix

Calls that overlap are parallel branches, however they are listed. What times cannot show: a call that waited for
nothing but happened to begin after another's end looks as if it waited.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf


@dataclass(slots=True)
class Answered:
    """A call, when its answer ended, and when the first answer ended among the calls that followed it."""

    call: str
    end_s: float
    followed_s: float = inf


class Frontier:
    """The calls that a later one may have waited for. Calls enter in the order in which they began.

    slack_s   a call that began at most this long before another's end still counts as after it: the clock's grain
    """

    def __init__(self, slack_s: float = 0.0) -> None:
        self._slack_s = slack_s
        self._open: dict[str, Answered] = {}

    def before(self, start_s: float) -> tuple[Answered, ...]:
        """What a call beginning at start_s waited for, in order of entry."""
        limit_s = start_s + self._slack_s
        self._open = {call: answered for call, answered in self._open.items() if answered.followed_s > limit_s}
        return tuple(answered for answered in self._open.values() if answered.end_s <= limit_s)

    def last(self) -> tuple[Answered, ...]:
        """What no call followed: the ends of all that entered."""
        return tuple(answered for answered in self._open.values() if answered.followed_s == inf)

    def enter(self, call: str, end_s: float, parents: Iterable[str]) -> None:
        """A call that waited for `parents` and was answered at end_s."""
        for parent in parents:
            if parent in self._open:
                self._open[parent].followed_s = min(self._open[parent].followed_s, end_s)
        self._open[call] = Answered(call, end_s)


def gap_s(start_s: float, parents: Iterable[Answered], otherwise_s: float) -> float:
    """Seconds from the last parent's answer to start_s, or from `otherwise_s` without parents; never below zero."""
    return max(start_s - max((parent.end_s for parent in parents), default=otherwise_s), 0.0)
