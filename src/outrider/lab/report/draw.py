"""Geometry of the page's pictures: scales, ticks, steps. Pure; called by `timeline.py`, `strips.py` and `page.py`.

Everything along x is a share of the width in percent, so a picture fits a phone and a desk without being drawn twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Level = tuple[float, float]  # (moment, value from then on)
POINTS = 480  # of one curve: a screen shows no more


@dataclass(frozen=True)
class Scale:
    """Maps [0, top] to [0, 100]. `top` is above 0."""

    top: float

    def __call__(self, value: float) -> float:
        return round(100 * value / self.top, 3)

    def width(self, begin: float, end: float) -> float:
        """Of a bar; at least a sliver, so that nothing that happened is invisible."""
        return max(self(end) - self(begin), 0.05)


@dataclass(frozen=True)
class Tick:
    """One mark of an axis: where, and what it says."""

    at: float
    text: str


def ticks(top: float, about: int, unit: str = "") -> list[Tick]:
    """Round numbers from 0 to `top`, roughly `about` of them; the last one carries the unit."""
    step = nice_step(top, about)
    values = [step * i for i in range(int(top / step * (1 + 1e-9)) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    scale = Scale(top)
    return [
        Tick(
            scale(value), f"{value:,.{digits}f}" + (f"\N{NO-BREAK SPACE}{unit}" if unit and value == values[-1] else "")
        )
        for value in values
    ]


def time_ticks(top_s: float, about: int) -> list[Tick]:
    """Ticks in seconds, minutes or hours, whichever makes the shortest numbers."""
    unit_s, unit = next((pair for pair in ((3600.0, "h"), (60.0, "min")) if top_s >= 10 * pair[0]), (1.0, "s"))
    return ticks(top_s / unit_s, about, unit)


def log_ticks(top: float) -> list[Tick]:
    """0 and the powers of ten, for values that `logged` has spread."""
    scale = Scale(logged(top))
    values = [0, *(10**power for power in range(int(math.log10(max(top, 1))) + 1))]
    return [Tick(scale(logged(value)), f"{value:,}") for value in values]


def logged(value: float) -> float:
    """Evens out what lies orders of magnitude apart, 0 included."""
    return math.log10(1 + value)


def nice_step(top: float, about: int) -> float:
    """1, 2 or 5 times a power of ten, so that about `about` steps make `top`."""
    rough = top / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def thinned(levels: Sequence[Level], top_s: float, points: int = POINTS) -> list[Level]:
    """At most about two points for each of `points` slices of time: the highest level in it, and the last."""
    if len(levels) <= points:
        return list(levels)
    kept: list[Level] = []
    slice_s = top_s / points
    index, peak = -1, levels[0]
    for i, level in enumerate(levels):
        if int(level[0] / slice_s) != index:
            if i and kept[-1] != levels[i - 1]:
                kept.append(levels[i - 1])
            index, peak = int(level[0] / slice_s), level
            kept.append(level)
        elif level[1] > peak[1]:
            peak = level
            kept.append(level)
    if kept[-1] != levels[-1]:
        kept.append(levels[-1])
    return kept


def steps_path(levels: Sequence[Level], x: Scale, y: Scale, until: float) -> str:
    """An area under a staircase, as an SVG path in a box of 100 x 100 with y downwards."""
    path = ["M0 100"]
    for moment, value in levels:
        path.append(f"H{x(max(0.0, min(moment, until)))}V{round(100 - y(value), 2)}")
    path.append(f"H{x(until)}V100Z")
    return "".join(path)


def binned(levels: Sequence[Level], until: float, bins: int) -> list[float]:
    """What a counter gained in each of `bins` equal slices of [0, until]; nothing is lost at the edges."""
    gained = [0.0] * bins
    last = 0.0
    for moment, value in levels:
        gained[min(bins - 1, max(0, int(moment / until * bins)))] += value - last
        last = value
    return gained
