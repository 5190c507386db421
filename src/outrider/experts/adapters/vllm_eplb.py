"""vLLM's expert load balancer with a placement that changes little: `OutriderEplbPolicy`, for vLLM's EPLB policies.

    from outrider.experts.adapters import vllm_eplb
    vllm_eplb.use()     # before the engine is built: vLLM's policy "default" is ours from then on

vLLM splits an expert's tokens evenly over its copies and rebalances every few thousand steps from the load it saw.
EPLB, its default, packs anew each time and then moves most experts. Here the old placement is bettered copy by copy
until it is as balanced as EPLB's new one, or within 2 % of the mean where that is not; only where this fails, or would
cost more copies, EPLB's placement is taken, bettered where that is free and renumbered so that ranks keep what they
have. So for every layer: never a larger maximum than EPLB's, and never more copies. `arrange` needs no vLLM.
"""

from typing import Any

import numpy as np

from outrider.experts.eplb import rebalance_experts
from outrider.experts.events import Array

ENOUGH = 1.02  # max/mean: below, no copy is made to better EPLB's balance
FLAT = 1.001  # max/mean: below, a placement that is new anyway is not bettered further


def arrange(
    weight_LE: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, old_LP: Array | None = None
) -> Array:
    """phy2log_LP: the expert in each slot, rank by rank.

    weight_LE  load of each expert; num_replicas, num_groups, num_nodes, num_ranks: as in rebalance_experts
    old_LP     what the slots hold now, -1 for nothing; None or another shape: nothing is known, and nothing is kept
    Where num_nodes divides num_groups, a group's experts stay in one node. Equal on all ranks. CallerError as there.
    """
    weight_LE = np.asarray(weight_LE, dtype=np.float64)
    theirs = rebalance_experts(weight_LE, num_replicas, num_groups, num_nodes, num_ranks)[0]
    layers, experts = weight_LE.shape
    nodes = num_nodes if num_groups % num_nodes == 0 else 1
    group_E = np.arange(experts) * (num_groups if nodes > 1 else 1) // experts
    out = theirs.reshape(layers, num_ranks, -1).copy()
    for layer, load_E in enumerate(weight_LE):
        if old_LP is None or old_LP.shape != theirs.shape:
            _climb(load_E, out[layer], _nodes_of(out[layer], group_E, nodes), FLAT)
        else:
            old_RS = old_LP[layer].astype(np.int64).reshape(num_ranks, -1)
            out[layer] = _changed(load_E, out[layer], old_RS, group_E, nodes)
    arranged: Array = out.reshape(layers, num_replicas)
    return arranged


def _changed(load_E: Any, theirs_RS: Array, old_RS: Array, group_E: Array, nodes: int) -> Array:
    """One layer. The first of these that is as balanced as EPLB's and costs no more copies: the old placement with
    its groups where they are, with groups where EPLB has them, EPLB's bettered, EPLB's renumbered."""
    from outrider.experts import climb  # numba: heavy, and an optional dependency of the package

    experts, size = len(load_E), len(old_RS) // nodes
    most = climb.loads(load_E, climb.holders(theirs_RS, experts)).max()
    fits_RS = climb.like(theirs_RS, old_RS, experts, size)
    copies = _copies(fits_RS, old_RS, experts)
    at_E = _nodes_of(fits_RS, group_E, nodes)
    ratio = min(ENOUGH, most * len(old_RS) / max(load_E.sum(), 1e-300))
    for node_E, start_RS in ((_nodes_of(old_RS, group_E, nodes), old_RS), (at_E, old_RS), (at_E, theirs_RS)):
        if node_E is None:
            continue
        if start_RS is old_RS:
            some_RS = np.where(node_E[old_RS] == np.arange(len(old_RS))[:, None] // size, old_RS, -1)
            some_RS[old_RS < 0] = -1
            _climb(load_E, some_RS, node_E, ratio)
        else:
            some_RS = theirs_RS.copy()
            _climb(load_E, some_RS, _nodes_of(theirs_RS, group_E, nodes), FLAT)
            some_RS = climb.like(some_RS, old_RS, experts, size)
        after = climb.loads(load_E, climb.holders(some_RS, experts)).max()
        if after <= most * (1 + 1e-9) and _copies(some_RS, old_RS, experts) <= copies:
            return climb.slots(some_RS, old_RS)
    return climb.slots(fits_RS, old_RS)


def use() -> None:
    """Make vLLM's policy "default" ours, in this process. Call it before the engine is built."""
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # vLLM is another environment's

    EPLB_POLICIES["default"] = policy()


def policy() -> type[Any]:
    """OutriderEplbPolicy, a subclass of vLLM's AbstractEplbPolicy."""
    from vllm.distributed.eplb.policy import AbstractEplbPolicy  # vLLM is another environment's

    class OutriderEplbPolicy(AbstractEplbPolicy):  # type: ignore[misc] # vLLM has no types
        """vLLM's interface on `arrange`; tensors in, a tensor on the CPU out."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            import torch

            old = None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy()
            loads = weight.double().cpu().numpy()
            return torch.from_numpy(arrange(loads, num_replicas, num_groups, num_nodes, num_ranks, old))

    return OutriderEplbPolicy


def _nodes_of(place_RS: Array, group_E: Array, nodes: int) -> Array | None:
    """Node of each expert; None where a group lies in no node or in two, or a node has more groups than another."""
    groups = int(group_E.max(initial=0)) + 1
    if nodes == 1:
        return np.zeros(len(group_E), dtype=np.int64)
    inside = np.zeros((groups, nodes), dtype=np.bool_)
    rank, slot = np.nonzero(place_RS >= 0)
    inside[group_E[place_RS[rank, slot]], rank * nodes // len(place_RS)] = True
    if (inside.sum(axis=1) != 1).any() or (inside.sum(axis=0) != groups // nodes).any():
        return None
    node_E: Array = inside.argmax(axis=1)[group_E]
    return node_E


def _climb(load_E: Any, place_RS: Array, node_E: Array | None, ratio: float) -> None:
    """Fill and better each node by itself, until no rank has more than `ratio` times the mean of all."""
    from outrider.experts import climb

    nodes = 1 if node_E is None else int(node_E.max()) + 1
    size, target = len(place_RS) // nodes, ratio * load_E.sum() / len(place_RS)
    for node in range(nodes):
        part = place_RS[node * size : (node + 1) * size]
        mine = np.arange(len(load_E)) if node_E is None else np.flatnonzero(node_E == node)
        inner = np.where(part < 0, -1, np.searchsorted(mine, part))
        load = np.ascontiguousarray(load_E[mine])
        climb.mend(load, inner)
        climb.climb(load, inner, target)
        part[:] = mine[inner]


def _copies(place_RS: Array, old_RS: Array, experts: int) -> int:
    from outrider.experts import climb

    return int(((climb.holders(place_RS, experts) > 0) & (climb.holders(old_RS, experts) == 0)).sum())
