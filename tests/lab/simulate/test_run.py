"""The command: the same bytes from the same seed, sizes from a live journal, sentences for mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider import stack
from outrider.errors import CallerError
from outrider.lab import report
from outrider.lab.simulate import profiles, run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """60 requests in mooncake's format: sessions whose prompts grow."""
    random = np.random.default_rng(5)
    lines, chains = [], [[0], [0], [0]]
    for number in range(60):
        chain = chains[number % 3]
        chain += [1000 * (number + 1) + at for at in range(int(random.integers(1, 4)))]
        length = 512 * len(chain) - int(random.integers(0, 500))
        lines.append(
            {"timestamp": 400 * number, "input_length": length, "output_length": 30 + number % 7, "hash_ids": chain[:]}
        )
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def simulate(*arguments: str, hash_seed: str = "0") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "outrider", "simulate", *arguments],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_every_process(trace: Path, tmp_path: Path) -> None:
    """Law 10, on stdout and in the journals, with other hash seeds in every process."""
    journals = []
    outs = []
    for seed in ("1", "2"):
        keep = tmp_path / seed
        keep.mkdir()
        options = ("--tiers", "host=1GiB,disk=8GiB", "--engines", "2", "--kv-tokens", "60000", "--compare", "--json")
        done = simulate(str(trace), *options, "--keep", str(keep), "--report", "none", hash_seed=seed)
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout)
        names = ("outrider/agents.jsonl", "outrider/memory.jsonl", "baseline/agents.jsonl")
        (kept,) = keep.iterdir()
        journals.append([(kept / name).read_bytes() for name in names])
    assert outs[0] == outs[1]
    assert journals[0] == journals[1]
    result = json.loads(outs[0])
    assert result["simulated"] is True and result["trace"]["format"] == "mooncake" and result["seed"] == 0
    assert result["answered"] == result["baseline"]["answered"] == 60
    assert result["engine"]["provenance"].startswith("fitted to vLLM")
    assert result["prompt_tokens_computed"] < result["baseline"]["prompt_tokens_computed"]


def test_a_journal_can_be_simulated_again_with_its_own_sizes(trace: Path, tmp_path: Path) -> None:
    """The run directory of a simulation is read as a live one's: engines, KV and credit as they were there."""
    first = run.run(run.Options(trace, engines=3, kv_tokens=30_720, credit=5, json=True, keep=tmp_path))
    (journal,) = tmp_path.glob("*/outrider/agents.jsonl")
    again = run.run(run.Options(journal, profile=profiles.DEFAULT, json=True))
    assert again["trace"]["format"] == "outrider"
    assert again["credit"] == 5 and again["engine"]["kv_tokens"] == 30_720 and len(again["engines"]) == 3
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert again["actual"]["ttft_p50_s"] == pytest.approx(first["ttft_p50_s"])
    assert set(again["predicted"]) == set(again["actual"]) == set(again["error"])
    for name, came in again["actual"].items():
        assert again["error"][name] == pytest.approx((again["predicted"][name] - came) / came, abs=1e-12)
    assert stack.replay(journal)[1] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 2}, "--limit"),
        ({"rate": 5.0}, "--rate"),
        ({"engines": 4}, r"engines 4 \(live: 2\)"),
        ({"kv_tokens": 9_000}, r"kv_tokens 9000 \(live: 30720\)"),
        ({"policy": "fcfs", "routing": "sticky"}, r"policy fcfs \(live: srtf\), routing sticky \(live: residency\)"),
        ({"tiers": "host=1GiB"}, r"memory attached \(live: none\)"),
        ({"profile": None}, "engines of a speed that nobody named"),
    ],
)
def test_what_is_not_the_live_run_is_no_prediction_of_it(
    trace: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    run.run(run.Options(trace, kv_tokens=30_720, json=True, keep=tmp_path))
    (journal,) = tmp_path.glob("*/outrider/agents.jsonl")
    found = run.run(run.Options(journal, **{"profile": profiles.DEFAULT, "json": True, **options}))
    assert not {"predicted", "actual", "error"} & set(found)
    assert re.search(f"No prediction of the live run, since this one has .*{says}", " ".join(found["plainly"]))


def test_a_second_run_in_the_same_place_shows_nothing_of_the_first(trace: Path, tmp_path: Path) -> None:
    run.run(run.Options(trace, tiers="host=1GiB", json=True, keep=tmp_path, report=tmp_path / "one.html"))
    run.run(run.Options(trace, json=True, keep=tmp_path, report=tmp_path / "two.html"))
    assert "tiers over time" in (tmp_path / "one.html").read_text()
    assert "tiers over time" not in (tmp_path / "two.html").read_text()
    assert len([path for path in tmp_path.glob("outrider-*") if path.is_dir()]) == 2


def test_calls_that_fit_no_cache_are_counted_with_what_helps(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run(run.Options(trace, json=True, keep=tmp_path))
    (journal,) = tmp_path.glob("*/outrider/agents.jsonl")
    found = run.run(run.Options(journal, profile=profiles.DEFAULT, kv_tokens=1024))
    assert found["refused"]["400"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Calls were given up: {found['refused']['400']} with status 400" in shown and "raise --kv-tokens" in shown


def test_a_journal_of_another_version_is_one_sentence(trace: Path, tmp_path: Path) -> None:
    run.run(run.Options(trace, json=True, keep=tmp_path))
    (journal,) = tmp_path.glob("*/outrider/agents.jsonl")
    whole = journal.read_text()
    journal.write_text(whole.replace('"type":"Finished"', '"type":"Zork"', 1))
    with pytest.raises(CallerError, match=r"line \d+: this version knows no such event .*Use outrider"):
        run.run(run.Options(journal, json=True))
    with pytest.raises(CallerError, match="this version knows no such event"):
        run.run(run.Options(trace, calibrate=journal, json=True))
    with pytest.raises(CallerError, match="this version knows no such event"):
        report.write(tmp_path / "r.html", report.kept(journal.parents[1]))
    journal.write_text(whole.replace('"policy":"srtf"', '"policy":"zork"', 1))
    with pytest.raises(CallerError, match="line 1: this version knows no such setting"):
        run.run(run.Options(journal, json=True))


def test_the_table_shows_both_columns(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.run(run.Options(trace, compare=True, limit=20, tiers="host=1GiB"))
    shown = capsys.readouterr()
    for words in ("fcfs, sticky", "srtf", "workflow completion", "engines busy", "Links", "Simulated: no model ran"):
        assert words in shown.out
    assert "Simulated in" in shown.err and "Simulated in" not in shown.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"profile": "h100"}, r"--profile h100: not known\. Choose one of rtxpro6000-llama-3\.1-8b"),
        ({"tiers": "host=1"}, r"tiers\.host: '1' is less than 1 MiB"),
        ({"keep": Path("/nowhere/at/all")}, r"--keep /nowhere/at/all: no such directory"),
        ({"tiers": "host=1GiB,hybrid=dax:/dev/dax0.0"}, r"tiers\.hybrid: /dev/dax0\.0 cannot be simulated"),
        ({"kv_tokens": 600}, r"--kv-tokens 600: this trace has blocks of 512 tokens"),
    ],
)
def test_mistakes_become_one_sentence(trace: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CallerError, match=says):
        run.run(run.Options(trace, json=True, **options))
