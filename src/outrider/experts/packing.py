"""The compiled parts of EPLB and of an even split: replicate, pack, deal. Pure; called by eplb.py and peers.py.

    pack       equal numbers of items into packs, heaviest first, each to the lightest pack that is open
    replicate  one more copy, again and again, of the expert whose copies compute most
    lay_out    EPLB: groups to nodes, copies in each node, copies to the node's GPUs
    deal       tokens to copies in turn, so that copies of an expert compute the same

Loads are float32, as in the published program, and ties go to the lower id. Source: the description of DeepSeek's EPLB
(README of deepseek-ai/EPLB); `deal` is ours. All compiled code of a file is cached together, as in kernels.py.
"""

from typing import Any

import numpy as np
from numba import njit

from outrider.experts.events import Array

Floats = np.ndarray[Any, np.dtype[np.float32]]


@njit(cache=True)
def pack(load: Floats, packs: int, pack_of: Array, place_of: Array) -> None:
    """Item i goes to pack_of[i], there at place_of[i]; packs divide the items. One item a pack: item i to pack i."""
    size = load.size // packs
    if size == 1:
        pack_of[:] = np.arange(packs)
        place_of[:] = 0
        return
    sums = np.zeros(packs, dtype=np.float32)
    filled = np.zeros(packs, dtype=np.int64)
    for item in np.argsort(-load, kind="mergesort"):
        lightest = -1
        for p in range(packs):
            if filled[p] < size and (lightest < 0 or sums[p] < sums[lightest]):
                lightest = p
        pack_of[item] = lightest
        place_of[item] = filled[lightest]
        filled[lightest] += 1
        sums[lightest] += load[item]


@njit(cache=True)
def replicate(load: Floats, copy_of: Array, nth: Array, count: Array) -> None:
    """Copy i is the nth[i]-th of expert copy_of[i]; the first load.size copies are the experts themselves."""
    experts = load.size
    each = load.copy()
    count[:] = 1
    for i in range(copy_of.size):
        hottest = i
        if i >= experts:
            hottest = 0
            for e in range(1, experts):
                if each[e] > each[hottest]:
                    hottest = e
            nth[i] = count[hottest]
            count[hottest] += 1
            each[hottest] = load[hottest] / np.float32(count[hottest])
        else:
            nth[i] = 0
        copy_of[i] = hottest


@njit(cache=True)
def lay_out(weight_LE: Floats, copies: int, groups: int, nodes: int, gpus: int) -> tuple[Array, Array, Array]:
    """EPLB: expert of each physical slot [L, copies], which copy of it [L, copies], copies of each expert [L, E]."""
    layers, experts = weight_LE.shape
    group, of_node = experts // groups, experts // nodes
    here, per_gpu = copies // nodes, copies // gpus
    expert_at = np.empty((layers, copies), dtype=np.int64)
    nth_at = np.empty((layers, copies), dtype=np.int64)
    counts = np.empty((layers, experts), dtype=np.int64)
    node_of, place_of = np.empty(groups, dtype=np.int64), np.empty(groups, dtype=np.int64)
    members = np.empty(experts, dtype=np.int64)  # experts, node by node
    copy_of, nth = np.empty(here, dtype=np.int64), np.empty(here, dtype=np.int64)
    gpu_of, slot_of = np.empty(here, dtype=np.int64), np.empty(here, dtype=np.int64)
    count = np.empty(of_node, dtype=np.int64)
    load, each = np.empty(of_node, dtype=np.float32), np.empty(here, dtype=np.float32)
    of_groups = np.empty(groups, dtype=np.float32)
    for layer in range(layers):
        for g in range(groups):
            of_groups[g] = weight_LE[layer, g * group : (g + 1) * group].sum()
        pack(of_groups, nodes, node_of, place_of)
        for g in range(groups):
            begin = node_of[g] * of_node + place_of[g] * group
            for i in range(group):
                members[begin + i] = g * group + i
        for node in range(nodes):
            mine = members[node * of_node : (node + 1) * of_node]
            for i in range(of_node):
                load[i] = weight_LE[layer, mine[i]]
            replicate(load, copy_of, nth, count)
            for i in range(of_node):
                counts[layer, mine[i]] = count[i]
            for i in range(here):
                each[i] = load[copy_of[i]] / np.float32(count[copy_of[i]])
            pack(each, gpus // nodes, gpu_of, slot_of)
            for i in range(here):
                at = node * here + gpu_of[i] * per_gpu + slot_of[i]
                expert_at[layer, at] = mine[copy_of[i]]
                nth_at[layer, at] = nth[i]
    return expert_at, nth_at, counts


@njit(cache=True)
def deal(counts_LRE: Array, hosts_LRX: Array) -> Array:
    """Quota rows [n, 5]: layer, expert, source, rank, tokens, sorted; every copy of an expert computes the same.

    Tokens of an expert are dealt to its copies in turn, sources in order, so that neither an expert's copies nor what
    one source gives them differ by more than one token. The copies that get one more are those on the emptiest ranks.
    hosts_LRX  experts in the slots of each rank, -1 for none; two copies on a rank count twice. Every expert has one.
    """
    layers, ranks, experts = counts_LRE.shape
    copies_E = np.zeros(experts, dtype=np.int64)
    at_EC = np.zeros((experts, hosts_LRX.shape[1] * hosts_LRX.shape[2]), dtype=np.int32)  # rank of each copy
    load_R = np.zeros(ranks, dtype=np.int64)
    sent_R = np.zeros(ranks, dtype=np.int64)
    taken = np.zeros(at_EC.shape[1], dtype=np.int64)
    bound = 0
    for layer in range(layers):
        copies_E[:] = 0
        for e in hosts_LRX[layer].ravel():
            if e >= 0:
                copies_E[e] += 1
        for q in range(ranks):
            for e in range(experts):
                bound += min(copies_E[e], counts_LRE[layer, q, e])
    rows = np.empty((bound, 5), dtype=np.int64)
    n = 0
    for layer in range(layers):
        copies_E[:] = 0
        load_R[:] = 0
        for r in range(hosts_LRX.shape[1]):
            for e in hosts_LRX[layer, r]:
                if e >= 0:
                    at_EC[e, copies_E[e]] = r
                    copies_E[e] += 1
        for e in range(experts):
            total = counts_LRE[layer, :, e].sum()
            for i in range(copies_E[e]):
                load_R[at_EC[e, i]] += total // copies_E[e]
        for e in range(experts):
            copies = copies_E[e]
            more = counts_LRE[layer, :, e].sum() % max(copies, 1)
            at = at_EC[e]
            for i in range(more):  # the emptiest ranks come first in the deal
                emptiest = i
                for j in range(i + 1, copies):
                    if load_R[at[j]] < load_R[at[emptiest]]:
                        emptiest = j
                at[i], at[emptiest] = at[emptiest], at[i]
                load_R[at[i]] += 1
            turn = 0
            for q in range(ranks):
                tokens = counts_LRE[layer, q, e]
                if tokens == 0:
                    continue
                for i in range(copies):
                    taken[i] = tokens // copies
                for i in range(tokens % copies):
                    taken[(turn + i) % copies] += 1
                turn = (turn + tokens) % copies
                for i in range(copies):
                    sent_R[at[i]] += taken[i]
                for r in range(ranks):
                    if sent_R[r] > 0:
                        rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3], rows[n, 4] = layer, e, q, r, sent_R[r]
                        sent_R[r] = 0
                        n += 1
    return rows[:n]
