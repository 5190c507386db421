"""`outrider.experts.balance`: four model families on two ranks against the stock models; the examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
from started import run_ranks

from outrider import journal
from outrider.experts import Policy, Settings
from outrider.experts.events import Event

SCRIPT = Path(__file__).with_name("huggingface_ranks.py")
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_balanced_models_train_as_the_stock_models_do(tmp_path: Path) -> None:
    said = run_ranks(tmp_path, SCRIPT, 2)
    assert "comparisons, worst" in said[0]
    lines = []
    for rank in range(2):
        path = tmp_path / f"experts.{rank}.jsonl"
        agreed, difference = journal.replay(path, Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
        assert difference is None
        assert agreed == 3 * (2 * 2 + 1)  # steps: a Gated for each layer and micro-step, once, though computed twice
        lines.append([(line.now, bytes(line.event), bytes(line.commands)) for line in journal.read(path)[1]])
    assert lines[0] == lines[1]


def ran(example: str) -> str:
    """What it printed, under torchrun."""
    path = EXAMPLES / example
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(path)],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_example_trains_and_is_short() -> None:
    said = ran("train_balanced.py")
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", said)]
    assert losses[-1] < losses[0] / 2
    assert all(float(load) <= 1.02 for load in re.findall(r"rank ([0-9.]+)", said))
    moved = re.search(r"(\d+) copies", said)
    assert moved is not None
    assert int(moved[1]) > 0


def test_the_example_in_rls_shape_learns_on_even_ranks() -> None:
    said = ran("train_foreseen.py")
    rewards = [float(reward) for reward in re.findall(r"reward ([0-9.]+)", said)]
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.8
    loads = [[int(load) for load in pair] for pair in re.findall(r"by rank \[(\d+) (\d+)\]", said)]
    assert len(loads) == len(rewards)
    assert all(abs(a - b) <= 2 for a, b in loads), loads  # two layers, each as even as integers allow
