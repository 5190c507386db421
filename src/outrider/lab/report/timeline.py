"""The timeline of one arm: workflows as rows, their calls as bars in lanes, the line and the engines below. Pure.

Called by `page.py`. A picture stays readable at any size: few workflows show every call in lanes; many share one thin
row each; of very many one in so many is drawn, and the page says so. What stands below the rows counts all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.lab.report import calls as read
from outrider.lab.report.calls import Calls, Story
from outrider.lab.report.draw import Scale

LANES_WORKFLOWS = 16  # up to here every workflow has lanes and a name
ROWS = 120  # thin rows of a larger run
BARS = 1500  # calls drawn in one arm
NAME, LANE, GAP, ROW = 15, 9, 5, 5  # pixels


@dataclass(frozen=True)
class Piece:
    """A part of a call: kind queue, first (sent, nothing came yet) or stream; x and width in percent."""

    kind: str
    x: float
    width: float


@dataclass(frozen=True)
class Bar:
    """One call. `index` finds its story in the page's data; y in pixels."""

    index: int
    y: int
    pieces: list[Piece]
    failed: bool


@dataclass(frozen=True)
class Row:
    """One workflow: its name where there is room for one, and when it was done."""

    name: str
    y: int
    done: float
    took_s: float
    bars: list[Bar]


@dataclass(frozen=True)
class Timeline:
    """`every`: one workflow in so many is drawn; `bars_every`: of its calls, one in so many.

    stories  what a hover tells, one for each bar
    """

    rows: list[Row]
    height: int
    every: int
    bars_every: int
    named: bool
    stories: list[dict[str, Any]] = field(default_factory=list)


def timeline(calls: Calls, x: Scale, first: int = 0) -> Timeline:
    """Lay out one journal on the common time axis; its stories will be those from `first` on of the whole page."""
    flows = list(calls.by_workflow().items())
    named = len(flows) <= LANES_WORKFLOWS and len(calls.stories) <= BARS
    every = 1 if named else _every(flows)
    bars_every = -(-sum(len(flow) for _, flow in flows[::every]) // BARS) or 1
    rows: list[Row] = []
    stories: list[dict[str, Any]] = []
    y = 0
    for name, flow in flows[::every]:
        top = y + NAME if named else y
        spans = [(story.arrived_s, story.until_s(calls.ended_s)) for story in flow]
        lanes = laid_out(spans) if named else [0] * len(flow)
        bars = []
        for story, lane in list(zip(flow, lanes, strict=True))[::bars_every]:
            bars.append(Bar(first + len(stories), top + lane * LANE, _drawn(story, calls, x), story.end != "Settle"))
            stories.append(told(story, calls))
        ended_s = max(story.until_s(calls.ended_s) for story in flow)
        rows.append(Row(name, y, x(ended_s - calls.began_s), ended_s - flow[0].arrived_s, bars))
        y = top + LANE * (max(lanes, default=0) + 1) + GAP if named else y + ROW
    return Timeline(rows, y, every, bars_every, named, stories)


def _drawn(story: Story, calls: Calls, x: Scale) -> list[Piece]:
    zero_s = calls.began_s
    return [
        Piece(kind, x(begin_s - zero_s), x.width(begin_s - zero_s, until_s - zero_s))
        for kind, begin_s, until_s in pieces(story, calls.ended_s)
    ]


def _every(flows: list[tuple[str, list[Story]]]) -> int:
    """The smallest n so that each n-th workflow makes at most ROWS rows and BARS bars."""
    every = max(1, -(-len(flows) // ROWS))
    while every < len(flows) and sum(len(flow) for _, flow in flows[::every]) > BARS:
        every += 1
    return every


def laid_out(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The first lane that is free for each span, in order of their begin: what overlaps lies in different lanes."""
    free_at_s: list[float] = []
    lanes = []
    for begin_s, end_s in spans:
        lane = next((i for i, free_s in enumerate(free_at_s) if free_s <= begin_s), len(free_at_s))
        free_at_s[lane : lane + 1] = [end_s]
        lanes.append(lane)
    return lanes


def pieces(story: Story, end_s: float) -> list[tuple[str, float, float]]:
    """(kind, begin, end) in order of time, without holes from arrival to the end, which is `end_s` for an open call."""
    until_s = story.until_s(end_s)
    marks: list[tuple[str, float, float]] = []
    free_s = story.arrived_s
    for attempt in story.attempts:
        over_s = until_s if attempt.ended_s is None else attempt.ended_s
        first_s = over_s if attempt.first_byte_s is None else attempt.first_byte_s
        marks += [("queue", free_s, attempt.began_s), ("first", attempt.began_s, first_s), ("stream", first_s, over_s)]
        free_s = over_s
    marks.append(("queue", free_s, until_s))
    return [mark for mark in marks if mark[2] > mark[1]]


def told(story: Story, calls: Calls) -> dict[str, Any]:
    """A call's story in short, for the hover and for the table: seconds since the first arrival, tokens, words."""
    last = story.attempts[-1] if story.attempts else None
    first_s = last.first_byte_s if last else None
    usage, dispatch = story.usage, story.dispatch
    engine = read.short(calls, last.engine) if last else ""
    failures = [f"{read.short(calls, a.engine)}: {a.failed}" for a in story.attempts if a.failed]
    return {
        "workflow": story.workflow,
        "role": story.role,
        "stage": story.stage,
        "id": story.id,
        "at_s": _brief(story.arrived_s - calls.began_s),
        "queued_s": _brief(story.queued_s),
        "ahead": story.ahead,
        "engine": engine,
        "reason": dispatch.reason if dispatch else "",
        "first_s": _brief(first_s - last.began_s) if last and first_s is not None else None,
        "stream_s": _brief(story.ended_s - first_s) if first_s is not None and story.ended_s is not None else None,
        "total_s": _brief(story.ended_s - story.arrived_s) if story.ended_s is not None else None,
        "end": story.end,
        "why": story.why,
        "failures": failures,
        "prompt": usage.prompt_tokens if usage else None,
        "computed": usage.prompt_tokens - usage.cached_tokens if usage else None,
        "cached": usage.cached_tokens - usage.external_tokens if usage else None,
        "memory": usage.external_tokens if usage else None,
        "output": usage.output_tokens if usage else None,
        "predicted": dispatch.predicted_tokens if dispatch else None,
        "bound": dispatch.bound_tokens if dispatch else None,
    }


def _brief(seconds: float) -> float:
    """To a tenth of a millisecond: a hover shows hundredths of a second."""
    return round(seconds, 4)
