"""Quotas: for fixed shares no token goes farther than it must, by brute force; no corrupted row passes the recount."""

from itertools import pairwise, product
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.experts import Plan, contiguous_homes, plan
from outrider.experts.quotas import by_source, recount


def ways(counts: list[int], shares: list[int]) -> Any:
    """Every integer table with these row sums (sources) and column sums (holders)."""
    if not counts:
        if not any(shares):
            yield []
        return
    for row in product(*(range(min(counts[0], share) + 1) for share in shares)):
        if sum(row) == counts[0]:
            left = [share - some for share, some in zip(shares, row, strict=True)]
            for rest in ways(counts[1:], left):
                yield [row, *rest]


@st.composite
def shared(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Tokens of one expert by source; ranks that hold it and what each computes; ranks in a node."""
    ranks, size = draw(st.sampled_from([(2, 1), (3, 1), (3, 3), (4, 2), (4, 4)]))
    counts = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks))
    holders = sorted(draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=3)))
    cuts = sorted(draw(st.integers(0, sum(counts))) for _ in holders[1:])
    edges = [0, *cuts, sum(counts)]
    return counts, holders, [b - a for a, b in pairwise(edges)], size


@given(shared())
@settings(max_examples=150, deadline=None)
def test_no_token_goes_farther_than_it_must(problem: tuple[list[int], list[int], list[int], int]) -> None:
    """Tokens that leave their node, and tokens that leave their rank, are both the least there are."""
    counts, holders, shares, size = problem
    nodes = np.arange(len(counts)) // size
    rows = np.array([(0, 0, rank, tokens) for rank, tokens in zip(holders, shares, strict=True) if tokens > 0])
    table = np.array(counts, dtype=np.int64).reshape(1, -1, 1)
    quotas = by_source(table, rows.reshape(-1, 4).astype(np.int64), nodes)

    def gone(entries: Any) -> tuple[int, int]:
        away = sum(int(nodes[q] != nodes[r]) * tokens for q, r, tokens in entries)
        return away, sum(int(q != r) * tokens for q, r, tokens in entries)

    every = [
        gone([(q, holders[j], row[j]) for q, row in enumerate(way) for j in range(len(row))])
        for way in ways(counts, shares)
    ]
    mine = gone([(q, r, tokens) for _, _, q, r, tokens in quotas.tolist()])
    assert mine == (min(far for far, _ in every), min(left for _, left in every))


@st.composite
def planned(draw: st.DrawFn) -> tuple[Plan, Any, Any]:
    ranks, experts, layers = draw(st.integers(2, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.poisson(rng.pareto(1.0, (layers, 1, experts)).clip(max=50) * 3, (layers, ranks, experts))
    homes = np.tile(contiguous_homes(experts, ranks), (layers, 1))
    return plan(counts.astype(np.int64), 2), counts.astype(np.int64), homes


def lawful(rows: Any, counts: Any, homes: Any, step: Plan) -> bool:
    """The laws, in the slowest and plainest way."""
    keys = [tuple(row[:4]) for row in rows.tolist()]
    if keys != sorted(set(keys)) or any(row[4] <= 0 for row in rows.tolist()):
        return False
    left, load = counts.copy(), np.zeros((*step.most_L.shape, counts.shape[1]), dtype=np.int64)
    for layer, expert, source, rank, tokens in rows.tolist():
        inside = 0 <= layer < len(counts) and 0 <= expert < counts.shape[2] and 0 <= source < counts.shape[1]
        if not inside or not 0 <= rank < counts.shape[1]:
            return False
        if homes[layer, expert] != rank and expert not in step.replicas_LRS[layer, rank]:
            return False
        left[layer, source, expert] -= tokens
        load[layer, rank] += tokens
    return not left.any() and bool((load.max(axis=1) == step.most_L).all())


@given(planned(), st.data())
@settings(max_examples=150, deadline=None)
def test_no_corrupted_row_passes(problem: tuple[Plan, Any, Any], data: st.DataObject) -> None:
    """One number of one row is wrong, a row is lost, doubled or out of order: the recount says so.

    Another holder may compute a row's tokens without breaking a law; then, and only then, it passes.
    """
    step, counts, homes = problem
    rows = step.quotas.astype(np.int64)
    assert recount(rows, counts, homes, step.replicas_LRS, step.most_L) == -1
    assert lawful(rows, counts, homes, step)
    if not len(rows):
        return
    i = data.draw(st.integers(0, len(rows) - 1))
    for column, by in product(range(5), (-3, -1, 1, 2, 1000)):
        wrong = rows.copy()
        wrong[i, column] += by
        passes = recount(wrong, counts, homes, step.replicas_LRS, step.most_L) == -1
        assert passes == lawful(wrong, counts, homes, step)
        assert column == 3 or not passes, "only the rank may change unnoticed, to another holder"
    j = data.draw(st.integers(0, len(rows) - 1))
    swapped = rows.copy()
    swapped[[i, j]] = swapped[[j, i]]
    for wrong in (np.delete(rows, i, axis=0), np.insert(rows, i, rows[i], axis=0), *([swapped] if i != j else [])):
        assert recount(wrong, counts, homes, step.replicas_LRS, step.most_L) >= 0
    for layer in range(len(counts)):
        wrong = step.most_L.copy()
        wrong[layer] += 1
        assert recount(rows, counts, homes, step.replicas_LRS, wrong) == len(rows)
