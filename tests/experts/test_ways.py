"""Node by node: plans are valid, standing copies stand, copies inside nodes are of the node's own experts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import LawBroken
from outrider.experts.cost import LINKS, SHAPES, Cost, force_balanced_s, modelled
from outrider.experts.plan import contiguous_homes
from outrider.experts.schedule import TIERS
from outrider.experts.ways import Settled, Way, settle, through
from outrider.lab.experts_load import synthetic

COST = Cost(LINKS["nvlink"], SHAPES["olmoe-1b-7b"], row_scale=16)


@st.composite
def ways(draw: st.DrawFn) -> tuple[Way, Any, Any, int]:
    """A way, homes, a bias or none, and a seed; the last node may be smaller, a node may have no open rank."""
    ranks, per_node = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    layers, experts = draw(st.integers(1, 2)), draw(st.integers(1, 10))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    excluded = tuple(sorted(draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1))))
    open_ranks = np.setdiff1d(np.arange(ranks), excluded)
    shape = draw(st.integers(1, 3)), layers, ranks, experts
    heat = rng.pareto(1.0, (shape[0], layers, 1, experts)).clip(max=20) * rng.choice([1, 10])
    slots_R = rng.integers(0, 3, ranks)
    slots_R[list(excluded)] = 0
    way = Way(rng.poisson(heat, shape).astype(np.int64), slots_R, per_node, excluded, lambda: None)
    bias_MLR = rng.integers(-9, 9, shape[:3]) if draw(st.booleans()) else None
    return way, rng.choice(open_ranks, (layers, experts)), bias_MLR, seed


@given(ways(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 3), st.booleans(), st.sampled_from([1, 40]))
@settings(max_examples=60, deadline=None)
def test_laws(problem: Any, share: float, most: int, whole: bool, gain: int) -> None:
    way, homes_LE, bias_MLR, _ = problem
    counted, nodes_R = way.counts_MLRE, way.nodes_R
    settled = settle(way, homes_LE, share, most, COST)
    plan = through(way, settled, whole, gain, bias_MLR)
    plan.validate(counted)
    assert (plan.homes == homes_LE).all() and plan.ranks_per_node == way.ranks_per_node
    assert not np.isin(plan.quota[:, 4], way.excluded).any()
    for layer, homes_E in enumerate(homes_LE):
        standing = {(int(rank), e) for row in settled.standing_LNE[layer] for e, rank in enumerate(row) if rank >= 0}
        for m in range(len(counted)):
            copies = [
                (rank, expert)
                for rank, slots in enumerate(plan.hosts[layer, m].tolist())
                for expert in slots
                if expert >= 0 and homes_E[expert] != rank
            ]
            assert standing <= set(copies), "a standing copy is gone"
            inside = set(copies) - standing
            assert all(nodes_R[homes_E[expert]] == nodes_R[rank] for rank, expert in inside), "a copy from afar"
            assert (np.bincount([rank for rank, _ in copies], minlength=len(nodes_R)) <= way.slots_R).all()
    assert plan.digest() == through(way, settle(way, homes_LE, share, most, COST), whole, gain, bias_MLR).digest()


def specialised(layers: int = 1, micro_steps: int = 6) -> tuple[Way, Any]:
    counted = synthetic("specialised", 16, 3, layers=layers, micro_steps=micro_steps, sequences=4, tokens=512)
    seen: list[int] = []
    way = Way(counted, np.full(16, 2), 4, (), lambda: seen.append(0))
    return way, np.tile(contiguous_homes(128, 16), (layers, 1))


def test_standing_copies_keep_tokens_in_their_node() -> None:
    way, homes_LE = specialised()

    def far(share: float) -> int:
        quota = through(way, settle(way, homes_LE, share, 99, COST)).quota
        return int(quota[quota[:, 2] // 4 != quota[:, 4] // 4, 5].sum())

    none, half, all_of_them = far(0.0), far(0.5), far(1.0)
    assert all_of_them < half < none
    assert all_of_them < 0.85 * none


def test_tiers_and_steps_are_told() -> None:
    way, homes_LE = specialised(layers=2)
    calls: list[int] = []
    told = Way(way.counts_MLRE, way.slots_R, 4, (), lambda: calls.append(0))
    plan = through(told, settle(told, homes_LE, 1.0, 99, COST))
    assert len(calls) == 6, "once a micro-step, whatever the nodes"
    assert {TIERS[i] for i in plan.tiers.ravel()} == {"split"}, "copies that stand are no movement"
    plan = through(told, settle(told, homes_LE, 0.5, 99, COST))
    assert TIERS[plan.tiers[0, 0]] == "replicas"


def test_what_was_settled_for_another_load_is_refused() -> None:
    way, homes_LE = specialised()
    settled = settle(way, homes_LE, 0.5, 2, COST)
    other = Settled(homes_LE, settled.standing_LNE, settled.tokens_MLNE * 2, settled.slots_R)
    with pytest.raises(LawBroken, match="does not come out"):
        through(way, other)


@pytest.mark.slow
def test_modelled_64_ranks_keep_up_with_an_even_gate() -> None:
    """Modelled, synthetic: the first seed of bench/experts_plan.py's study, one layer, which has none to hide behind.

    Homes contiguous, half of the slots standing, links shared by copies and tokens: 1.45x static, 98 % of an even gate.
    """
    counted = synthetic("specialised", 64, 0)
    cost = Cost(LINKS["nvlink"], SHAPES["qwen3-30b-a3b"])
    way = Way(counted, np.full(64, 2), 8, (), lambda: None)
    homes_LE = contiguous_homes(128, 64)[None]
    plan = through(way, settle(way, homes_LE, 0.5, 2, cost))
    plan.validate(counted)
    static = Way(counted, np.zeros(64, dtype=np.int64), 8, (), lambda: None).walk(homes_LE)
    seconds = modelled(plan, cost).total_s
    assert modelled(static, cost).total_s / seconds >= 1.45
    assert force_balanced_s(counted, plan, cost) / seconds >= 0.98
