"""Who sends whom: from the tokens that each holder computes to quotas by source rank, near sources first. Pure.

For fixed shares, serving an expert's own rank first, then its node, then the rest, keeps the most tokens off slow
links: costs are nested (rank < node < world), so a greedy is optimal for each expert. `recount` adds everything up
again from the rows alone and trusts nothing that led to them. Compiled, as kernels.py is.
"""

import numpy as np
from numba import njit

from outrider.experts.events import Array


@njit(cache=True)
def spread(counts_LRE: Array, shares: Array, nodes_R: Array) -> Array:
    """Quota rows [n, 5]: layer, expert, source, rank, tokens; sorted by the first four, tokens positive.

    shares [m, 4]  layer, expert, rank, tokens, sorted; they add up to the counts of each layer and expert
    """
    ranks = counts_LRE.shape[1]
    split = np.zeros((ranks, ranks), dtype=np.int64)  # [source, which holder]
    left_R = np.empty(ranks, dtype=np.int64)
    rows = np.empty((np.count_nonzero(counts_LRE) + len(shares) * 2, 5), dtype=np.int64)
    n, begin = 0, 0
    while begin < len(shares):
        layer, e = shares[begin, 0], shares[begin, 1]
        end = begin + 1
        while end < len(shares) and shares[end, 0] == layer and shares[end, 1] == e:
            end += 1
        if end == begin + 1:
            for q in range(ranks):
                if counts_LRE[layer, q, e] > 0:
                    rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3] = layer, e, q, shares[begin, 2]
                    rows[n, 4] = counts_LRE[layer, q, e]
                    n += 1
        else:
            left_R[:] = counts_LRE[layer, :, e]
            room = shares[begin:end, 3].copy()
            for reach in range(3):  # the rank itself, its node, everywhere
                for q in range(ranks):
                    for j in range(end - begin):
                        if left_R[q] == 0:
                            break
                        r = shares[begin + j, 2]
                        near = r == q if reach == 0 else reach == 2 or nodes_R[r] == nodes_R[q]
                        if near and room[j] > 0:
                            some = min(left_R[q], room[j])
                            split[q, j] += some
                            left_R[q] -= some
                            room[j] -= some
            for q in range(ranks):
                for j in range(end - begin):
                    if split[q, j] > 0:
                        rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3] = layer, e, q, shares[begin + j, 2]
                        rows[n, 4] = split[q, j]
                        split[q, j] = 0
                        n += 1
        begin = end
    return rows[:n]


@njit(cache=True)
def recount(rows: Array, counts_LRE: Array, homes_LE: Array, replicas_LRS: Array, most_L: Array) -> int:
    """Index of the first row that breaks a law, len(rows) if a sum does not come out, -1 if all is well.

    Laws: sorted rows of positive tokens; every rank holds what it computes; tokens of each (layer, source, expert)
    equal the counts; the largest load of each layer is most_L.
    """
    layers, ranks, experts = counts_LRE.shape
    load_R = np.zeros(ranks, dtype=np.int64)
    i = 0
    for layer in range(layers):
        load_R[:] = 0
        for e in range(experts):
            for q in range(ranks):
                left, last = counts_LRE[layer, q, e], -1
                while i < len(rows) and rows[i, 0] == layer and rows[i, 1] == e and rows[i, 2] == q:
                    r = rows[i, 3]
                    if rows[i, 4] <= 0 or r <= last or r >= ranks:
                        return i
                    if homes_LE[layer, e] != r:
                        held = False
                        for s in range(replicas_LRS.shape[2]):
                            held |= replicas_LRS[layer, r, s] == e
                        if not held:
                            return i
                    last = r
                    left -= rows[i, 4]
                    load_R[r] += rows[i, 4]
                    i += 1
                if left != 0:
                    return len(rows)
        if load_R.max() != most_L[layer]:
            return len(rows)
    return -1 if i == len(rows) else i
