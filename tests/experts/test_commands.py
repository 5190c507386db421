"""`outrider experts`: JSON alone on stdout, one sentence on errors and exit code 2, plans that recount, plain words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from outrider.errors import CallerError
from outrider.experts.adapters import plans
from outrider.experts.commands import app

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


def run(*arguments: str | Path, before: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; before: Python that runs first; more: environment variables."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\nfrom outrider.cli import main; main()", "experts", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"} | more,
    )


def refused(*arguments: str | Path) -> str:
    """What a command says that will not begin."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(done.exception, CallerError), (done.exception, done.output)
    assert done.stdout == "" and "\n" not in str(done.exception)
    return str(done.exception)


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
    some = ("plan", routes, "--ep", "4", "--microbatch-seqs", "2", "--exclude", "1", "--json", "--explain", "1,0")
    without, again = (json.loads(run(*some, *more).stdout) for more in ([], ["--exclude", "1"]))
    assert without["digest"] == again["digest"] and without["over_bound"] == again["over_bound"]
    assert without["relocated_experts"] == without["tiers"]["relocation"] == 0
    assert "256 token-slots on 3 ranks" in without["explain"] and "even shares would be 86" in without["explain"]


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
        (["--ep", "4", "--microbatch-tokens", "128", "--explain", "99,0"], "Count from 0"),
        (["--ep", "4", "--microbatch-tokens", "128", "--out", "/nowhere/plan.npz"], "/nowhere/plan.npz"),
    ],
)
def test_an_error_is_one_sentence(routes: Path, arguments: list[str], words: str) -> None:
    done = run("plan", routes, *arguments, "--json")
    assert done.returncode == 2
    assert done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_plot_is_the_same_in_every_process_and_its_numbers_are_in_the_json(routes: Path, tmp_path: Path) -> None:
    asked = ("plan", routes, "--ep", "4", "--microbatch-tokens", "128", "--json", "--plot")
    one = run(*asked, tmp_path / "one.svg", PYTHONHASHSEED="1")
    two = CliRunner().invoke(app, [*map(str, asked), str(tmp_path / "two.svg")])
    assert (one.returncode, one.stderr, two.exit_code) == (0, "", 0), two.output
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    front = json.loads(one.stdout)["front"]
    assert front == json.loads(two.stdout)["front"]
    mine = next(point for point in front if point["asked"])
    assert mine["imbalance"] == json.loads(one.stdout)["imbalance"]["mean"]
    assert mine["bytes_moved"] == json.loads(one.stdout)["bytes_moved"]


def test_what_cannot_be_written_is_said_before_the_file_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "routing.npz"  # were it read first, the message would be about it
    (tmp_path / "folder.png").mkdir()
    kept = tmp_path / "kept.svg"
    kept.write_text("mine")
    for name, words in (
        ("plan.jpg", ".png, .svg and .pdf"),
        ("nowhere/plan.png", "No such file"),
        ("folder.png", "Is a directory"),
    ):
        assert words in refused("plan", missing, "--ep", "4", "--plot", tmp_path / name)
    assert "No such file" in refused("bench", "--links-out", tmp_path / "nowhere" / "links.toml")
    assert "routing.npz" in refused("plan", missing, "--ep", "4", "--plot", kept, "--out", tmp_path / "plan.npz")
    assert kept.read_text() == "mine" and not (tmp_path / "plan.npz").exists(), "a plan that failed leaves things as is"


def test_without_matplotlib_the_way_out_is_named(routes: Path, tmp_path: Path) -> None:
    before = "import sys; sys.modules['matplotlib'] = None"  # as if it were not installed
    done = run("plan", routes, "--ep", "4", "--plot", tmp_path / "plan.png", before=before)
    assert done.returncode == 2
    assert done.stderr == "outrider: --plot: matplotlib is not installed. Run: pip install 'outrider[plots]'\n"


def test_a_layer_that_is_not_there(routes: Path, tmp_path: Path) -> None:
    asked = ("plan", routes, "--ep", "4", "--microbatch-tokens", "128", "--plot", tmp_path / "plan.png")
    assert "2 layers" in refused(*asked, "--plot-layer", "2")
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experts", "4", "--top-k", "2", "FILE"], "--experts, --top-k"),
        (["--domain", "maths"], "made-up routes have none"),
        (["--links-out", "links.toml", "--ranks-live", "0"], "--ranks-live 0"),
        (["--regime", "wild"], "mild, skewed, specialised"),
        (["--tokens", "4096", "FILE"], "no whole one"),
    ],
)
def test_a_bench_that_makes_no_sense(routes: Path, arguments: list[str], words: str) -> None:
    assert words in refused("bench", *(routes if word == "FILE" else word for word in arguments))


def test_a_bench_names_the_machine_and_says_what_it_did_not_measure(routes: Path) -> None:
    asked = ("bench", routes, "--ep", "4", "--tokens", "64", "--model", "512x256", "--ranks-live", "0")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, asked)])
    assert done.exit_code == 0, done.output
    for words in ("Measured on", "8 micro-steps of 64 tokens", "foresight", "eplb-oracle", "memcpy"):
        assert words in done.stdout, words
    assert "not measured: links were left out by --ranks-live 0." in done.stdout
