"""Between nodes: standing copies within slots and bounds, tokens that stay where they can, nodes no slower for it."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.experts.nodes import route, seat, stand

RANK_S, FAR_S = 2.0, 3.0


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """load_MNE, homes_E, nodes_R (the last node may be smaller), slots for standing copies of each rank, most."""
    ranks, per_node = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes_R = np.arange(ranks) // per_node
    heat = rng.pareto(1.0, (draw(st.integers(1, 4)), int(nodes_R[-1]) + 1, experts)).clip(max=50) * 8
    return {
        "load_MNE": rng.poisson(heat).astype(np.int64),
        "homes_E": rng.integers(0, ranks, experts),
        "nodes_R": nodes_R,
        "room_R": rng.integers(0, 3, ranks),
        "most": draw(st.integers(1, 4)),
    }


def held(given_: dict[str, Any]) -> Any:
    room_N = np.bincount(given_["nodes_R"], given_["room_R"]).astype(np.int64)
    return stand(given_["load_MNE"], given_["homes_E"], given_["nodes_R"], room_N, given_["most"])


def seated(given_: dict[str, Any]) -> Any:
    return seat(given_["load_MNE"], given_["homes_E"], given_["nodes_R"], held(given_), given_["room_R"])


def out_M(load_MNE: Any, held_NE: Any) -> Any:
    """Token-slots that leave the node which sends most."""
    return (load_MNE * ~held_NE).sum(axis=2).max(axis=1)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_standing_copies_keep_to_slots_and_homes(step: dict[str, Any]) -> None:
    load, homes, nodes, room = step["load_MNE"], step["homes_E"], step["nodes_R"], step["room_R"]
    found, experts = held(step), np.arange(len(homes))
    assert not found[nodes[homes], experts].any(), "beside its own home"
    assert (found.sum(axis=1) <= np.bincount(nodes, room)).all()
    assert (np.bincount(homes, found.sum(axis=0), len(nodes)) <= step["most"]).all()
    assert (load.sum(axis=0)[found] > 0).all(), "for nobody"
    home = np.zeros_like(found)
    home[nodes[homes], experts] = True
    assert out_M(load, home | found).sum() <= out_M(load, home).sum()
    rank = seated(step)
    assert ((rank >= 0) == found).all()
    node, expert = np.nonzero(found)
    assert (nodes[rank[node, expert]] == node).all()
    assert (np.bincount(rank[found], minlength=len(nodes)) <= room).all()


def test_the_heaviest_experts_stand() -> None:
    """One micro-step, room for two each and homes that may send as many: in each node the two that it sends most to."""
    rng = np.random.default_rng(2)
    load = rng.permutation(np.arange(1, 37)).reshape(1, 3, 12)
    homes = np.arange(12) // 4
    found = stand(load, homes, np.arange(3), np.full(3, 2), 99)
    for node in range(3):
        others = np.flatnonzero(homes != node)
        best = others[np.argsort(-load[0, node, others])[:2]]
        assert set(np.flatnonzero(found[node])) == set(best)


def test_micro_steps_in_which_a_node_is_worst_off_count_more() -> None:
    """Expert 2 has more tokens of node 0 in all, expert 3 in the micro-step in which node 0 sends most."""
    load = np.zeros((2, 2, 4), dtype=np.int64)
    load[0, 0, 2:], load[1, 0, 2:] = (60, 0), (0, 50)
    load[0, 1, 0] = 100  # node 1 is worse off in the first, whatever node 0 has
    homes = np.array([0, 0, 1, 1])
    assert np.flatnonzero(stand(load, homes, np.arange(2), np.array([1, 0]), 9)[0]).tolist() == [3]
    load[0, 1, 0] = 0
    assert np.flatnonzero(stand(load, homes, np.arange(2), np.array([1, 0]), 9)[0]).tolist() == [2]


def seconds_M(step: dict[str, Any], rank_NE: Any, tokens_MNE: Any, open_N: Any) -> Any:
    """Of the slowest node, if each serves its own sources first; counted again, with numpy."""
    own = np.minimum(tokens_MNE, step["load_MNE"])
    into, out = (tokens_MNE - own).sum(axis=2), (step["load_MNE"] - own).sum(axis=2)
    slowest = []
    for m, tokens_NE in enumerate(tokens_MNE):
        standing = np.bincount(rank_NE[rank_NE >= 0], tokens_NE[rank_NE >= 0], len(step["nodes_R"]))
        most = [
            max(tokens_NE[n].sum() / max(1, open_N[n]), standing[step["nodes_R"] == n].max())
            for n in range(len(tokens_NE))
        ]
        links = np.maximum(into[m], out[m]) / np.bincount(step["nodes_R"])
        slowest.append((RANK_S * np.array(most) + FAR_S * links).max())
    return np.array(slowest)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_tokens_are_computed_where_the_expert_is_and_no_node_is_slower_for_it(step: dict[str, Any]) -> None:
    load, homes, nodes = step["load_MNE"], step["homes_E"], step["nodes_R"]
    rank_NE, open_N = seated(step), np.bincount(nodes)
    tokens = route(load, homes, nodes, open_N, rank_NE, RANK_S, FAR_S)
    assert (tokens >= 0).all() and (tokens.sum(axis=1) == load.sum(axis=1)).all()
    holds = rank_NE >= 0
    holds[nodes[homes], np.arange(len(homes))] = True
    assert (tokens[:, ~holds] == 0).all()
    at_first = load * holds
    at_first[:, nodes[homes], np.arange(len(homes))] += (load * ~holds).sum(axis=1)
    before, after = (seconds_M(step, rank_NE, some, open_N) for some in (at_first, tokens))
    assert (after <= before + 1e-9).all()


def test_what_stays_does_not_make_its_node_the_slowest() -> None:
    """Node 1 has a copy of all that it sends: 90 token-slots on one rank, while node 0's is idle; a part goes there."""
    load = np.array([[[0, 0], [90, 0]]])
    rank_NE = np.array([[-1, -1], [1, -1]])
    assert route(load, np.array([0, 1]), np.arange(2), np.ones(2, int), rank_NE, 1.0, 1e-3).tolist() == [
        [[45, 0], [45, 0]]
    ]
    assert route(load, np.array([0, 1]), np.arange(2), np.ones(2, int), rank_NE, 1.0, 9.0).tolist() == [
        [[0, 0], [90, 0]]
    ], "unless the way is longer than the wait"
