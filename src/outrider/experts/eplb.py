"""EPLB: DeepSeek's placement of experts and their copies on GPUs, as a drop-in for its `rebalance_experts`. Pure.

Groups of experts are packed to nodes, each node copies its hottest experts, and its GPUs are packed with equal numbers
of copies; where groups do not divide among nodes, all GPUs are one node. It balances totals that are known to hold, and
splits evenly: the rival that peers.py shows, and what serving engines run. For micro-steps see plan.py.
"""

from typing import Any

import numpy as np

from outrider.errors import CallerError


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Any, Any, Any]:
    """Where each copy of each expert goes.

    weight        load of each expert, [layers, experts]: numpy array or torch tensor; the results are of the same kind,
                  int64, on the CPU
    num_replicas  physical slots of all GPUs, a multiple of num_gpus
    num_groups, num_nodes  groups go to nodes as a whole if num_nodes divides num_groups; otherwise both are ignored
    Returns phy2log [layers, num_replicas], the expert in each slot, GPU by GPU; log2phy [layers, experts, X], the slots
    of each expert by copy, -1 fills up to the most copies there are; logcnt [layers, experts], copies of each.
    Ties go to the lower id; loads are compared as float32. Raises CallerError for shapes, numbers that do not divide,
    and loads that are no numbers. Source: README of deepseek-ai/EPLB; checked against the outputs of that program.
    """
    from outrider.experts import packing  # numba: heavy, and an optional dependency of the package

    for name, number in (
        ("num_replicas", num_replicas),
        ("num_groups", num_groups),
        ("num_nodes", num_nodes),
        ("num_gpus", num_gpus),
    ):
        if not isinstance(number, (int, np.integer)):
            raise CallerError(f"{name}: {number!r}. Give an integer.")
    tensor = hasattr(weight, "detach")
    loads = np.asarray(weight.detach().float().cpu().numpy() if tensor else weight, dtype=np.float32)
    flat = num_nodes > 0 and num_groups % num_nodes > 0
    groups, nodes = (1, 1) if flat else (num_groups, num_nodes)
    _check(loads, num_replicas, groups, nodes, num_gpus)
    phy2log, nth, logcnt = packing.lay_out(np.ascontiguousarray(loads), num_replicas, groups, nodes, num_gpus)

    layers, experts = loads.shape
    log2phy = np.full((layers, experts, int(logcnt.max(initial=1))), -1, dtype=np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, nth] = np.arange(num_replicas)
    if tensor:
        like = weight.detach().cpu().long()
        return like.new_tensor(phy2log), like.new_tensor(log2phy), like.new_tensor(logcnt)
    return phy2log, log2phy, logcnt


def _check(loads: Any, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if loads.ndim != 2 or not loads.shape[1]:
        raise CallerError(f"weight: shape {loads.shape}. Give the load of each expert, [layers, experts].")
    if not np.isfinite(loads).all():
        raise CallerError("weight: holds a load that is no number. Count tokens, or mask what was not measured with 0.")
    experts = loads.shape[1]
    if min(gpus, groups, nodes) < 1 or replicas < experts:
        raise CallerError(
            f"num_replicas {replicas} for {experts} experts, num_gpus {gpus}, num_groups {groups},"
            f" num_nodes {nodes}. Give each expert a slot, and one GPU, group and node at least."
        )
    for name, number, by, divisor in (
        ("num_replicas", replicas, "num_gpus", gpus),
        ("experts", experts, "num_groups", groups),
        ("num_gpus", gpus, "num_nodes", nodes),
    ):
        if number % divisor:
            raise CallerError(
                f"{name}: {number} is no multiple of {by}, {divisor}; EPLB's layout has equal parts."
                " Change one of them, or use outrider.experts.plan, which takes uneven slots."
            )
