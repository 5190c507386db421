"""Figures of a plan equal those that anyone recounts from PLAN.npz with a few lines of plain Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.experts import contiguous_homes
from outrider.experts.adapters import plans
from outrider.experts.cost import SHAPES, Cost, Links
from outrider.experts.peers import make
from outrider.experts.schedule import StepPlan, assemble
from outrider.experts.score import score, seconds, summary
from outrider.experts.search import search

M, L, R, E = 5, 3, 4, 12


def counts() -> Any:
    rng = np.random.default_rng(4)
    table = rng.poisson(rng.pareto(1.0, (M, L, 1, E)).clip(max=20) * 9, (M, L, R, E)).astype(np.int64)
    table[2, 1] = 0  # an idle layer of one micro-step
    return table


def plan_of(name: str, table: Any) -> StepPlan:
    if name == "foresight":
        return search(table, 2, ranks_per_node=2)
    peer = make(name, table, np.full(R, 2), 2)
    steps = [peer.step(m) for m in range(len(table))]
    return assemble(name, peer.homes_LE, [h for h, _ in steps], [rows for _, rows in steps], ranks_per_node=2)


def recounted(path: Path, table: Any) -> dict[str, Any]:
    """From the arrays of the file and the counts alone."""
    file = np.load(path)
    hosts, quota = file["hosts"].tolist(), file["quota"].tolist()
    imbalance, over_bound, copies = [], [], 0
    load: dict[tuple[int, int], list[int]] = {}
    for layer, m, _, _, rank, tokens in quota:
        load.setdefault((layer, m), [0] * R)[rank] += tokens
    home = [set(np.flatnonzero(contiguous_homes(E, R) == rank).tolist()) for rank in range(R)]
    for layer in range(L):
        before = home
        for m in range(M):
            mine = load.get((layer, m), [0] * R)
            total = int(table[m, layer].sum())
            imbalance.append(max(mine) / (total / R) if total else 1.0)
            over_bound.append(max(mine) / -(-total // R) if total else 1.0)
            now = [set(slots) - {-1} for slots in hosts[layer][m]]
            copies += sum(len(now[rank] - before[rank]) for rank in range(R))
            before = now
    return {"imbalance": imbalance, "over_bound": over_bound, "copies_moved": copies}


@pytest.mark.parametrize("name", ["foresight", "static", "eplb", "eplb-oracle", "split", "llep-like", "force-balanced"])
def test_anyone_counts_the_same(name: str, tmp_path: Path) -> None:
    table = counts()
    plan = plan_of(name, table)
    plan.validate(table)
    plans.save(plan, tmp_path / "plan.npz")
    mine, theirs = score(plan, table), recounted(tmp_path / "plan.npz", table)
    for key in ("imbalance", "over_bound"):
        values = sorted(theirs[key])
        assert mine[key]["mean"] == pytest.approx(sum(values) / len(values))
        assert mine[key]["max"] == pytest.approx(values[-1])
        assert mine[key]["p50"] == pytest.approx(float(np.percentile(values, 50)))
        assert mine[key]["p95"] == pytest.approx(float(np.percentile(values, 95)))
    assert mine["copies_moved"] == theirs["copies_moved"]
    assert mine["copies_per_layer_microstep"] == pytest.approx(theirs["copies_moved"] / L / M)
    assert sum(mine["tiers"].values()) == L * M
    assert mine["digest"] == plan.digest()
    cost = Cost(Links(1e9, 1e8), SHAPES["olmoe-1b-7b"])
    assert seconds(plan, table, cost)["bytes_moved"] == theirs["copies_moved"] * SHAPES["olmoe-1b-7b"].expert_bytes


def test_static_is_what_the_homes_carry() -> None:
    table = counts()
    static = score(plan_of("static", table), table)
    assert static["imbalance"] == static["imbalance_at_home"]
    assert static["copies_moved"] == static["relocated_experts"] == 0
    assert static["tiers"] == {"nothing": L * M, "split": 0, "replicas": 0, "relocation": 0}


def test_excluded_ranks_do_not_lower_the_mean() -> None:
    """8 tokens on 4 ranks of which 2 are open: 4 each is perfect."""
    table = np.zeros((1, 1, 4, 4), dtype=np.int64)
    table[0, 0, 0] = 2
    found = score(search(table, 1, excluded=(2, 3)), table, excluded=(2, 3))
    assert found["imbalance"]["max"] == found["over_bound"]["max"] == found["imbalance_at_home"]["max"] == 1.0
    assert found == score(search(table, 1, excluded=(2, 3)), table, excluded=(3, 2, 2)), "a rank is left out once"


def test_a_rank_named_twice_is_left_out_once() -> None:
    """Ranks 0 to 2 must exchange experts to be even: whoever counts two open ranks is content before."""
    table = np.zeros((1, 1, 4, 6), dtype=np.int64)
    table[0, 0, 0] = [9, 5, 5, 5, 1, 5]
    once, twice = (search(table, 0, excluded=some) for some in ((3,), (3, 3)))
    assert once.most.max() == 10
    assert once.digest() == twice.digest()


def test_spread_of_one_value() -> None:
    assert summary([2.0]) == {"mean": 2.0, "p50": 2.0, "p95": 2.0, "max": 2.0}
