"""The RL step from outside: start the ranks, wait, put their results together. Called by the demo and by tests.

Ranks are child processes on gloo, one thread each. None outlives the call: not on Ctrl-C, not when another rank dies,
not when the caller is killed (`lab/processes.py`).
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError, WorldError
from outrider.lab.processes import Child, Children
from outrider.lab.rl.rollouts import Rollout, save

Floats = np.ndarray[Any, np.dtype[Any]]
SAID_WRONG = 2  # a rank's exit code for a CallerError, which is its last line
START_S = 60.0  # to import torch and read the model on a busy machine


class Arm(msgspec.Struct, frozen=True):
    """One run of the step. slots 0: nothing is balanced. journal: directory, or None."""

    name: str
    slots: int
    journal: str | None


class Job(msgspec.Struct, frozen=True):
    """What all ranks are told. `directory` holds rollouts.npz and takes the results, ARM.RANK.npz."""

    model: str
    dtype: str
    ranks: int
    arms: tuple[Arm, ...]
    micro_batch_tokens: int
    timeout_s: float
    directory: str


class StepResult(msgspec.Struct, frozen=True, eq=False):
    """What one RL step did.

    gradients         by Hugging Face parameter name, home layout (all experts), fp32
    max_over_mean_ML  largest over mean rank load of token-slots really computed; recompute micro-steps, then update
    bytes_moved       expert weights and gradients between ranks; tokens not counted
    unforeseen        token-slots that came without being foreseen; absent: foreseen, but never came
    """

    loss: float
    gradients: dict[str, Floats]
    max_over_mean_ML: Floats
    bytes_moved: int
    copies_moved: int
    unforeseen: int
    absent: int
    micro_steps: int
    tokens: int
    seconds: float

    @property
    def mismatches(self) -> int:
        return self.unforeseen + self.absent


def run(
    model: str,
    rollouts: Sequence[Rollout],
    ranks: int = 2,
    slots: int = 2,
    balanced: bool = True,
    journal_dir: Path | None = None,
    micro_batch_tokens: int = 512,
    dtype: str = "float32",
    timeout_s: float = 120.0,
) -> StepResult:
    """One RL step of `model` (a name that the embedded engine knows, or a directory) on fresh ranks.

    slots               spare expert slots per rank and layer; unused when `balanced` is False
    journal_dir         existing directory for experts.RANK.jsonl
    micro_batch_tokens  per rank
    timeout_s           for one exchange between ranks; the whole, start apart, may take five times as long
    Raises CallerError for input that cannot work, WorldError when a rank died or the time was up.
    """
    arm = _arm("balanced", slots, journal_dir) if balanced else _arm("static", 0, journal_dir)
    return run_arms([arm], model, rollouts, ranks, micro_batch_tokens, dtype, timeout_s)[0]


def compare(
    model: str,
    rollouts: Sequence[Rollout],
    ranks: int = 2,
    slots: int = 2,
    journal_dir: Path | None = None,
    micro_batch_tokens: int = 512,
    dtype: str = "float32",
    timeout_s: float = 120.0,
) -> dict[str, float]:
    """The same step unbalanced and balanced, in the same ranks: the demo's `experts` figures.

    `gradient_difference` = max |a - b| / max |b| over all parameters, b unbalanced. `max_over_mean_*` are means over
    micro-steps and layers. The unbalanced arm's journals go to journal_dir/static, the balanced one's to journal_dir.
    """
    static_dir = journal_dir and journal_dir / "static"
    if static_dir:
        static_dir.mkdir(exist_ok=True)
    arms = [_arm("static", 0, static_dir), _arm("balanced", slots, journal_dir)]
    static, balanced = run_arms(arms, model, rollouts, ranks, micro_batch_tokens, dtype, timeout_s)
    return {
        "loss_static": static.loss,
        "loss_balanced": balanced.loss,
        "loss_difference": abs(static.loss - balanced.loss),
        "gradient_difference": gradient_difference(balanced.gradients, static.gradients),
        "max_over_mean_static": float(static.max_over_mean_ML.mean()),
        "max_over_mean_balanced": float(balanced.max_over_mean_ML.mean()),
        "bytes_moved": balanced.bytes_moved,
        "copies_moved": balanced.copies_moved,
        "micro_steps": balanced.micro_steps,
        "tokens": balanced.tokens,
        "mismatches": balanced.mismatches,
        "seconds_static": static.seconds,
        "seconds_balanced": balanced.seconds,
    }


def gradient_difference(a: dict[str, Floats], b: dict[str, Floats]) -> float:
    """max |a - b| over all parameters / max |b| over all parameters; both must name the same parameters."""
    if a.keys() != b.keys():
        raise CallerError(f"gradients: {sorted(a.keys() ^ b.keys())} are on one side only. Compare the same model.")
    return max(float(np.abs(a[n] - b[n]).max()) for n in b) / max(float(np.abs(b[n]).max()) for n in b)


def run_arms(
    arms: Sequence[Arm],
    model: str,
    rollouts: Sequence[Rollout],
    ranks: int = 2,
    micro_batch_tokens: int = 512,
    dtype: str = "float32",
    timeout_s: float = 120.0,
) -> list[StepResult]:
    """Several arms, one after another in the same ranks; weights are the same for each. Errors as `run`."""
    if not rollouts or any(len(r.prompt) < 1 or len(r.output) < 1 for r in rollouts):
        raise CallerError("rollouts: every sequence needs a prompt and an output token. Leave empty answers out.")
    if ranks < 1 or micro_batch_tokens < 1:
        raise CallerError(f"ranks {ranks}, micro_batch_tokens {micro_batch_tokens}: both must be 1 or more.")
    with tempfile.TemporaryDirectory(prefix="outrider-rl-") as name:
        directory = Path(name)
        save(directory / "rollouts.npz", rollouts)
        job = Job(model, dtype, ranks, tuple(arms), micro_batch_tokens, timeout_s, name)
        (directory / "job.json").write_bytes(msgspec.json.encode(job))
        with Children(directory) as children:
            started = [children.start(f"rank {rank}", _command(directory, rank)) for rank in range(ranks)]
            _await_all(started, START_S + 5 * timeout_s)
        return [_gather(directory, arm.name, ranks) for arm in arms]


def _arm(name: str, slots: int, journal_dir: Path | None) -> Arm:
    return Arm(name, slots, str(journal_dir) if journal_dir else None)


def _command(directory: Path, rank: int) -> list[str]:
    return [sys.executable, "-m", "outrider.lab.rl.rank", str(directory / "job.json"), str(rank)]


def _await_all(ranks: Sequence[Child], within_s: float) -> None:
    """Return when every rank ended well; WorldError as soon as one did not, or when the time is up."""
    by_s = time.monotonic() + within_s
    while any(rank.running for rank in ranks):
        _raise_on_failure(ranks)
        if time.monotonic() > by_s:
            raise WorldError(f"RL step: not done after {within_s:.0f} s. Give fewer rollouts, or a longer timeout_s.")
        time.sleep(0.02)
    _raise_on_failure(ranks)


def _raise_on_failure(ranks: Sequence[Child]) -> None:
    """Blame the rank that was killed before those that only lost it."""
    failed = [(code, rank) for rank in ranks if (code := rank.process.poll())]
    if not failed:
        return
    code, rank = min(failed, key=lambda one: one[0])
    if code == SAID_WRONG:
        raise CallerError(rank.last_words(1))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    raise WorldError(
        f"RL step: {rank.name} of {len(ranks)} {how}; the other ranks were stopped, no weight was changed."
        f" Run it again. Its last words: {rank.last_words()}"
    )


def _gather(directory: Path, arm: str, ranks: int) -> StepResult:
    """Experts from their homes, everything else from rank 0."""
    parts: list[dict[str, Floats]] = []
    for rank in range(ranks):
        with np.load(directory / f"{arm}.{rank}.npz", allow_pickle=False) as saved:
            parts.append({name: saved[name] for name in saved.files})
    first = parts[0]
    gradients = {
        name.removeprefix("gradient:"): np.concatenate([part[name] for part in parts]) if ".experts." in name else value
        for name, value in first.items()
        if name.startswith("gradient:")
    }
    load = first["computed_MLR"]
    return StepResult(
        loss=float(first["loss"]),
        gradients=gradients,
        max_over_mean_ML=load.max(axis=2) / np.maximum(load.mean(axis=2), 1.0 / ranks),
        bytes_moved=sum(int(part["sent_bytes"]) for part in parts),
        copies_moved=int(first["copies_moved"]),
        unforeseen=int(first["unforeseen"]),
        absent=int(first["absent"]),
        micro_steps=load.shape[0],
        tokens=int(first["tokens"]),
        seconds=max(float(part["seconds"]) for part in parts),
    )
