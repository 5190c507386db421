"""The trace keeps the Trace Event Format's rules, so that Perfetto and chrome://tracing read it."""

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.lab import report
from outrider.lab.report import trace
from outrider.lab.report.run import read


@pytest.fixture(scope="module")
def traced(simulated: report.Run) -> list[dict[str, Any]]:
    document = json.loads(trace.trace(simulated, read(simulated)))
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def test_every_event_is_of_a_known_phase_and_in_order(traced: list[dict[str, Any]]) -> None:
    for event in traced:
        assert event["ph"] in {"M", "X", "C", "s", "f"}
        assert all(isinstance(event[name], int) for name in ("pid", "tid", "ts")), event
        assert event["ts"] >= 0
        assert event["name"]
    after = [event["ts"] for event in traced if event["ph"] != "M"]
    assert after == sorted(after)


def test_every_process_and_track_has_one_name(traced: list[dict[str, Any]]) -> None:
    named = [(e["pid"], e["tid"], e["name"]) for e in traced if e["ph"] == "M"]
    assert len(named) == len(set(named))
    for event in traced:
        if event["ph"] in "Xsf":
            assert (event["pid"], event["tid"], "thread_name") in named
        assert (event["pid"], 0, "process_name") in named


def test_slices_of_a_track_nest(traced: list[dict[str, Any]]) -> None:
    """Complete events on one track lie inside each other or apart: what begins in one, ends in it."""
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in traced:
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) > 10
    for spans in tracks.values():
        around: list[int] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1]
            around.append(end)


def test_counters_are_numbers(traced: list[dict[str, Any]], simulated: report.Run) -> None:
    counters = [event for event in traced if event["ph"] == "C"]
    for event in counters:
        assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())
    names = {event["name"] for event in counters}
    assert {"calls in line", "running at engine 0", "host holds", "moved engine->host"} <= names
    last = [e["args"]["bytes"] for e in counters if e["name"] == "moved engine->host"][-1]
    assert last == simulated.figures["outrider"]["bytes_moved"]["engine->host"]


def test_flows_begin_in_a_call_and_end_in_a_lift(traced: list[dict[str, Any]]) -> None:
    """Each id once as s, once as f, later, and both inside a slice of their track."""
    begun = {event["id"]: event for event in traced if event["ph"] == "s"}
    ended = {event["id"]: event for event in traced if event["ph"] == "f"}
    assert begun.keys() == ended.keys()
    assert begun, "this run lifts blocks that were wanted"
    for number, start in begun.items():
        assert start["ts"] <= ended[number]["ts"]
        for event in (start, ended[number]):
            inside = [
                slice_["name"]
                for slice_ in traced
                if slice_["ph"] == "X"
                and (slice_["pid"], slice_["tid"]) == (event["pid"], event["tid"])
                and slice_["ts"] <= event["ts"] <= slice_["ts"] + slice_["dur"]
            ]
            assert inside, event
        assert ended[number]["bp"] == "e"


def test_every_call_is_a_slice_with_its_story(traced: list[dict[str, Any]], simulated: report.Run) -> None:
    for number, arm in enumerate(simulated.arms):
        calls = [e for e in traced if e["ph"] == "X" and e["pid"] == 10 * number + 1 and "prompt" in e["args"]]
        assert len(calls) == arm.figures["calls"]
        assert (
            sum(e["args"]["computed"] for e in calls if "computed" in e["args"])
            == arm.figures["prompt_tokens_computed"]
        )


def test_it_lies_beside_the_page(simulated: report.Run, tmp_path: Path) -> None:
    assert report.trace_path(Path("a/outrider-report.html")) == Path("a/outrider-trace.json")
    assert report.trace_path(Path("x.html")) == Path("x-trace.json")
    report.write(tmp_path / "x.html", simulated)
    assert json.loads((tmp_path / "x-trace.json").read_text())["otherData"]["simulated"] is True
