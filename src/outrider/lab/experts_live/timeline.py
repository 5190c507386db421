"""What ran and what was carried when, by rank: its figures, a picture, a trace for Perfetto. Pure but for `draw`.

`Mover.spans` holds it: what experts computed, what the lane carried, and how long compute waited for the lane. Called
by run.py and bench/experts_live.py. One host's ranks share a clock; on CUDA a span is the host's, not the device's.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from outrider.experts.lane import Span
from outrider.lab.report.trace import Process

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPUTE, WAIT = ("forward", "backward"), "wait"
ABOVE = (*COMPUTE, WAIT)  # what a rank's compute did; all else is its lane's
COLOURS = {  # Okabe and Ito: told apart by every eye
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "weights, host": "#009E73",
    "weights, rank to rank": "#E69F00",
    "gradients": "#CC79A7",
    "weights into shared memory": "#999999",
    WAIT: "#D50000",
}
QUIET, FAINT = "#555555", "#E4E4E4"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
}
NARROWEST = 5e-4  # of the width; what took less is not seen


class Panel(msgspec.Struct, frozen=True):
    """One run: its name, what to say beside it, and the spans of each rank."""

    name: str
    words: str
    ranks: Sequence[Sequence[Span]]

    @property
    def begin_s(self) -> float:
        return min((span.begin_s for spans in self.ranks for span in spans), default=0.0)


class Figures(msgspec.Struct, frozen=True):
    """Seconds of one rank: experts computed; the lane carried (and waited for the other side); compute waited for it.

    under_s  of what the lane carried, what lay under this rank's own experts
    """

    computed_s: float
    carried_s: float
    waited_s: float
    under_s: float

    @property
    def hidden(self) -> float:
        """The share of the lane's seconds for which compute did not wait."""
        return 1 - self.waited_s / self.carried_s if self.carried_s else 1.0


def figures(spans: Sequence[Span]) -> Figures:
    """Of one rank's spans. Those of compute never overlap each other, nor do those of the lane."""
    computed, waited = _pieces(spans, COMPUTE), _pieces(spans, (WAIT,))
    carried = _pieces([span for span in spans if span.what not in ABOVE], None)
    return Figures(_length(computed), _length(carried), _length(waited), overlap_s(computed, carried))


def _pieces(spans: Sequence[Span], kinds: Iterable[str] | None) -> list[tuple[float, float]]:
    return sorted((span.begin_s, span.end_s) for span in spans if kinds is None or span.what in kinds)


def _length(pieces: Sequence[tuple[float, float]]) -> float:
    return float(sum(end_s - begin_s for begin_s, end_s in pieces))


def overlap_s(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in a piece of both; each is sorted, and its pieces do not overlap."""
    total_s, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total_s += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total_s


def trace(panels: Sequence[Panel]) -> bytes:
    """For ui.perfetto.dev: a process a panel, two tracks a rank; microseconds since the panel's first span."""
    events = []
    for pid, panel in enumerate(panels, start=1):
        process = Process(pid, panel.name, panel.begin_s)
        for rank, spans in enumerate(panel.ranks):
            compute, lane = (process.track(f"rank {rank}: {what}") for what in ("experts", "lane"))
            for span in spans:
                track = compute if span.what in ABOVE else lane
                layer = {} if span.layer < 0 else {"layer": span.layer}
                process.slice(track, (process.us(span.begin_s), process.us(span.end_s), span.what, dict(layer)))
        events += process.events
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def draw(path: Path, title: str, notes: str, panels: Sequence[Panel]) -> None:
    """Write the picture: png, svg or pdf by the path's ending. Nothing of matplotlib's global state is left changed."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        drawn = BytesIO()
        pictured(title, notes, panels).savefig(drawn, format=path.suffix[1:])
    path.write_bytes(drawn.getvalue())


def pictured(title: str, notes: str, panels: Sequence[Panel]) -> "Figure":
    """One axis a panel over the same stretch of time: for each rank its experts above, its lane below them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = 1.5 + 0.55 * len(panels) + 0.5 * sum(len(panel.ranks) for panel in panels)
    figure = Figure(figsize=(13, height), dpi=150)
    figure.text(0.06, 1 - 0.25 / height, title, fontsize=13, fontweight="bold", va="center", parse_math=False)
    figure.text(0.06, 0.2 / height, notes, fontsize=8, color=QUIET, va="center", parse_math=False)
    shares = [len(panel.ranks) + 0.4 for panel in panels]
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    figure.subplots_adjust(0.06, 0.75 / height, 0.99, 1 - 0.95 / height, hspace=0.75 / (height / len(panels)))
    every = [(panel.begin_s, span) for panel in panels for spans in panel.ranks for span in spans]
    width_s = max((span.end_s - begin_s for begin_s, span in every), default=1.0)
    for axes, panel in zip(all_axes, panels, strict=True):
        _panel(axes, panel, width_s)
    all_axes[-1].set_xlabel("milliseconds")
    seen = {span.what for _, span in every}
    figure.legend(
        handles=[Patch(color=colour, label=what) for what, colour in COLOURS.items() if what in seen],
        ncols=len(COLOURS), frameon=False, fontsize=9, handlelength=1.2,
        loc="upper left", bbox_to_anchor=(0.053, 1 - 0.36 / height), borderaxespad=0,
    )  # fmt: skip
    return figure


def _panel(axes: "Axes", panel: Panel, width_s: float) -> None:
    for rank, spans in enumerate(panel.ranks):
        for what, colour in COLOURS.items():
            bars = [
                (1e3 * (span.begin_s - panel.begin_s), 1e3 * (span.end_s - span.begin_s))
                for span in spans
                if span.what == what and span.end_s - span.begin_s > NARROWEST * width_s
            ]
            place = (rank - 0.42, 0.4) if what in ABOVE else (rank + 0.02, 0.3)
            axes.broken_barh(bars, place, color=colour, linewidth=0)
    axes.set_ylim(len(panel.ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.ranks)), [f"rank {rank}" for rank in range(len(panel.ranks))])
    axes.set_xlim(0, 1e3 * width_s)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_title(panel.name, loc="left", fontsize=10, fontweight="bold", pad=5)
    axes.set_title(panel.words, loc="right", fontsize=9, color=QUIET, pad=5)
