"""The splitter against two oracles that share no code with it: Hall's bound over all subsets, and brute force."""

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import Split, split

Instance = tuple[Any, Any, Any]


@st.composite
def instances(draw: st.DrawFn, experts: int = 6, ranks: int = 4, most: int = 30) -> Instance:
    n, r = draw(st.integers(1, experts)), draw(st.integers(1, ranks))
    load = draw(st.lists(st.integers(0, most), min_size=n, max_size=n))
    homes = draw(st.lists(st.integers(0, r - 1), min_size=n, max_size=n))
    slots = draw(st.integers(0, 3))
    row = st.lists(st.integers(-1, n - 1), min_size=slots, max_size=slots)
    replicas = draw(st.lists(row, min_size=r, max_size=r))
    return np.array(load), np.array(homes), np.array(replicas, dtype=np.int64).reshape(r, slots)


def holders_of(instance: Instance) -> list[list[int]]:
    load, homes, replicas = instance
    return [sorted({int(homes[e]), *np.nonzero(replicas == e)[0].tolist()}) for e in range(len(load))]


def hall_bound(instance: Instance) -> int:
    """max over expert sets of ceil(tokens / ranks that hold any of them)."""
    load, holders = instance[0], holders_of(instance)
    bounds = [0]
    for size in range(1, len(load) + 1):
        for some in combinations(range(len(load)), size):
            ranks = {r for e in some for r in holders[e]}
            bounds.append(-(-int(load[list(some)].sum()) // len(ranks)))
    return max(bounds)


def check(instance: Instance, share: Split) -> None:
    load, _, replicas = instance
    holders = holders_of(instance)
    ranks = len(replicas)
    entries = list(zip(share.expert.tolist(), share.rank.tolist(), strict=True))
    assert entries == sorted((e, r) for e, held in enumerate(holders) for r in held)
    assert (share.tokens >= 0).all()
    assert (np.bincount(share.expert, share.tokens, len(load)) == load).all()
    assert np.bincount(share.rank, share.tokens, ranks).max() == share.most
    some = np.flatnonzero(share.proof_E)
    union = sorted({r for e in some for r in holders[e]})
    assert all(share.proof_R[r] for r in union)
    assert share.most == 0 or load[some].sum() > (share.most - 1) * len(union), "the certificate proves nothing"


@given(instances())
@settings(max_examples=400, deadline=None)
def test_split_reaches_halls_bound_and_proves_it(instance: Instance) -> None:
    share = split(*instance)
    assert share.most == hall_bound(instance)
    check(instance, share)


@given(instances(experts=3, ranks=3, most=4))
@settings(max_examples=100, deadline=None)
def test_split_equals_brute_force(instance: Instance) -> None:
    load, _, replicas = instance
    ways = []
    for e, held in enumerate(holders_of(instance)):
        splits = [s for s in product(range(int(load[e]) + 1), repeat=len(held)) if sum(s) == load[e]]
        ways.append([np.bincount(held, weights=s, minlength=len(replicas)) for s in splits])
    best = min(int(sum(way).max()) for way in product(*ways))  # type: ignore[attr-defined]
    assert split(*instance).most == best


def test_a_chain_of_ranks_balances() -> None:
    """Rank r may hand its expert on to r + 1 only: the excess of rank 0 reaches rank 7 through all of them."""
    load = np.array([16, 8, 8, 8, 8, 8, 8, 0])
    replicas = np.array([[-1], [0], [1], [2], [3], [4], [5], [6]])
    share = split(load, np.arange(8), replicas)
    assert share.most == 8
    assert np.bincount(share.rank, share.tokens).tolist() == [8] * 8


def test_large_instances_are_certified() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        load = (rng.pareto(1.2, 64) * 50).astype(np.int64)
        instance = (load, np.sort(np.arange(64) % 16), rng.integers(-1, 64, (16, 2)))
        check(instance, split(*instance))


@pytest.mark.parametrize(
    ("load", "homes", "replicas"),
    [
        ([2**31, 9], [0, 1], [[1], [0]]),
        ([-1, 9], [0, 1], [[1], [0]]),
        ([3, 9], [0, 2], [[1], [0]]),
        ([3, 9], [0, 1], [[2], [0]]),
        ([3, 9], [0, 1], [[-2], [0]]),
        ([3, 9], [0, 1, 1], [[1], [0]]),
        ([3, 9], [0, 1], [1, 0]),
    ],
)
def test_what_does_not_fit_is_refused(load: list[int], homes: list[int], replicas: list[Any]) -> None:
    with pytest.raises(CallerError, match="split: "):
        split(np.array(load), np.array(homes), np.array(replicas))
