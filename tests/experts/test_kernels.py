"""The splitter against HiGHS on 10,000 random cases; its certificate checked by code that shares nothing with it."""

from typing import Any

import highspy
import numpy as np
import pytest

from outrider.experts import Split, split

CASES, BATCH = 10_000, 250


def case(rng: Any) -> tuple[Any, Any, Any]:
    """load_E, homes_E, replicas_RS: from idle to one expert with nearly all, copies anywhere, beside homes too."""
    experts, ranks, slots = int(rng.integers(1, 17)), int(rng.integers(1, 9)), int(rng.integers(0, 4))
    heat = rng.pareto(rng.choice([0.6, 1.5, 5.0]), experts).clip(max=1e4) * rng.choice([0.3, 3, 40])
    load = np.where(rng.random(experts) < rng.choice([0, 0.4]), 0, rng.poisson(heat))
    return load, rng.integers(0, ranks, experts), rng.integers(-1, experts, (ranks, slots))


def holders(homes: Any, replicas: Any) -> list[list[int]]:
    on: list[set[int]] = [{int(home)} for home in homes]
    for rank, row in enumerate(replicas.tolist()):
        for expert in row:
            if expert >= 0:
                on[expert].add(rank)
    return [sorted(some) for some in on]


def optima(cases: list[tuple[Any, Any, Any]]) -> Any:
    """The fractional optimum of each: one linear program over all transportation polytopes, least sum of maxima."""
    columns = len(cases)  # the first ones are the maxima
    starts, index, value, lower, upper = [0], [], [], [], []

    def row(entries: list[int], values: list[float], low: float, high: float) -> None:
        index.extend(entries)
        value.extend(values)
        starts.append(len(index))
        lower.append(low)
        upper.append(high)

    for i, (load, homes, replicas) in enumerate(cases):
        on_rank: dict[int, list[int]] = {}
        for expert, held in enumerate(holders(homes, replicas)):
            mine = list(range(columns, columns + len(held)))
            columns += len(held)
            row(mine, [1.0] * len(mine), float(load[expert]), float(load[expert]))
            for rank, column in zip(held, mine, strict=True):
                on_rank.setdefault(rank, []).append(column)
        for some in on_rank.values():
            row([*some, i], [1.0] * len(some) + [-1.0], -highspy.kHighsInf, 0.0)
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = columns, len(lower)
    program.col_cost_ = np.r_[np.ones(len(cases)), np.zeros(columns - len(cases))]
    program.col_lower_, program.col_upper_ = np.zeros(columns), np.full(columns, highspy.kHighsInf)
    program.row_lower_, program.row_upper_ = np.array(lower), np.array(upper)
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_, program.a_matrix_.index_ = np.array(starts), np.array(index)
    program.a_matrix_.value_ = np.array(value)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(program)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return np.array(solver.getSolution().col_value[: len(cases)])


def proves(load: Any, homes: Any, replicas: Any, share: Split) -> bool:
    """Tokens of X over the ranks of U leave no room below `most`, and nothing of X with tokens lives outside U."""
    inside = [e for e, flag in enumerate(share.proof_E.tolist()) if flag]
    union = {r for r, flag in enumerate(share.proof_R.tolist()) if flag}
    on = holders(homes, replicas)
    alone = all(set(on[e]) <= union for e in inside if load[e])
    return alone and len(union) > 0 and -(-sum(int(load[e]) for e in inside) // len(union)) == share.most


def achieves(load: Any, homes: Any, replicas: Any, share: Split) -> bool:
    """The split is one: all tokens, at holders, and no rank above `most`."""
    on, left, rank_load = holders(homes, replicas), load.tolist(), [0] * len(replicas)
    for expert, rank, tokens in zip(share.expert.tolist(), share.rank.tolist(), share.tokens.tolist(), strict=True):
        if rank not in on[expert] or tokens < 0:
            return False
        left[expert] -= tokens
        rank_load[rank] += tokens
    return not any(left) and max(rank_load) == share.most


@pytest.mark.parametrize("quarter", range(4))
def test_ten_thousand_cases_reach_what_highs_reaches(quarter: int) -> None:
    rng = np.random.default_rng(quarter)
    tight = 0
    for _ in range(CASES // 4 // BATCH):
        cases = [case(rng) for _ in range(BATCH)]
        for some, optimum in zip(cases, optima(cases), strict=True):
            share = split(*some)
            assert share.most == int(np.ceil(optimum - 1e-6)), (some, optimum)
            assert achieves(*some, share), some
            assert proves(*some, share), some
            tight += share.most > -(-some[0].sum() // len(some[2]))
    assert tight > CASES // 4 // 3, "most cases were easy: their limit was the mean"


def test_the_checks_can_fail() -> None:
    some = np.array([9, 3, 0]), np.array([0, 1, 1]), np.array([[-1], [0]])
    share = split(*some)
    assert achieves(*some, share) and proves(*some, share) and share.most == 6
    tokens = share.tokens.copy()
    tokens[0] -= 1
    broken = Split(share.most, share.expert, share.rank, tokens, share.proof_E, share.proof_R)
    assert not achieves(*some, broken)
    for proof_E, proof_R in (([1, 0, 0], [1, 0]), ([0, 1, 0], [0, 1]), ([0, 0, 0], [0, 0])):
        broken = Split(share.most, share.expert, share.rank, share.tokens, np.array(proof_E), np.array(proof_R))
        assert not proves(*some, broken)
