"""The demo's report: its figures are those of `--json`, its pictures those of the journals, its trace is beside it."""

import json

import pytest
from markup import Markup, held_against_its_json

from outrider.lab import report
from outrider.lab.report.run import read

pytestmark = pytest.mark.slow


def test_the_reports_figures_are_those_of_the_json(quick_demo) -> None:  # type: ignore[no-untyped-def]
    page = Markup(quick_demo.report.read_text())
    assert page.document["figures"] == quick_demo.figures
    assert held_against_its_json(page) > 80
    assert not page.errors
    assert f"Report: {quick_demo.report}" in quick_demo.printed
    for words in ("embedded", "emulated", "random weights", "measured live"):
        assert words in page.words, words


def test_the_journals_tell_the_same(quick_demo) -> None:  # type: ignore[no-untyped-def]
    """What the report reads from journals, and what the demo counted by itself."""
    page = Markup(quick_demo.report.read_text())
    for told in page.document["read"]["arms"]:
        figures = quick_demo.figures[told["name"]]
        assert told["calls"] == figures["arrivals"]
        assert told["tokens"] == figures["prompt_tokens_from"]
        assert sum(told["tokens"].values()) == figures["prompt_tokens"]
        assert told["moved_bytes"] == figures["bytes_moved"]
        for place, tier in told["tiers"].items():
            assert tier["end_bytes"] == figures["memory"]["tiers"][place]["used_bytes"]
            assert tier["hit_blocks"] == figures["memory"]["hit_blocks_by_tier"].get(place, 0)
    experts = page.document["read"]["experts"]
    assert experts["before"]["max_over_mean"] == pytest.approx(quick_demo.figures["experts"]["max_over_mean_static"])
    assert experts["after"]["max_over_mean"] == pytest.approx(quick_demo.figures["experts"]["max_over_mean_balanced"])
    assert experts["after"]["copies"] == quick_demo.figures["experts"]["copies_moved"]


def test_the_memory_journal_was_told_to_its_end(quick_demo) -> None:  # type: ignore[no-untyped-def]
    journals = read(report.kept(quick_demo.directory))
    memory = journals.memory["outrider"]
    assert not memory.stops
    assert memory.hit_blocks == quick_demo.figures["outrider"]["memory"]["hit_blocks_by_tier"]


def test_the_trace_lies_beside_it(quick_demo) -> None:  # type: ignore[no-untyped-def]
    trace = json.loads(report.trace_path(quick_demo.report).read_text())
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert {"baseline: workflows", "outrider: engines", "outrider: memory"} <= names
