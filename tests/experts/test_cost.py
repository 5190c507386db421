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

    Near links carry what a rank gets or sends, whichever is more: 6, 2, 4 and none. Far ones the 4 that leave one node
    and come into the other, half of them by each of its ranks.
    """
    rows = [(0, 0, 0, 3), (0, 1, 0, 2), (0, 2, 0, 4)]
    found = modelled(plan_of([rows], [[[0], [1], [2], [3]]], [0, 1, 2, 3], 2), COST)
    rail_s = 8 * (4 / 2) / 2.0
    first = 0.25 + 9 + 8 * 6 / 4.0 + rail_s
    assert found.rank_s[0, 0].tolist() == [first, 8 * 2 / 4.0 + rail_s, 8 * 4 / 4.0 + rail_s, rail_s]
    assert found.layer_s.tolist() == [[first]]


def test_a_node_that_sends_more_than_it_gets_takes_as_long_as_it_sends() -> None:
    """Rank 0, alone in its node, sends 5 and gets 1; rank 1 gets 5 and sends 1: both links carry 5, either way."""
    rows = [(1, 0, 1, 5), (0, 1, 0, 1)]
    found = modelled(plan_of([rows], [[[0], [1]]], [0, 1], 1), COST)
    links_s = 8 * 5 / 4.0 + 8 * 5 / 2.0
    assert found.rank_s[0, 0].tolist() == [0.25 + 1 + links_s, 0.25 + 5 + links_s]


def test_tiles_are_whole_and_a_token_stands_for_many() -> None:
    """3 counted tokens for 10 each, 5 of another expert: 30 and 50 rows in tiles of 16: 32 and 64."""
    cost = msgspec.structs.replace(COST, tile_rows=16, row_scale=10)
    found = modelled(plan_of([[(0, 0, 0, 3), (1, 0, 0, 5)]], [[[0, 1]]], [0, 0], 1), cost)
    assert found.rank_s[0, 0, 0] == 0.5 + 32 + 64


# Copies. One token is rank 0's own and 1 s, so that links are idle all of the time; experts are of 12 bytes.


def test_copies_hide_behind_the_micro_step_before() -> None:
    """12 bytes: 0.5 + 12 / 4 = 3.5 s near. Micro-step 0 takes 2.25 s a pass: 1.25 s show in recompute.

    The update has three passes' time, 6.75 s, to hide it. At last its gradient goes home, for which nothing is left.
    """
    rows = [[(0, 0, 0, 2)], [(0, 0, 0, 2), (1, 1, 1, 2)]]
    hosts = [[[0, -1], [1, -1]], [[0, -1], [1, 0]]]
    plan = plan_of(rows, hosts, [0, 1], 2)
    found = modelled(plan, COST)
    assert new_copies(plan).sum(axis=(0, 2, 3)).tolist() == [0, 1]
    assert found.moved_bytes.tolist() == [[0, 12]]
    assert found.recompute_wait_s.tolist() == [[0, 3.5 - 2.25]]
    assert found.update_wait_s.tolist() == [[0, 0]]
    assert found.last_wait_s.tolist() == [2 * 3.5]
    assert found.exposed_total_s == pytest.approx(1.25 + 7)
    assert found.total_s == pytest.approx(PASSES * (2.25 + 2.25) + 1.25 + 7)
    rows[0] = [(0, 0, 0, 4)]
    assert modelled(plan_of(rows, hosts, [0, 1], 2), COST).recompute_wait_s.sum() == 0, "4.25 s hide it whole"


def test_a_copy_given_up_takes_its_gradient_home_beside_the_next_weights() -> None:
    """Expert 0 is copied to rank 1, then given up as expert 1 is copied to rank 0.

    Update, before micro-step 2: rank 0 gets the gradient of 0 (7 s) and the weights of 1 (3.5 s); 3 * 1.25 s hide them.
    """
    rows = [[(0, 0, 0, 1)]] * 3
    hosts = [[[0, -1], [1, -1]], [[0, -1], [1, 0]], [[0, 1], [1, -1]]]
    found = modelled(plan_of(rows, hosts, [0, 1], 2), COST)
    assert found.recompute_wait_s.tolist() == [[0, 3.5 - 1.25, 3.5 - 1.25]]
    assert found.update_wait_s.tolist() == [[0, 0, 7 + 3.5 - 3 * 1.25]]
    assert found.last_wait_s.tolist() == [7]


def test_a_home_sends_all_its_copies() -> None:
    """Three ranks get expert 0 at once: each 3.5 s, but rank 0 sends for 10.5 s."""
    hosts = [[[0, -1], [1, -1], [2, -1], [3, -1]], [[0, -1], [1, 0], [2, 0], [3, 0]]]
    found = modelled(plan_of([[(0, 0, 0, 1)]] * 2, hosts, [0, 1, 2, 3], 4), COST)
    assert found.recompute_wait_s.tolist() == [[0, 3 * 3.5 - 1.25]]


def test_a_copy_from_another_node_takes_the_slow_link() -> None:
    """Far: 0.5 + 12 / 2 = 6.5 s; a holder in the node one micro-step before makes it near again; gradients go far."""
    rows = [[(0, 0, 0, 1)]] * 3
    none = [[0, -1], [1, -1], [2, -1], [3, -1]]
    two = [row.copy() for row in none]
    two[2][1] = 0
    three = [row.copy() for row in two]
    three[3][1] = 0
    found = modelled(plan_of(rows, [none, two, three], [0, 1, 2, 3], 2), COST)
    assert found.recompute_wait_s[0].tolist() == [0, 6.5 - 1.25, 3.5 - 1.25]
    assert found.last_wait_s.tolist() == [2 * 2 * 6.5]
    assert transfer_s(COST) == 3.5 and transfer_s(COST, far=True) == 6.5


def test_the_first_copies_have_the_layer_before_only_and_come_again_for_the_update() -> None:
    """Micro-step 0 holds a copy that the last one has not: it comes at the start, and between the two stages."""
    rows = [[(0, 0, 0, 1)], [(0, 0, 0, 2)]]
    hosts = [[[0, -1], [1, 0]], [[0, -1], [1, -1]]]
    found = modelled(plan_of(rows, hosts, [0, 1], 2), COST)
    assert found.recompute_wait_s.tolist() == [[3.5, 0]], "the first layer has nothing to hide behind"
    assert found.update_wait_s.tolist() == [[3.5 - 2.25, 7 - 3 * 1.25]], "and its gradient goes home in between"
    assert found.last_wait_s.tolist() == [0]


def test_the_layer_before_hides_the_first_copies_and_the_last_gradients() -> None:
    """Two layers alike, 1.25 s a pass: the second layer's copy has the first's to hide behind, its gradient two."""
    rows = [np.array([[layer, 0, 0, 0, 1] for layer in range(2)])]
    hosts = [np.array([[[0, -1], [1, 0]]] * 2)]
    found = modelled(assemble("static", np.array([[0, 1]] * 2), hosts, rows, ranks_per_node=2), COST)
    assert found.recompute_wait_s.tolist() == [[3.5], [3.5 - 1.25]]
    assert found.last_wait_s.tolist() == [7, 7 - 2 * 1.25]


def test_homes_elsewhere_are_paid_for_in_the_first_micro_step() -> None:
    """Two experts that changed nodes: 6.5 s each, in and out side by side."""
    found = modelled(plan_of([[(0, 0, 1, 1)]], [[[1], [0]]], [1, 0], 1), COST)
    assert found.recompute_wait_s.tolist() == [[6.5]]
    assert found.last_wait_s.tolist() == [0], "a home's own gradient does not travel"


@pytest.mark.parametrize("far", [2.0, 4.0])
def test_copies_wait_while_tokens_are_on_their_link(far: float) -> None:
    """Two tokens from rank 1 to rank 0: 4 s on their near links, 6.25 s in all; a copy of 5 s has 2.25 s of them left.

    Without sharing, all 6.25 s hide it. Where near and far links are one, far tokens block a near copy as well.
    """
    cost = msgspec.structs.replace(COST, links=Links(4.0, far, 2.0))
    rows = [[(0, 1, 0, 2)], [(0, 1, 0, 2)]]
    hosts = [[[0, -1], [1, -1]], [[0, -1], [1, 0]]]
    assert modelled(plan_of(rows, hosts, [0, 1], 2), cost).recompute_wait_s.tolist() == [[0, 5.0 - 2.25]]
    beside = msgspec.structs.replace(cost, shared_links=False)
    assert modelled(plan_of(rows, hosts, [0, 1], 2), beside).recompute_wait_s.tolist() == [[0, 0]]
    rows = [[(0, 2, 0, 4)], [(0, 2, 0, 4)]]  # 8 s near, 8 or 4 s far, 4.25 s to compute
    hosts = [[[0, -1], [1, -1], [2, -1], [3, -1]], [[0, -1], [1, 0], [2, -1], [3, -1]]]
    found = modelled(plan_of(rows, hosts, [0, 1, 2, 3], 2), cost)
    assert found.recompute_wait_s.tolist() == [[0, 5.0 - 4.25 if far == 4.0 else 0.0]]


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
    broken = ["near_bytes_s = 1e9", "near_bytes_s = 'x'\nfar_bytes_s = 1.0", "= 3", "speed = 1.0"]
    broken += [f"near_bytes_s = {rate}\nfar_bytes_s = 2e9" for rate in ("0", "-1.0", "nan", "inf")]
    for wrong in (*broken, "near_bytes_s = 1e9\nfar_bytes_s = 2e9\nlatency_s = -1.0"):
        file.write_text(wrong)
        with pytest.raises(CallerError, match=r"mine\.toml"):
            links_of(str(file))
    with pytest.raises(CallerError, match="neither one of"):
        links_of("smoke-signals")
