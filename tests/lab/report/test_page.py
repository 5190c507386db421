"""The page: its numbers are those of its JSON, its text is never markup, and it stands with whatever a run has."""

import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from made_up import simulate, workload
from markup import Markup, held_against_its_json

from outrider.agents.settings import GatewaySettings
from outrider.errors import CallerError
from outrider.journal import Journal
from outrider.lab import report

Written = Callable[[report.Run], str]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'{{7*7}}\u2028"


def test_every_number_is_that_of_its_json(simulated: report.Run, written: Written) -> None:
    page = Markup(written(simulated))
    assert page.document["figures"] == simulated.figures
    assert held_against_its_json(page) > 60
    assert not page.errors


def test_what_it_shows(simulated: report.Run, written: Written) -> None:
    """Every section that the run has something for, and words for what is a model."""
    words = Markup(written(simulated)).words
    for title in (
        "Every call",
        "The figures",
        "Where each prompt token",
        "tiers over time",
        "Expert load",
        "Predicted",
    ):
        assert title in words, title
    assert "simulated: no engine ran" in words
    assert "Nothing of it is real." in words
    assert "measured live" in Markup(written(replace(simulated, simulated=False))).words


def test_every_bar_tells_its_own_story(simulated: report.Run, written: Written) -> None:
    """The story that a bar names begins where the bar begins, in both arms."""
    page = Markup(written(simulated))
    stories = json.loads(page.scripts["stories"])
    longest_s = max(arm["span_s"] for arm in page.document["read"]["arms"])
    tags = iter(page.tags)
    bars = [(int(a["data-i"]), next(tags)[1]) for tag, a in tags if tag == "g" and "data-i" in a]
    assert sorted(index for index, _ in bars) == list(range(len(stories))) == list(range(32))
    for index, first in bars:
        assert float(first["x"].rstrip("%")) == pytest.approx(100 * stories[index]["at_s"] / longest_s, abs=0.001)


def test_nothing_is_fetched(simulated: report.Run, written: Written) -> None:
    """No address outside, in any attribute; and the page's own policy forbids what is not inside."""
    page = Markup(written(simulated))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in policies[0]
    assert "@import" not in written(simulated) and "url(" not in written(simulated)


def test_text_of_others_stays_text(tmp_path: Path, written: Written) -> None:
    """Workflow names, titles, answers and sentences may hold anything."""
    figures = simulate(tmp_path / "a", workload(name=EVIL), None) | {"answers": {"x": EVIL}}
    run = report.Run(EVIL, True, [report.Arm("a", tmp_path / "a", figures)], plainly=[EVIL], figures={"a": figures})
    text = written(run)
    page = Markup(text)
    assert not page.errors
    assert [a.get("id", "code") for tag, a in page.tags if tag == "script"] == ["document", "stories", "code"]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.document["figures"]["a"]["answers"]["x"] == EVIL
    assert escape(EVIL, quote=False)[:30] in text


def test_one_arm_alone(simulated: report.Run, written: Written) -> None:
    """Its figures may be the whole file (key ""); nothing is compared with anything."""
    arm = replace(simulated.arms[1], key="")
    page = Markup(written(report.Run("one", True, [arm], figures=arm.figures)))
    assert held_against_its_json(page) > 20
    assert "ratio" not in page.words.split("How to read it")[0]


def test_no_memory_and_no_experts(simulated: report.Run, written: Written) -> None:
    page = Markup(written(report.Run("bare", True, simulated.arms[:1], figures=simulated.figures)))
    assert "tiers over time" not in page.words and "Expert load, before" not in page.words
    assert held_against_its_json(page) > 10


def test_a_run_without_calls(tmp_path: Path, written: Written) -> None:
    Journal(tmp_path / "agents.jsonl", "agents", GatewaySettings(engines=("http://a",))).close()
    page = Markup(written(report.Run("empty", False, [report.Arm("a", tmp_path, {})], figures={"a": {}})))
    assert "No call arrived" in page.words
    assert Markup(written(report.Run("nothing", False, []))).document == {
        "figures": {},
        "read": {"arms": [], "experts": {"before": None, "after": None}},
    }


def test_many_workflows_stay_readable(tmp_path: Path, written: Written) -> None:
    """Hundreds of workflows: rows are thinned, the page says so, and the totals count every call."""
    figures = simulate(tmp_path / "a", workload(workflows=300, turns=1), None)
    page = Markup(written(report.Run("many", True, [report.Arm("a", tmp_path / "a", figures)], figures={"a": figures})))
    bars = [a for tag, a in page.tags if tag == "g" and "data-i" in a]
    assert len(bars) == 100
    assert "one workflow in 3 has a row" in page.words
    assert page.document["read"]["arms"][0]["calls"] == 300


def test_the_other_sums_agree_with_the_figures(simulated: report.Run, written: Written) -> None:
    """What the journals tell and what the simulator counted are the same numbers."""
    page = Markup(written(simulated))
    for read in page.document["read"]["arms"]:
        figures = simulated.figures[read["name"]]
        assert read["calls"] == figures["calls"] == figures["answered"] == read["answered"]
        assert read["tokens"]["computed"] == figures["prompt_tokens_computed"]
        assert sum(read["tokens"].values()) == figures["prompt_tokens"]
        assert read["moved_bytes"] == figures["bytes_moved"]
        assert sum(role["tokens"]["computed"] for role in read["roles"]) == figures["prompt_tokens_computed"]
        for place, tier in read["tiers"].items():
            assert tier["end_bytes"] == figures["memory"]["tiers"][place]["used_bytes"]
            assert tier["hit_blocks"] == figures["memory"]["hit_blocks_by_tier"].get(place, 0)
    assert page.document["read"]["experts"]["before"]["max_over_mean"] == pytest.approx((1.5 + 1.0) / 2)
    assert page.document["read"]["experts"]["after"] == {
        "micro_steps": 3, "layers": 2, "ranks": 2, "token_slots": 720, "max_over_mean": 1.0, "worst": 1.0, "copies": 6,
    }  # fmt: skip


def test_a_path_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "r.html", tmp_path):
        with pytest.raises(CallerError, match="--report"):
            report.check(path)
    report.check(tmp_path / "r.html")
    assert not list(tmp_path.iterdir()), "the check leaves nothing behind"


def test_an_older_report_is_replaced_whole(simulated: report.Run, tmp_path: Path) -> None:
    for name in ("x-report.html", "x-trace.json"):
        (tmp_path / name).write_text("older" * 10**6)
    report.write(tmp_path / "x-report.html", simulated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-report.html", "x-trace.json"]
    assert "older" not in (tmp_path / "x-report.html").read_text()


def test_a_kept_run_is_drawn_the_same_again(simulated: report.Run, written: Written) -> None:
    directory = simulated.arms[0].directory.parent
    report.keep(directory, simulated)
    assert written(report.kept(directory)) == written(simulated)
    with pytest.raises(CallerError, match="--keep"):
        report.kept(directory / "baseline")
