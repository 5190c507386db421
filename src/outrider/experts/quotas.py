"""Who sends whom: from the tokens that each holder computes to quotas by source rank, near sources first. Pure.

For fixed shares, serving an expert's own rank first, then its node, then the rest, keeps the most tokens off slow
links: costs are nested (rank < node < world), so a greedy is optimal for each expert. `recount` adds everything up
again from the rows alone and trusts nothing that led to them. Compiled, as kernels.py is.
"""

from typing import Any

import numpy as np
from numba import njit

from outrider.experts.events import Array


@njit(cache=True)
def tally(counts_LRE: Array) -> tuple[Array, int, int]:
    """load_LE over all sources; how many cells have tokens; the least cell, or 0."""
    layers, ranks, experts = counts_LRE.shape
    load_LE = np.zeros((layers, experts), dtype=np.int64)
    cells, least = 0, 0
    for layer in range(layers):
        for q in range(ranks):
            for e in range(experts):
                tokens = counts_LRE[layer, q, e]
                load_LE[layer, e] += tokens
                cells += tokens > 0
                least = min(least, tokens)
    return load_LE, cells, least


@njit(cache=True)
def by_source(counts_LRE: Array, shares: Array, nodes_R: Array) -> Array:
    """Quota rows [n, 5]: layer, expert, source, rank, tokens; sorted by the first four, tokens positive.

    shares [m, 4]  layer, expert, rank, tokens, sorted; they add up to the counts of each layer and expert
    """
    rows: Any = np.empty((np.count_nonzero(counts_LRE) + len(shares) * 2 + 1, 5), dtype=np.int32)
    found: Array = rows[: fill(rows, counts_LRE, shares, nodes_R)]
    return found


@njit(cache=True)
def fill(rows: Array, counts_LRE: Array, shares: Array, nodes_R: Array) -> int:
    """Write what `by_source` returns into the first of `rows`; how many they are.

    Room for one row a (layer, source, expert) with tokens, two a share and a last one is enough: each row is written,
    and counted then if it has tokens. Rows of 32 bits are twice as quick: fresh memory costs more than the sums.
    """
    ranks = counts_LRE.shape[1]
    one_node = nodes_R[0] == nodes_R[ranks - 1]
    split = np.zeros((ranks, ranks), dtype=np.int64)  # [which holder, source]
    left_R, room = np.empty(ranks, dtype=np.int64), np.empty(ranks, dtype=np.int64)
    begin = 0
    n: Any = np.uintp(0)  # unsigned: no negative index to look for
    while begin < len(shares):
        layer, e = np.uintp(shares[begin, 0]), np.uintp(shares[begin, 1])
        end = begin + 1
        while end < len(shares) and shares[end, 1] == shares[begin, 1] and shares[end, 0] == shares[begin, 0]:
            end += 1
        if end == begin + 1:
            for q in range(ranks):
                tokens = counts_LRE[layer, q, e]
                rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3] = layer, e, q, shares[begin, 2]
                rows[n, 4] = tokens
                n += np.uintp(tokens > 0)
        else:
            left_R[:] = counts_LRE[layer, :, e]
            room[: end - begin] = shares[begin:end, 3]
            for reach in range(3):  # the rank itself, its node, everywhere
                if reach == 1 and one_node:
                    continue
                for j in range(end - begin):
                    r, free = shares[begin + j, 2], room[j]
                    for q in range(r, r + 1) if reach == 0 else range(ranks):
                        some = min(left_R[q], free) if reach != 1 or nodes_R[q] == nodes_R[r] else 0
                        split[j, q] += some
                        left_R[q] -= some
                        free -= some
                    room[j] = free
            for q in range(ranks):
                for j in range(end - begin):
                    rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3] = layer, e, q, shares[begin + j, 2]
                    rows[n, 4] = split[j, q]
                    n += np.uintp(split[j, q] > 0)
                    split[j, q] = 0
        begin = end
    return int(n)


@njit(cache=True)
def recount(rows: Array, counts_LRE: Array, homes_LE: Array, replicas_LRS: Array, most_L: Array) -> np.int64:
    """Index of the first row that breaks a law, len(rows) if a sum does not come out, -1 if all is well.

    Laws: sorted rows of positive tokens; every rank holds what it computes; tokens of each (layer, source, expert)
    equal the counts, so that none of these is negative; the largest load of each layer is most_L.
    """
    layers, ranks, experts = counts_LRE.shape
    all_ranks, all_experts = np.uintp(ranks), np.uintp(experts)
    load_R = np.empty(ranks, dtype=np.int64)
    sent_RE = np.empty((ranks, experts), dtype=np.int64)
    holds_ER = np.empty((experts, ranks), dtype=np.bool_)
    i: Any = np.uintp(0)
    n = np.uintp(len(rows))
    for layer in range(layers):
        load_R[:] = 0
        sent_RE[:] = 0
        holds_ER[:] = False
        for e in range(experts):
            holds_ER[e, homes_LE[layer, e]] = True
        for r in range(ranks):
            for e in replicas_LRS[layer, r]:
                if e >= 0:
                    holds_ER[e, r] = True
        key: Any = np.uintp(0)  # what the next row's is at least
        while i < n and rows[i, 0] == layer:
            expert, source = np.uintp(rows[i, 1]), np.uintp(rows[i, 2])  # negative: above all limits
            rank, tokens = np.uintp(rows[i, 3]), rows[i, 4]
            at = (expert * all_ranks + source) * all_ranks + rank
            if expert >= all_experts or source >= all_ranks or rank >= all_ranks or at < key or tokens <= 0:
                return np.int64(i)
            if not holds_ER[expert, rank]:
                return np.int64(i)
            key = at + np.uintp(1)
            sent_RE[source, expert] += tokens
            load_R[rank] += tokens
            i += np.uintp(1)
        off = 0
        for q in range(ranks):
            for e in range(experts):
                off |= sent_RE[q, e] ^ counts_LRE[layer, q, e]
        if off != 0 or load_R.max() != most_L[layer]:
            return np.int64(n)
    return np.int64(-1) if i == n else np.int64(i)


@njit(cache=True)
def moved(replicas_LRS: Array, previous_LRS: Array, homes_LE: Array) -> Array:
    """moves [n, 5]: layer, expert, src, dst, slot of every copy that was not in that slot before."""
    moves = np.empty((np.count_nonzero(replicas_LRS != previous_LRS), 5), dtype=np.int64)
    layers, ranks, slots = replicas_LRS.shape
    n = 0
    for layer in range(layers):
        for r in range(ranks):
            for s in range(slots):
                e = replicas_LRS[layer, r, s]
                if e >= 0 and e != previous_LRS[layer, r, s]:
                    moves[n] = layer, e, homes_LE[layer, e], r, s
                    n += 1
    return moves[:n]
