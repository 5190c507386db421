"""Spans: their figures by a plain count, their picture and trace with every bar in its place."""

import json
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.experts.lane import Span
from outrider.lab.experts_live.timeline import ABOVE, COLOURS, Figures, Panel, draw, figures, pictured, trace

RUN = [
    Span("wait", -1, 10.0, 10.5),
    Span("weights into shared memory", -1, 10.0, 10.5),
    Span("wait", 0, 10.5, 10.5),
    Span("forward", 0, 10.5, 12.5),
    Span("weights, rank to rank", 1, 11.5, 13.25),
    Span("wait", 1, 13.0, 13.25),
    Span("backward", 1, 13.25, 14.0),
    Span("gradients", -1, 14.0, 15.0),
]
PANELS = [Panel("ours", "15 s", [RUN, RUN[3:]]), Panel("static", "nothing moved", [[RUN[3]], [RUN[6]]])]


def pieces(draw_from: st.DataObject) -> list[tuple[int, int]]:
    """Sorted, apart, at whole seconds."""
    edges = sorted(draw_from.draw(st.sets(st.integers(0, 40), max_size=12)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(st.data())
def test_figures_are_a_plain_count(data: st.DataObject) -> None:
    computed, carried, waited = pieces(data), pieces(data), pieces(data)
    kinds = (("forward", computed), ("gradients", carried), ("wait", waited))
    spans = [Span(what, 0, *map(float, piece)) for what, some in kinds for piece in some]
    at = [{second for begin, end in some for second in range(begin, end)} for _, some in kinds]
    assert figures(data.draw(st.permutations(spans))) == Figures(len(at[0]), len(at[1]), len(at[2]), len(at[0] & at[1]))


def test_what_is_hidden() -> None:
    found = figures(RUN)
    assert found == Figures(computed_s=2.75, carried_s=3.25, waited_s=0.75, under_s=1.0)
    assert found.hidden == pytest.approx(1 - 0.75 / 3.25)
    assert figures(RUN[3:4]).hidden == 1.0, "nothing was carried"


def test_every_span_is_a_bar_in_its_place() -> None:
    figure = pictured("title", "notes", PANELS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ours", "static"]
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        assert axes.get_xlim() == (0, 5000), "all panels share one stretch of time"
        drawn = set()
        for collection in axes.collections:
            colour = matplotlib.colors.to_hex(collection.get_facecolor()[0]).upper()
            for path in collection.get_paths():
                (left, top), (right, bottom) = path.vertices.min(axis=0), path.vertices.max(axis=0)
                rank = round((top + bottom) / 2)
                drawn.add((rank, (top + bottom) / 2 < rank, colour, round(left), round(right)))
        assert drawn == {
            (rank, span.what in ABOVE, COLOURS[span.what], *(round(1e3 * (t - panel.begin_s)) for t in times))
            for rank, spans in enumerate(panel.ranks)
            for span in spans
            if (times := (span.begin_s, span.end_s)) and span.end_s > span.begin_s
        }


def test_the_picture_is_written_and_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"live.{kind}"
        draw(path, "title with $ in it", "notes", PANELS)
        assert path.read_bytes().startswith(magic)
    assert dict(matplotlib.rcParams) == before


def test_the_trace_holds_every_span() -> None:
    events = json.loads(trace(PANELS))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [name for (pid, _), name in names.items() if pid == 1] == [
        "rank 0: experts", "rank 0: lane", "rank 1: experts", "rank 1: lane",
    ]  # fmt: skip
    for number, panel in enumerate(PANELS, start=1):
        for rank, spans in enumerate(panel.ranks):
            mine = [
                e for e in events if e["ph"] == "X" and e["pid"] == number and f"rank {rank}" in names[number, e["tid"]]
            ]
            assert [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in mine] == [
                (span.what, *(round(1e6 * (t - panel.begin_s)) for t in (span.begin_s, span.end_s))) for span in spans
            ]
            for event, span in zip(mine, spans, strict=True):
                lane = names[number, event["tid"]].endswith("lane")
                assert lane == (span.what not in ABOVE)
                assert event["args"].get("layer", -1) == span.layer
