"""`outrider experts`: JSON alone on stdout, one sentence on errors and exit code 2, plans that recount, plain words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from outrider.experts.adapters import plans

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 tokens, 2 layers, top-2 of 8; two experts of the first rank have most of the tokens."""
    rng = np.random.default_rng(0)
    waits = rng.exponential(1, (2, 512, 8)) / np.array([9, 9, 1, 1, 1, 1, 1, 1])
    path = tmp_path_factory.mktemp("routes") / "routing.npz"
    ids = np.argsort(waits, axis=2)[:, :, :2].astype(np.int16)
    np.savez(path, all_ids=ids, all_seq_offsets=np.arange(0, 513, 64))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from outrider.cli import main; main()", "experts", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_json_is_all_of_stdout_and_the_plan_recounts(routes: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.npz"
    done = run("plan", routes, "--ep", "4", "--nodes", "2", "--microbatch-tokens", "128", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    plan = plans.load(out)
    assert plan.digest() == result["digest"]
    load = np.zeros(plan.hosts.shape[:3], dtype=int)
    for layer, m, _, _, rank, tokens in np.load(out)["quota"].tolist():
        load[layer, m, rank] += tokens
    assert result["imbalance"]["max"] == load.max() / (128 * 2 / 4)
    again = run("plan", routes, "--ep", "4", "--nodes", "2", "--microbatch-tokens", "128", "--json")
    assert json.loads(again.stdout)["digest"] == result["digest"]


def test_a_person_reads_a_table_and_an_explanation(routes: Path) -> None:
    done = run("plan", routes, "--ep", "4", "--microbatch-seqs", "2", "--explain", "1,0")
    assert done.returncode == 0, done.stderr
    assert "largest / least that integers allow" in done.stdout
    assert "Layer 1, micro-step 0: 256 token-slots on 4 ranks" in done.stdout


def test_the_doctor_answers_both_ways(routes: Path, tmp_path: Path) -> None:
    hot = run("doctor", routes, "--ep", "4", "--microbatch-seqs", "2", "--row-scale", "256")
    assert hot.returncode == 0, hot.stderr
    assert "Balancing pays" in hot.stdout and "modelled" in hot.stdout
    ids = np.stack([np.arange(512) % 8, (np.arange(512) + 4) % 8], axis=1)
    np.savez(tmp_path / "even.npz", all_ids=np.stack([ids, ids]).astype(np.int16), all_seq_offsets=[0, 512])
    even = run("doctor", tmp_path / "even.npz", "--ep", "4", "--microbatch-tokens", "128", "--json")
    advice = json.loads(even.stdout)
    assert advice["slots"] == 0
    assert any("does not pay" in words for words in advice["words"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ep", "4", "--nodes", "3", "--microbatch-tokens", "128"], "divide"),
        (["--ep", "4", "--microbatch-tokens", "4096"], "no whole one"),
        (["--ep", "4"], "micro-batches"),
        (["--ep", "4", "--microbatch-tokens", "128", "--planner", "magic"], "magic"),
        (["--ep", "4", "--microbatch-tokens", "128", "--explain", "one"], "LAYER,MICROSTEP"),
        (["--ep", "4", "--microbatch-tokens", "128", "--out", "/nowhere/plan.npz"], "/nowhere/plan.npz"),
    ],
)
def test_an_error_is_one_sentence(routes: Path, arguments: list[str], words: str) -> None:
    done = run("plan", routes, *arguments, "--json")
    assert done.returncode == 2
    assert done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0
