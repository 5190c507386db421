"""From what an engine answered to the table that the step reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.lab.rl.rollouts import Rollout, advantages, from_choice, load, pack, readable, save


def rollout(prompt: int, output: int, group: int = 0, reward: float = 0.0) -> Rollout:
    routes = np.arange((prompt + output) * 4, dtype=np.int16).reshape(-1, 2, 2)
    return Rollout(tuple(range(prompt)), tuple(range(output)), routes, group, reward)


def test_a_choice_with_and_without_the_last_row() -> None:
    rows = np.arange(20).reshape(5, 2, 2).tolist()
    whole = from_choice((1, 2, 3), (4, 5), {"prompt_routed_experts": rows[:3], "routed_experts": rows[3:]}, 0, 1.0)
    assert whole.routes.tolist() == rows
    short = from_choice((1, 2, 3), (4, 5), {"prompt_routed_experts": rows[:3], "routed_experts": rows[3:4]}, 0, 1.0)
    assert short.routes[:4].tolist() == rows[:4]
    assert (short.routes[4] == -1).all()
    only = from_choice((1, 2, 3), (4,), {"prompt_routed_experts": rows[:3]}, 0, 1.0)
    assert (only.routes[3] == -1).all()


@pytest.mark.parametrize("choice", [{}, {"prompt_routed_experts": [[[0]]] * 2}, {"prompt_routed_experts": None}])
def test_routes_of_another_answer_are_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(CallerError, match="return_routed_experts"):
        from_choice((1, 2, 3), (4,), choice, 0, 0.0)


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = [rollout(3, 2, 1, 0.5), rollout(1, 4, 2, 0.25)]
    save(tmp_path / "r.npz", before)
    for a, b in zip(before, load(tmp_path / "r.npz"), strict=True):
        assert (a.prompt, a.output, a.group, a.reward) == (b.prompt, b.output, b.group, b.reward)
        assert (a.routes == b.routes).all()
        assert b.routes.dtype == np.int16


def test_advantages_are_relative_to_the_group() -> None:
    result = advantages([rollout(1, 1, 0, 1.0), rollout(1, 1, 7, 5.0), rollout(1, 1, 0, 3.0)])
    assert np.allclose(result, [-1, 0, 1], atol=1e-3)  # a group of one has no peers


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 4), st.integers(1, 60))
def test_packing_loses_nothing_and_keeps_the_budget(lengths: list[int], ranks: int, budget: int) -> None:
    packed = pack(lengths, ranks, budget)
    assert sorted(i for by_rank in packed for mine in by_rank for i in mine) == list(range(len(lengths)))
    for by_rank in packed:
        assert len(by_rank) == ranks
        assert all(sum(lengths[i] for i in mine) <= budget or len(mine) == 1 for mine in by_rank)
        assert by_rank[0], "no micro-batch is empty"


def test_the_reward_reads_the_text() -> None:
    assert readable("plain words 12") == 1.0
    assert readable("a\n\u00e9;") == 0.25
    assert readable("") == 0.0
