"""What each section of the page shows, worked out for the template. Pure. Called by `page.py`."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from outrider.lab.demo import table
from outrider.lab.report import draw, strips
from outrider.lab.report.calls import Calls, waiting
from outrider.lab.report.draw import Scale, Tick
from outrider.lab.report.loads import Loads
from outrider.lab.report.numbers import Numbers
from outrider.lab.report.run import Arm, Journals, Run
from outrider.lab.report.strips import Strip
from outrider.lab.report.timeline import Timeline, timeline
from outrider.lab.report.totals import COMPUTED, ENGINE

HEADLINES = (  # title, key, form: the first thing that is read; the last ones where an earlier one is missing
    ("TTFT p50, returning turns", "returning_ttft_p50_s", "seconds"),
    ("Workflow completion, mean", "workflow_completion_mean_s", "seconds"),
    ("Prompt tokens computed", "prompt_tokens_computed", "count"),
    ("TTFT p50", "ttft_p50_s", "seconds"),
)
FORMS: Mapping[Callable[[float], str], str] = MappingProxyType(
    {table.seconds: "seconds", table.count: "count", table.mib: "mib"}
)
FROM_MEMORY = ("host", "cache", "hybrid", "disk", "memory")  # fastest first; "memory": from which tier is not known
LAYERS = 8  # drawn of a model that has more
CELLS = 32  # a side of the grid that many points share
FAR = 500.0  # a picture of predictions that reaches beyond has a log scale
CARDS = 4
EXPERTS = "figures.experts.max_over_mean"


@dataclass(frozen=True)
class Card:
    """One headline: keys of the number before and after; `after` alone where there is one arm."""

    title: str
    before: str
    after: str
    form: str
    widths: tuple[float, float]  # of the two bars, percent


@dataclass(frozen=True)
class Served:
    """One arm in the timeline."""

    arm: Arm
    key: str
    rows: Timeline
    strips: list[Strip]


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar, its number at `key`."""

    source: str
    key: str
    x: float
    width: float


@dataclass(frozen=True)
class Held:
    """The tiers of one arm: (place, key of its totals, strip), and what moved: (way, key, strip)."""

    arm: Arm
    tiers: list[tuple[str, str, Strip]]
    ways: list[tuple[str, str, Strip]]
    stops: str


@dataclass(frozen=True)
class Layer:
    """One MoE layer, a column a micro-step: (x, width, before, after), each a span (y, height) or None; in percent."""

    number: int
    columns: list[tuple[float, float, tuple[float, float] | None, tuple[float, float] | None]]


@dataclass(frozen=True)
class Dot:
    """Calls with the same prediction and the same truth; x, y in percent, r in pixels."""

    x: float
    y: float
    r: float
    count: int
    says: str


@dataclass(frozen=True)
class Scatter:
    """Predicted along x, actual upwards, both on one scale."""

    title: str
    ticks: list[Tick]
    dots: list[Dot]


def sections(run: Run, journals: Journals, numbers: Numbers) -> dict[str, Any]:
    """Everything the template needs beside the run itself."""
    calls = journals.calls
    longest_s = max((c.ended_s - c.began_s for c in calls.values() if c.stories), default=0.0) or 1.0
    x = Scale(longest_s)
    served = _served(run, calls, x)
    return {
        "cards": _cards(run, numbers),
        "rows": [row for row in table.ROWS if any(numbers.at(_key(arm, row[1])) is not None for arm in run.arms)],
        "forms": FORMS,
        "key": _key,
        "served": served,
        "stories": [story for one in served for story in one.rows.stories],
        "ticks": draw.time_ticks(longest_s, 6),
        "read": lambda arm: _read(run, arm),
        "tokens": lambda arm: _tokens_key(run, arm, numbers),
        "sources": [(arm, _segments(arm, run, numbers)) for arm in run.arms],
        "source_names": _source_names(run, numbers),
        "held": [_held(run, arm, journals, x) for arm in run.arms if arm.name in journals.memory],
        "layers": _layers(journals.before, journals.after),
        "load_top": _load_top(journals.before, journals.after),
        "scatters": _scatters(run, calls),
        "judged": _judged(numbers),
    }


def _read(run: Run, arm: Arm) -> str:
    return f"read.arms.{run.arms.index(arm)}"


def _key(arm: Arm, name: str) -> str:
    return f"figures.{arm.prefix}{name}"


def _cards(run: Run, numbers: Numbers) -> list[Card]:
    cards = []
    if numbers.at(f"{EXPERTS}_balanced") is not None:
        cards.append(("Expert load, largest / mean rank", f"{EXPERTS}_static", f"{EXPERTS}_balanced", "load"))
    if run.arms:
        first, last = run.arms[0], run.arms[-1]
        keyed = [(title, _key(first, name), _key(last, name), form) for title, name, form in HEADLINES]
        told = [card for card in keyed if numbers.at(card[1]) is not None and numbers.at(card[2]) is not None]
        cards = [*told[: CARDS - len(cards)], *cards]
    return [Card(*card, _widths(numbers.at(card[1]), numbers.at(card[2]))) for card in cards]


def _widths(before: float, after: float) -> tuple[float, float]:
    top = max(before, after) or 1
    return round(100 * before / top, 2), round(100 * after / top, 2)


def _served(run: Run, calls: dict[str, Calls], x: Scale) -> list[Served]:
    """Both arms under the same scales, so that heights can be compared."""
    tops = [max((level for _, level in waiting(c)), default=0) for c in calls.values()]
    busy = [max((level for _, level in strips.in_flight(c, c.engines)), default=0) for c in calls.values()]
    served: list[Served] = []
    for arm in run.arms:
        one = calls[arm.name]
        if one.stories:
            below = [
                strips.in_line(one, x, max(tops)) if max(tops) else None,
                strips.at_engines(one, x, max(busy)),
                strips.kv_in_use(one, x),
            ]
            told = sum(len(other.rows.stories) for other in served)
            served.append(Served(arm, _read(run, arm), timeline(one, x, told), [s for s in below if s]))
    return served


def _tokens_key(run: Run, arm: Arm, numbers: Numbers) -> str:
    """Where one arm's prompt tokens by source lie: in the figures, else as the journals tell them."""
    key = _key(arm, "prompt_tokens_from")
    return key if numbers.at(key) else f"{_read(run, arm)}.tokens"


def _source_names(run: Run, numbers: Numbers) -> list[str]:
    """Every source that any arm had, computed first, then from near to far."""
    seen = {name for arm in run.arms for name in numbers.at(_tokens_key(run, arm, numbers))}
    return [name for name in (COMPUTED, ENGINE, *FROM_MEMORY) if name in seen]


def _segments(arm: Arm, run: Run, numbers: Numbers) -> list[Segment]:
    """One arm's bar, on the scale of the longest."""
    totals = [sum(numbers.at(_tokens_key(run, other, numbers)).values()) for other in run.arms]
    x = Scale(max(totals) or 1)
    segments: list[Segment] = []
    begin, key = 0, _tokens_key(run, arm, numbers)
    for name in _source_names(run, numbers):
        count = numbers.at(key).get(name, 0)
        if count:
            segments.append(Segment(name, f"{key}.{name}", x(begin), x(count)))
        begin += count
    return segments


def _held(run: Run, arm: Arm, journals: Journals, x: Scale) -> Held:
    calls, memory, key = journals.calls[arm.name], journals.memory[arm.name], _read(run, arm)
    zero_s, ends_s = calls.began_s, calls.ended_s - calls.began_s
    tiers = [
        (place, f"{key}.tiers.{place}", strips.held(memory, place, zero_s, ends_s, x, table.mib))
        for place in memory.capacity_bytes
    ]
    moved = [
        (way, f"{key}.moved_bytes.{way}", strips.moved(memory, way, zero_s, ends_s, x, table.mib))
        for way in memory.moved
    ]
    return Held(arm, tiers, moved, memory.stops)


def _load_top(before: Loads | None, after: Loads | None) -> float:
    """The full height of the pictures of load, times the mean: the busiest rank of all just fits."""
    return max([1.2, *(float(loads.over_mean_SLR.max()) for loads in (before, after) if loads)])


def _layers(before: Loads | None, after: Loads | None) -> list[Layer]:
    """The layers that were least balanced before, in their own order."""
    first = before or after
    if first is None:
        return []
    worst_L = first.over_mean_SLR.max(axis=2).mean(axis=0)
    chosen = sorted(range(len(worst_L)), key=lambda layer: (-worst_L[layer], layer))[:LAYERS]
    y = Scale(_load_top(before, after))
    width = 100 / len(first.stages)
    return [
        Layer(
            layer,
            [
                (
                    round(width * (s + 0.12), 3),
                    round(width * 0.76, 3),
                    _span(before, s, layer, y),
                    _span(after, s, layer, y),
                )
                for s in range(len(first.stages))
            ],
        )
        for layer in sorted(chosen)
    ]


def _span(loads: Loads | None, step: int, layer: int, y: Scale) -> tuple[float, float] | None:
    """From the busiest rank down to the idlest; perfect balance is still a line."""
    if loads is None or step >= len(loads.stages):
        return None
    load_R = loads.over_mean_SLR[step, layer]
    top, height = 100 - y(float(load_R.max())), y(float(load_R.max() - load_R.min()))
    least = 1.8
    return (round(top - max(0.0, least - height) / 2, 2), round(max(height, least), 2))


def _judged(numbers: Numbers) -> list[tuple[str, str, str]]:
    """(title, name, form) of what a simulation foretold of a live run, and what came."""
    titles = {name: (title.strip(), FORMS[unit]) for title, name, unit in table.ROWS} | {"wall_s": ("time", "seconds")}
    foretold = numbers.at("figures.predicted") or {}
    actual = numbers.at("figures.actual") or {}
    return [(titles[name][0], name, titles[name][1]) for name in foretold if name in titles and actual.get(name)]


def _scatters(run: Run, calls: dict[str, Calls]) -> list[Scatter]:
    """Output tokens by arm, and completion where the run was foretold."""
    scatters = []
    for name, one in calls.items():
        pairs = [
            (float(story.dispatch.predicted_tokens), float(story.usage.output_tokens))
            for story in one.stories.values()
            if story.dispatch and story.usage
        ]
        if pairs:
            scatters.append(scatter(f"Output tokens, {name}", pairs, "tokens"))
    if run.predicted:
        told = [(float(flow["predicted_s"]), float(flow["actual_s"])) for flow in run.predicted.values()]
        scatters.append(scatter("Workflow completion", told, "s"))
    return scatters


def scatter(title: str, pairs: list[tuple[float, float]], unit: str) -> Scatter:
    """Points that coincide become one larger dot; very many share the cells of a grid; far apart, both axes are log."""
    top = max(max(pair) for pair in pairs) * 1.08 or 1.0
    far = top > FAR
    place = draw.logged if far else float
    x = Scale(place(top))
    counted = Counter(pairs)
    if len(counted) > 2 * CELLS**2:  # one pair of each cell stands for all of it
        cells: dict[tuple[int, int], tuple[float, float]] = {}
        stands = [cells.setdefault((_cell(x(place(p))), _cell(x(place(a)))), (p, a)) for p, a in pairs]
        counted = Counter(stands)
    dots = [
        Dot(x(place(p)), 100 - x(place(a)), _radius(n), n, f"predicted {p:,.4g} {unit}, came {a:,.4g} {unit}")
        for (p, a), n in sorted(counted.items())
    ]
    marks = draw.log_ticks(top) if far else draw.ticks(top, 5)
    return Scatter(f"{title}, log scale" if far else title, marks, dots)


def _cell(percent: float) -> int:
    return int(percent * CELLS / 100)


def _radius(count: int) -> float:
    return float(round(min(3 + 1.5 * math.sqrt(count - 1), 14), 1))
