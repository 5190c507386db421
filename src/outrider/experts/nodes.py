"""Between nodes: which experts of others a node holds for the whole step, and which node computes which tokens. Pure.

    stand   standing copies: those that keep most tokens in their node, above all in the node that is worst off
    seat    on which of the node's ranks each lies
    route   tokens stay in their node where it holds the expert, unless that makes the slowest node; integers

Links between nodes are the slow ones: a token-slot that stays is worth many that are merely spread evenly. A standing
copy travels twice a step (weights, then gradients), however many micro-steps use it; but its home sends and gathers all
of them, so that `most` bounds the copies of one rank's experts. Called by ways.py, which then plans inside each node.
Compiled, as kernels.py is. Legend: M micro-steps, N nodes, R ranks, E experts.
"""

import numpy as np
from numba import njit

from outrider.experts.events import Array

ROUNDS = 40  # of reweighting micro-steps in which a node is worst off
EXCHANGES = 400  # of tokens between nodes, in one micro-step
HALVINGS = 5  # amounts tried of what one node computes of one expert
FEWEST_S = 1e-12  # a gain of less is rounding


def stand(load_MNE: Array, homes_E: Array, nodes_R: Array, room_N: Array, most: int) -> Array:
    """held_NE: True where a node holds a standing copy; its own homes are none.

    load_MNE   token-slots of each node's sources
    room_N     standing copies that a node has slots for
    most       standing copies of the experts of one home rank, in all nodes together
    Greedy by tokens, in rounds: micro-steps weigh more in which the node keeps few tokens; that round counts in which
    the sum over micro-steps of the most tokens that leave a node is least. Ties to the lower node and expert.
    """
    experts = np.arange(load_MNE.shape[2])
    home_NE = np.zeros(load_MNE.shape[1:], dtype=np.bool_)
    home_NE[nodes_R[homes_E], experts] = True
    weight_MN = np.ones(load_MNE.shape[:2])
    best_NE, best = np.zeros_like(home_NE), np.inf
    for _ in range(ROUNDS):
        worth_NE = (weight_MN[:, :, None] * load_MNE).sum(axis=0) * ~home_NE
        order = np.argsort(-worth_NE.ravel(), kind="stable")
        order = order[: np.count_nonzero(worth_NE)]
        held_NE = np.zeros_like(home_NE)
        _take(order, homes_E, room_N.copy(), np.full(len(nodes_R), most), held_NE)
        out_MN = (load_MNE * ~(held_NE | home_NE)).sum(axis=2)
        worst_M = out_MN.max(axis=1, keepdims=True)
        if worst_M.sum() < best:
            best_NE, best = held_NE, worst_M.sum()
        weight_MN = weight_MN * out_MN / worst_M.clip(min=1)
        weight_MN = 0.9 * weight_MN / max(weight_MN.mean(), FEWEST_S) + 0.1
    return best_NE


@njit(cache=True)
def _take(order: Array, homes_E: Array, room_N: Array, left_R: Array, held_NE: Array) -> None:
    experts = homes_E.size
    for i in order:
        n, e = i // experts, i % experts
        if room_N[n] > 0 and left_R[homes_E[e]] > 0:
            held_NE[n, e] = True
            room_N[n] -= 1
            left_R[homes_E[e]] -= 1


def seat(load_MNE: Array, homes_E: Array, nodes_R: Array, held_NE: Array, room_R: Array) -> Array:
    """rank_NE: rank of each standing copy, -1 where a node has none. room_R: standing copies that a rank has slots for.

    Heaviest first, each to the rank where the sum over micro-steps of fourth powers of rank loads grows least: full
    ranks count most. Ties to the lower rank.
    """
    rank_NE = np.full(held_NE.shape, -1, dtype=np.int64)
    experts, room_R = np.arange(held_NE.shape[1]), room_R.copy()
    load_MR = np.zeros((len(load_MNE), len(nodes_R)))
    for e in experts.tolist():
        load_MR[:, homes_E[e]] += load_MNE[:, nodes_R[homes_E[e]], e]
    node, expert = np.nonzero(held_NE)
    heaviest = np.lexsort((expert, -load_MNE[:, node, expert].sum(axis=0), node))
    for n, e in zip(node[heaviest].tolist(), expert[heaviest].tolist(), strict=True):
        mine = np.flatnonzero((nodes_R == n) & (room_R > 0))
        more_M = load_MR[:, mine] + load_MNE[:, n, e, None]
        rank = mine[(more_M**4 - load_MR[:, mine] ** 4).sum(axis=0).argmin()]
        rank_NE[n, e] = rank
        room_R[rank] -= 1
        load_MR[:, rank] += load_MNE[:, n, e]
    return rank_NE


@njit(cache=True)
def route(
    load_MNE: Array, homes_E: Array, nodes_R: Array, open_N: Array, rank_NE: Array, rank_s: float, far_s: float
) -> Array:
    """tokens_MNE: token-slots that each node computes of each expert.

    open_N          ranks of each node that may compute
    rank_s, far_s   seconds of a token-slot on its rank (computing, near links), and on its node's links to others
    A node takes as long as its ranks with its load spread evenly, or with the heaviest standing copies, and its links
    with what comes or goes. From tokens at their own node, else at home, the best exchange after the other is made that
    makes the slowest node and the other one faster, until there is none.
    """
    steps, nodes, experts = load_MNE.shape
    tokens_MNE = np.zeros((steps, nodes, experts), dtype=np.int64)
    ranks_N = np.bincount(nodes_R)
    by_NEN = np.empty((nodes, experts, nodes), dtype=np.int64)  # of each source node, computed where
    load_N, into_N, out_N = np.empty(nodes, np.int64), np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    standing_R, first_N, second_N = (
        np.empty(nodes_R.size, np.int64),
        np.empty(nodes, np.int64),
        np.empty(nodes, np.int64),
    )
    seconds_N = np.empty(nodes)
    for m in range(steps):
        load_N[:] = 0
        into_N[:] = 0
        out_N[:] = 0
        standing_R[:] = 0
        by_NEN[:] = 0
        for q in range(nodes):
            for e in range(experts):
                n = q if rank_NE[q, e] >= 0 else nodes_R[homes_E[e]]
                tokens = load_MNE[m, q, e]
                by_NEN[q, e, n] = tokens
                load_N[n] += tokens
                if rank_NE[n, e] >= 0:
                    standing_R[rank_NE[n, e]] += tokens
                if n != q:
                    into_N[n] += tokens
                    out_N[q] += tokens
        for _ in range(EXCHANGES):
            first_N[:] = 0  # the heaviest and the second heaviest standing load of a node's ranks
            second_N[:] = 0
            for r in range(nodes_R.size):
                n = nodes_R[r]
                if standing_R[r] > first_N[n]:
                    first_N[n], second_N[n] = standing_R[r], first_N[n]
                elif standing_R[r] > second_N[n]:
                    second_N[n] = standing_R[r]
            slow = 0
            for n in range(nodes):
                most = max(load_N[n] / max(1, open_N[n]), first_N[n])
                seconds_N[n] = rank_s * most + far_s * max(into_N[n], out_N[n]) / ranks_N[n]
                if seconds_N[n] > seconds_N[slow]:
                    slow = n
            best, best_q, best_e, best_a, best_b, best_tokens = FEWEST_S, 0, 0, 0, 0, 0
            for e in range(experts):
                home = nodes_R[homes_E[e]]
                if home != slow and rank_NE[slow, e] < 0:
                    continue
                for other in range(nodes):
                    if other == slow or (home != other and rank_NE[other, e] < 0):
                        continue
                    before = max(seconds_N[slow], seconds_N[other])
                    for q in range(nodes):
                        for way in range(2):  # slow gives tokens away; slow gets its own back
                            a, b = (slow, other) if way == 0 else (other, slow)
                            if way == 1 and q != slow:
                                continue
                            tokens = by_NEN[q, e, a]
                            for _ in range(HALVINGS):
                                if tokens == 0:
                                    break
                                after = 0.0
                                for end in range(2):
                                    n, more = (a, -tokens) if end == 0 else (b, tokens)
                                    heavy = first_N[n]
                                    if rank_NE[n, e] >= 0:
                                        here = standing_R[rank_NE[n, e]]
                                        rest = second_N[n] if here == first_N[n] else first_N[n]
                                        heavy = max(rest, here + more)
                                    into = into_N[n] + (more if q != n else 0)
                                    out = out_N[n] - (more if q == n else 0)
                                    most = max((load_N[n] + more) / max(1, open_N[n]), heavy)
                                    after = max(after, rank_s * most + far_s * max(into, out) / ranks_N[n])
                                if before - after > best:
                                    best = before - after
                                    best_q, best_e, best_a, best_b, best_tokens = q, e, a, b, tokens
                                tokens //= 2
            if best_tokens == 0:
                break
            for end in range(2):
                n, more = (best_a, -best_tokens) if end == 0 else (best_b, best_tokens)
                by_NEN[best_q, best_e, n] += more
                load_N[n] += more
                if rank_NE[n, best_e] >= 0:
                    standing_R[rank_NE[n, best_e]] += more
                if n != best_q:
                    into_N[n] += more
                    out_N[best_q] += more
        for q in range(nodes):
            for e in range(experts):
                for n in range(nodes):
                    tokens_MNE[m, n, e] += by_NEN[q, e, n]
    return tokens_MNE
