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
    rows = np.empty((np.count_nonzero(counts_LRE) + len(shares) * 2, 5), dtype=np.int64)
    return rows[: fill(rows, counts_LRE, shares, nodes_R)]


@njit(cache=True)
def fill(rows: Array, counts_LRE: Array, shares: Array, nodes_R: Array) -> int:
    """Write what `spread` returns into the first of `rows`; how many they are.

    Room for one row a (layer, source, expert) with tokens and two a share is enough. Rows of 32 bits are twice as
    quick: fresh memory costs more than what is computed here.
    """
    ranks = counts_LRE.shape[1]
    split = np.zeros((ranks, ranks), dtype=np.int64)  # [source, which holder]
    left_R = np.empty(ranks, dtype=np.int64)
    n, begin = 0, 0
    while begin < len(shares):
        layer, e = np.uintp(shares[begin, 0]), np.uintp(shares[begin, 1])  # unsigned: no negative index to look for
        end = begin + 1
        while end < len(shares) and shares[end, 0] == shares[begin, 0] and shares[end, 1] == shares[begin, 1]:
            end += 1
        if end == begin + 1:
            for q in range(ranks):
                tokens = counts_LRE[layer, q, e]
                if tokens > 0:
                    at = np.uintp(n)
                    rows[at, 0], rows[at, 1], rows[at, 2], rows[at, 3] = layer, e, q, shares[begin, 2]
                    rows[at, 4] = tokens
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
                        at = np.uintp(n)
                        rows[at, 0], rows[at, 1], rows[at, 2], rows[at, 3] = layer, e, q, shares[begin + j, 2]
                        rows[at, 4] = split[q, j]
                        split[q, j] = 0
                        n += 1
        begin = end
    return n


@njit(cache=True)
def recount(rows: Array, counts_LRE: Array, homes_LE: Array, replicas_LRS: Array, most_L: Array) -> int:
    """Index of the first row that breaks a law, len(rows) if a sum does not come out, -1 if all is well.

    Laws: sorted rows of positive tokens; every rank holds what it computes; tokens of each (layer, source, expert)
    equal the counts, of which none is negative; the largest load of each layer is most_L.
    """
    layers, ranks, experts = counts_LRE.shape
    load_R = np.zeros(ranks, dtype=np.int64)
    i = 0
    for layer in range(layers):
        load_R[:] = 0
        last, last_rank, left, seen = -1, -1, 0, 0
        while i < len(rows) and rows[i, 0] == layer:
            row = np.uintp(i)  # unsigned: numba looks for negative indices otherwise
            e, q, r, tokens = rows[row, 1], rows[row, 2], rows[row, 3], rows[row, 4]
            if tokens <= 0 or min(e, q, r) < 0 or e >= experts or max(q, r) >= ranks:
                return i
            cell = e * ranks + q
            at_e, at_r = np.uintp(e), np.uintp(r)
            if cell != last:
                if left != 0:
                    return len(rows)
                if cell < last:
                    return i
                last, last_rank, left = cell, -1, counts_LRE[layer, np.uintp(q), at_e]
            if r <= last_rank:
                return i
            if homes_LE[layer, at_e] != r:
                held = False
                for s in range(replicas_LRS.shape[2]):
                    held |= replicas_LRS[layer, at_r, s] == e
                if not held:
                    return i
            last_rank = r
            left -= tokens
            seen += tokens
            load_R[at_r] += tokens
            i += 1
        if left != 0 or seen != counts_LRE[layer].sum() or load_R.max() != most_L[layer]:
            return len(rows)
    return -1 if i == len(rows) else i
