"""The cost model on cases small enough to work out by hand; modelled seconds, never measured."""

from typing import Any

import msgspec
import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts.adapters.plans import links_of
from outrider.experts.cost import (
    LINKS,
    PASSES,
    SHAPES,
    Cost,
    Links,
    Shape,
    force_balanced_s,
    modelled,
    new_copies,
    shape_of,
    transfer_s,
)
from outrider.experts.schedule import StepPlan, assemble

# One token-slot computes 6 * 2 * 1 = 12 flop in 12 s / 12 = 1 s, and travels 2 * 2 * 2 = 8 bytes.
COST = Cost(Links(near_bytes_s=4.0, far_bytes_s=2.0, latency_s=0.5), Shape(2, 1), 12.0, tile_rows=1, launch_s=0.25)


def plan_of(rows_M: Any, hosts_M: Any, homes: Any, per_node: int) -> StepPlan:
    """One layer. rows: (expert, source, rank, tokens) of each micro-step; hosts [ranks, slots] of each."""
    rows = [np.array([[0, *row] for row in sorted(some)], dtype=np.int64).reshape(-1, 5) for some in rows_M]
    hosts = [np.array([some], dtype=np.int64) for some in hosts_M]
    return assemble("static", np.array([homes], dtype=np.int64), hosts, rows, ranks_per_node=per_node)


def test_one_rank_alone() -> None:
    """5 tokens of one expert and 2 of another at home: 2 launches and 7 s; nothing travels, nothing is copied."""
    found = modelled(plan_of([[(0, 0, 0, 5), (1, 0, 0, 2)]], [[[0, 1]]], [0, 0], 1), COST)
    assert found.rank_s.tolist() == [[[2 * 0.25 + 7]]]
    assert found.exposed_total_s == 0
    assert found.total_s == PASSES * 7.5


def test_tokens_travel_over_the_links_that_they_need() -> None:
    """Two nodes of two ranks. Rank 0 gets 3 of its own, 2 from rank 1 (near), 4 from rank 2 (far).

    Near links carry all 6 that come from other ranks; far ones the node's 4, half of them by each of its ranks.
    """
    rows = [(0, 0, 0, 3), (0, 1, 0, 2), (0, 2, 0, 4)]
    found = modelled(plan_of([rows], [[[0], [1], [2], [3]]], [0, 1, 2, 3], 2), COST)
    rail_s = 8 * (4 / 2) / 2.0
    first = 0.25 + 9 + 8 * 6 / 4.0 + rail_s
    assert found.rank_s[0, 0].tolist() == [first, rail_s, 0, 0]
    assert found.layer_s.tolist() == [[first]]


def test_tiles_are_whole_and_a_token_stands_for_many() -> None:
    """3 counted tokens for 10 each, 5 of another expert: 30 and 50 rows in tiles of 16: 32 and 64."""
    cost = msgspec.structs.replace(COST, tile_rows=16, row_scale=10)
    found = modelled(plan_of([[(0, 0, 0, 3), (1, 0, 0, 5)]], [[[0, 1]]], [0, 0], 1), cost)
    assert found.rank_s[0, 0, 0] == 0.5 + 32 + 64


def test_copies_hide_behind_the_micro_step_before() -> None:
    """12 bytes: 0.5 + 12 / 4 = 3.5 s near. Micro-step 0 takes 2.25 s, so that 1.25 s of the copy show in each pass."""
    rows = [[(0, 0, 0, 2)], [(0, 0, 0, 2), (0, 1, 1, 2)]]
    hosts = [[[0, -1], [1, -1]], [[0, -1], [1, 0]]]
    plan = plan_of(rows, hosts, [0, 1], 2)
    found = modelled(plan, COST)
    assert new_copies(plan).sum(axis=(0, 2, 3)).tolist() == [0, 1]
    assert found.moved_bytes.tolist() == [[0, 12]]
    assert found.exposed_s.tolist() == [[0, 3.5 - 2.25]]
    assert found.exposed_total_s == pytest.approx(PASSES * 1.25)
    assert found.total_s == pytest.approx(PASSES * (2.25 + 2.25 + 1.25))
    rows[0] = [(0, 0, 0, 4)]
    assert modelled(plan_of(rows, hosts, [0, 1], 2), COST).exposed_total_s == 0, "4.25 s hide it whole"


def test_a_copy_from_another_node_takes_the_slow_link() -> None:
    """Far: 0.5 + 12 / 2 = 6.5 s; a holder in the node one micro-step before makes it near again."""
    rows = [[(0, 0, 0, 1)], [(0, 0, 0, 1)], [(0, 0, 0, 1)]]
    none, two, three = [[0, -1], [1, -1], [2, -1], [3, -1]], None, None
    two = [row.copy() for row in none]
    two[2][1] = 0
    three = [row.copy() for row in two]
    three[3][1] = 0
    exposed = modelled(plan_of(rows, [none, two, three], [0, 1, 2, 3], 2), COST).exposed_s[0]
    assert exposed.tolist() == [0, 6.5 - 1.25, 3.5 - 1.25]
    assert transfer_s(COST) == 3.5 and transfer_s(COST, far=True) == 6.5


def test_the_first_copies_have_the_layer_before_only_and_come_again_for_the_update() -> None:
    """Micro-step 0 holds a copy that the last one has not: it comes at the start, and between the two stages."""
    rows = [[(0, 0, 0, 1)], [(0, 0, 0, 2)]]
    hosts = [[[0, -1], [1, 0]], [[0, -1], [1, -1]]]
    found = modelled(plan_of(rows, hosts, [0, 1], 2), COST)
    assert found.exposed_s.tolist() == [[3.5, 0]], "the first layer has nothing to hide behind"
    assert found.between_s.tolist() == [3.5 - 2.25]
    assert found.exposed_total_s == pytest.approx(3.5 + 1.25)


def test_an_even_gate_has_no_copies_and_whole_tiles() -> None:
    """8 slots on 2 ranks, 4 experts: 4 rows a rank, of which half come from the other."""
    counts = np.full((1, 1, 2, 4), 1)
    rows = [(e, q, e // 2, 1) for e in range(4) for q in range(2)]
    plan = plan_of([rows], [[[0, 1], [2, 3]]], [0, 0, 1, 1], 2)
    even = PASSES * (2 * 0.25 + 4 + 8 * 2 / 4.0)
    assert force_balanced_s(counts, plan, COST) == pytest.approx(even)
    assert modelled(plan, COST).total_s == pytest.approx(even), "and this plan is as even"
    tiled = msgspec.structs.replace(COST, tile_rows=3)
    assert force_balanced_s(counts, plan, tiled) == pytest.approx(PASSES * (0.5 + 6 + 4))


@pytest.mark.parametrize(
    ("name", "bytes_"), [("qwen3-30b-a3b", 9.44e6), ("gpt-oss-120b", 49.8e6), ("deepseek-v3", 88.1e6)]
)
def test_known_shapes_have_the_published_size(name: str, bytes_: float) -> None:
    assert SHAPES[name].expert_bytes == pytest.approx(bytes_, rel=0.005)
    assert shape_of(name) == SHAPES[name]


def test_shapes_and_links_by_hand(tmp_path: Any) -> None:
    assert shape_of("64x32") == Shape(64, 32)
    for wrong in ("64", "x", "0x4", "axb", "-1x4"):
        with pytest.raises(CallerError, match="HIDDENxINNER"):
            shape_of(wrong)
    file = tmp_path / "mine.toml"
    file.write_text("near_bytes_s = 1e9\nfar_bytes_s = 2e9\n")
    assert links_of(str(file)) == Links(1e9, 2e9)
    assert links_of("ib") == LINKS["ib"]
    for wrong in ("near_bytes_s = 1e9", "near_bytes_s = 'x'\nfar_bytes_s = 1.0", "= 3", "speed = 1.0"):
        file.write_text(wrong)
        with pytest.raises(CallerError, match=r"mine\.toml"):
            links_of(str(file))
    with pytest.raises(CallerError, match="neither one of"):
        links_of("smoke-signals")
