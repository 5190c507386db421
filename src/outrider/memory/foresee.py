"""What keeping a block is worth: expected seconds saved per byte and second held. Pure; called by `policy.py`.

Told beats learned: a block that somebody wants is worth what the want says, over the time until its return. Of the rest
we only know when it was last touched, and expect it back in about as long again; that alone orders blocks as LRU does.
One unit for all, so that a told return in a minute can be weighed against an untold block touched a second ago.
"""

import math
from collections.abc import Iterable

from outrider.wants import Want

FLOOR_S = 1.0  # no wait counts as shorter: a block is held at least as long as its copy and its use take
OVERDUE_FACTOR = 4.0  # a return that is late by d is expected in about 4 d (reference: session traces)
UNTOLD_TRUST = 0.5  # chance that a block nobody told us about returns at all
EARLY_FACTOR = 1.5  # start a promotion this many copy times ahead of its deadline
SLACK_S = 2.0  # a told return may come so much early: before that a block waits nearer than it lay, but not in host


def wait_s(by_s: float, now: float) -> float:
    """Expected seconds until a told return: the rest of its time, or 4 times its delay once it is overdue."""
    rest_s = by_s - now
    return max(rest_s, FLOOR_S) if rest_s >= 0 else FLOOR_S - OVERDUE_FACTOR * rest_s


def falls_s(by_s: float, wait_until_s: float, now: float) -> float:
    """When a return will be so overdue that it is expected in `wait_until_s`: `wait_s` inverted, later than `now`."""
    return max(by_s + max(wait_until_s - FLOOR_S, 0.0) / OVERDUE_FACTOR, math.nextafter(now, math.inf))


def told_worth(wants: Iterable[tuple[Want, int]], now: float) -> float:
    """Seconds saved per byte-second by a block under its best want; each comes with the bytes of its whole path."""
    return max(want.saved_s / (path_bytes * wait_s(want.by_s, now)) for want, path_bytes in wants)


def untold_worth(saved_s_per_byte: float, idle_s: float) -> float:
    """The same for a block of which we know the last touch only, `idle_s` ago; losing it costs `saved_s_per_byte`."""
    return UNTOLD_TRUST * saved_s_per_byte / max(idle_s, FLOOR_S)


def latest_start_s(by_s: float, copy_s: float) -> float:
    """When a promotion that takes `copy_s` should be under way at the latest."""
    return by_s - EARLY_FACTOR * copy_s
