"""Law 6 on a real model: the step on two ranks, balanced, equals the unbalanced one and the one without any ranks."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outrider import journal
from outrider.errors import CallerError
from outrider.experts import Policy, Settings
from outrider.experts.events import Event
from outrider.lab.rl import step
from outrider.lab.rl.rollouts import Rollout

TOLERANCE = 1e-4  # fp32; measured: 3e-7

Arms = tuple[step.StepResult, step.StepResult]


def test_balanced_equals_unbalanced(arms: Arms) -> None:
    static, balanced = arms
    assert abs(static.loss - balanced.loss) <= TOLERANCE * abs(static.loss)
    assert abs(static.loss) > 1e-3, "a loss of nothing proves nothing"
    assert step.gradient_difference(balanced.gradients, static.gradients) <= TOLERANCE


def test_both_equal_one_process(arms: Arms, single: Any, rollouts: list[Rollout]) -> None:
    loss, gradients = single(rollouts)
    for result in arms:
        assert abs(result.loss - loss) <= TOLERANCE * abs(loss)
        assert step.gradient_difference(result.gradients, gradients) <= TOLERANCE
        for name, gradient in gradients.items():  # also each on its own scale: a lost small one must not hide
            scale = np.abs(gradient).max()
            assert scale > 0, f"{name}: the reference has no gradient"
            assert np.abs(result.gradients[name] - gradient).max() <= 1e-3 * scale, name


def test_the_load_is_balanced_and_bytes_are_what_the_plan_moved(arms: Arms, tiny_moe: Any) -> None:
    static, balanced = arms
    assert static.max_over_mean_ML.shape == (static.micro_steps, 4)
    assert static.max_over_mean_ML.mean() > 1.05
    assert balanced.max_over_mean_ML.mean() < 1.03
    assert (static.copies_moved, static.bytes_moved) == (0, 0)
    assert balanced.copies_moved > 0
    layer = tiny_moe.model.layers[0].mlp.experts
    expert_bytes = 4 * (layer.gate_up_proj[0].numel() + layer.down_proj[0].numel())
    hops, rest = divmod(balanced.bytes_moved, expert_bytes)
    assert rest == 0
    assert balanced.copies_moved < hops <= 2 * balanced.copies_moved  # weights out; gradients back, if it was in use


def test_what_was_not_recorded_is_counted_and_nothing_else(arms: Arms, rollouts: list[Rollout]) -> None:
    """Rows of -1 were routed live and computed at home, as exactly as the rest: the tests above include them."""
    missing = sum(int((r.routes[:-1] < 0).any(axis=-1).sum()) for r in rollouts)
    assert missing == 2 * (4 + 1 + 1)
    for result in arms:
        assert result.unforeseen == 2 * 4 * missing  # both passes, top 4
        assert result.absent == 0
        assert result.tokens == sum(len(r.tokens) - 1 for r in rollouts)
        assert result.micro_steps == 2 * 4


@pytest.mark.parametrize("arm", ["static", "."])
def test_journals_replay_and_are_the_same_on_both_ranks(arms: Arms, journal_dir: Path, arm: str) -> None:
    folder = journal_dir / arm
    contents = []
    for rank in range(2):
        path = folder / f"experts.{rank}.jsonl"
        agreed, difference = journal.replay(path, Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
        assert difference is None
        assert agreed == 1 + 2 * arms[0].micro_steps + 1  # Foreseen, Began and Ran, Finished
        header, lines = journal.read(path)
        assert (header.policy, header.rank) == ("experts", rank)
        contents.append([(line.now, bytes(line.event), bytes(line.commands)) for line in lines])
    assert contents[0] == contents[1]


def test_a_changed_journal_is_found_out(arms: Arms, journal_dir: Path, tmp_path: Path) -> None:
    """Byte for byte: one token fewer in the first Tally-free plan is seen."""
    source = journal_dir / "experts.0.jsonl"
    lines = source.read_bytes().split(b"\n")
    at = next(i for i, line in enumerate(lines) if b'"Carry"' in line)
    lines[at] = lines[at].replace(b'"Carry"', b'"Use"')
    forged = tmp_path / "experts.0.jsonl"
    forged.write_bytes(b"\n".join(lines))
    forged.with_suffix(".arrays").symlink_to(source.with_suffix(".arrays"))
    agreed, difference = journal.replay(forged, Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
    assert difference is not None
    assert (difference.line, agreed) == (at + 1, at - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": []}, "output token"),
        ({"ranks": 0}, "ranks 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    rollouts: list[Rollout], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CallerError, match=message):
        step.run("tiny-moe", **{"rollouts": rollouts, **change})


def test_a_model_that_is_none_is_the_callers_fault(rollouts: list[Rollout], tmp_path: Path) -> None:
    with pytest.raises(CallerError, match=r"nowhere: no such directory"):
        step.run(str(tmp_path / "nowhere"), rollouts)
