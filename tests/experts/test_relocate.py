"""New homes: fewer waits, the same number of experts on every rank, and none when the step is like the last."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.experts import contiguous_homes
from outrider.experts.relocate import HYSTERESIS, relocate


@st.composite
def steps(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """load_ME, homes_E, domains_R"""
    domains, each = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    experts = draw(st.integers(1, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.poisson(rng.pareto(1.0, (draw(st.integers(1, 5)), experts)).clip(max=100) * 10).astype(np.int64)
    ranks = domains * each
    return load, rng.integers(0, ranks, experts), np.arange(ranks) // each


def waits(load: Any, homes: Any, domains: Any) -> int:
    """Sum over micro-steps of the fullest domain."""
    return int(sum(np.bincount(domains[homes], row, domains.max() + 1).max() for row in load))


@given(steps())
@settings(max_examples=150, deadline=None)
def test_laws(problem: tuple[Any, Any, Any]) -> None:
    load, homes, domains = problem
    given_homes = homes.copy()
    first = relocate(load, homes, domains, HYSTERESIS)
    assert (homes == given_homes).all(), "the caller's homes were changed"
    assert (np.bincount(first, minlength=len(domains)) == np.bincount(homes, minlength=len(domains))).all()
    gained = waits(load, homes, domains) - waits(load, first, domains)
    moved = int((first != homes).sum())
    enough = HYSTERESIS * load.sum() / (domains.max() + 1) / len(load)
    assert gained >= 0
    assert moved == 0 or gained > enough, "moved for less than the hysteresis"
    assert (first == relocate(load.copy(order="F").copy(), homes, domains, HYSTERESIS)).all()


@given(steps())
@settings(max_examples=60, deadline=None)
def test_the_same_step_again_moves_nothing(problem: tuple[Any, Any, Any]) -> None:
    load, homes, domains = problem
    first = relocate(load, homes, domains, HYSTERESIS)
    again = relocate(load, first, domains, HYSTERESIS)
    left = int((again != first).sum())
    if len(load) <= 1 or left == 0:  # the number of exchanges is bounded, so that a long search may go on
        assert left == 0


def test_a_step_much_like_the_last_moves_little() -> None:
    """Loads that differ by sampling alone: of what the first step moved, less than a third moves again."""
    first, again = 0, 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        popular = rng.lognormal(0, 0.8, 64)
        last, now = (rng.poisson(popular * 2000, (32, 64)).astype(np.int64) for _ in range(2))
        homes = relocate(last, contiguous_homes(64, 8), np.arange(8), HYSTERESIS)
        first += int((homes != contiguous_homes(64, 8)).sum())
        again += int((relocate(now, homes, np.arange(8), HYSTERESIS) != homes).sum())
    assert first > 60
    assert again < first / 3


def test_two_hot_experts_of_one_rank_part() -> None:
    load = np.array([[9, 9, 1, 1]])
    assert relocate(load, np.array([0, 0, 1, 1]), np.arange(2), HYSTERESIS).tolist() == [1, 0, 0, 1]
