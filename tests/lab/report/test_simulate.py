"""`outrider simulate` and its report: stdout is as without it, and the page has the same figures."""

import json
from pathlib import Path

import pytest
from markup import Markup, held_against_its_json

from outrider.lab import report
from outrider.lab.simulate import run


def test_the_page_has_what_stdout_has(
    simulated: report.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A live gateway's journal, simulated and compared: prediction and truth stand beside each other."""
    trace = simulated.arms[1].directory / "agents.jsonl"
    options = {
        "trace": trace,
        "tiers": "host=64MiB,disk=256MiB",
        "profile": "smollm2-cpu",
        "compare": True,
        "json": True,
    }
    run.run(run.Options(**options))  # type: ignore[arg-type]
    bare = capsys.readouterr().out
    run.run(run.Options(**options, report=tmp_path / "x.html"))  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert printed.out == bare, "the same bytes, with a report or without"
    assert f"Report: {tmp_path / 'x.html'}" in printed.err
    page = Markup((tmp_path / "x.html").read_text())
    assert page.document["figures"] == json.loads(bare)
    assert held_against_its_json(page) > 60
    assert "Workflow completion" in page.words and "whole run" in page.words
    assert "simulated: no engine ran" in page.words
    for read in page.document["read"]["arms"]:
        figures = page.document["figures"] if read["name"] == run.ASKED else page.document["figures"][run.COMPARED]
        assert read["tokens"]["computed"] == figures["prompt_tokens_computed"]
        assert read["moved_bytes"] == figures["bytes_moved"]
        for place, tier in read["tiers"].items():
            assert tier["end_bytes"] == figures["memory"]["tiers"][place]["used_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-trace.json", "x.html"]


def test_a_kept_simulation_can_be_drawn_later(simulated: report.Run, tmp_path: Path) -> None:
    trace = simulated.arms[0].directory / "agents.jsonl"
    run.run(run.Options(trace=trace, profile="smollm2-cpu", keep=tmp_path, report=tmp_path / "x.html"))
    (kept,) = (path for path in tmp_path.iterdir() if path.is_dir())
    report.write(tmp_path / "y.html", report.kept(kept))
    assert (tmp_path / "y.html").read_text() == (tmp_path / "x.html").read_text()
