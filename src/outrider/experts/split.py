"""Split: how many tokens of each expert each of its holders computes, so that the fullest rank is as empty as it can
be. Exact, integer, with a proof. Pure; called by plan.py.

Tokens flow from experts to the ranks that hold them; t is the largest rank load allowed. Start at t = ceil(mean) with
every token at home, and push the excess of overfull ranks along shortest paths (rank -> one of its experts -> another
holder) until it finds room. If it cannot, let U be the ranks reached and X the experts with tokens there: every holder
of X lies in U, so no split can do better than ceil(C(X) / |U|). That becomes t, and the flow so far stays valid. The
last such (X, U) is the certificate: "the load cannot go below t, as experts X live only on ranks U".
Source: parametric max-flow on a transportation problem; the excess form and the cut are ours.
"""

import msgspec
import numpy as np

from outrider.experts.compiled import compiled
from outrider.experts.events import Array


class Split(msgspec.Struct, frozen=True, eq=False):
    """most: the largest rank load, the least possible for these holders.

    expert, rank, tokens  [holders] one entry per (expert, holder), sorted by (expert, rank); zero tokens included
    proof_E, proof_R      1 where the expert, the rank belongs to the certificate: C(X) > (most - 1) * |U|
    """

    most: int
    expert: Array
    rank: Array
    tokens: Array
    proof_E: Array
    proof_R: Array


def split(load_E: Array, homes_E: Array, replicas_RS: Array) -> Split:
    """The exact integer split of load_E tokens per expert over the experts' holders.

    homes_E      home rank of each expert
    replicas_RS  expert in each spare slot of each rank, -1 for none; a copy beside its own home counts once
    Deterministic: paths are searched in order of (rank, expert id, holder rank).
    """
    return Split(*_push(load_E, homes_E, replicas_RS.shape[0], *_holders(homes_E, replicas_RS)))


@compiled
def _push(
    load_E: Array, homes_E: Array, ranks: int, first: Array, expert: Array, rank: Array
) -> tuple[int, Array, Array, Array, Array, Array]:
    experts = load_E.size
    holders = expert.size

    # The same entries by rank: by_rank[start[r]:start[r + 1]], in order of expert id.
    start = np.zeros(ranks + 1, dtype=np.int64)
    for i in range(holders):
        start[rank[i] + 1] += 1
    for r in range(ranks):
        start[r + 1] += start[r]
    by_rank = np.empty(holders, dtype=np.int64)
    filled = start[:-1].copy()
    for i in range(holders):
        by_rank[filled[rank[i]]] = i
        filled[rank[i]] += 1

    tokens = np.zeros(holders, dtype=np.int64)
    load_R = np.zeros(ranks, dtype=np.int64)
    for i in range(holders):
        if rank[i] == homes_E[expert[i]]:
            tokens[i] = load_E[expert[i]]
            load_R[rank[i]] += tokens[i]
    most = -(-load_R.sum() // ranks)

    proof_E = np.ones(experts, dtype=np.int64)
    proof_R = np.ones(ranks, dtype=np.int64)
    queue = np.empty(ranks, dtype=np.int64)
    came_from = np.empty(ranks, dtype=np.int64)  # entry that gives tokens on the step into this rank; -1: a root
    came_to = np.empty(ranks, dtype=np.int64)  # entry that takes them
    seen_R = np.empty(ranks, dtype=np.int64)
    seen_E = np.empty(experts, dtype=np.int64)
    while True:
        seen_R[:] = 0
        seen_E[:] = 0
        tail = 0
        for r in range(ranks):
            if load_R[r] > most:
                queue[tail] = r
                tail += 1
                seen_R[r] = 1
                came_from[r] = -1
        if tail == 0:
            return most, expert, rank, tokens, proof_E, proof_R
        head = 0
        room = -1
        while head < tail and room < 0:
            r = queue[head]
            head += 1
            for at in range(start[r], start[r + 1]):
                i = by_rank[at]
                e = expert[i]
                if tokens[i] == 0 or seen_E[e] == 1:
                    continue
                seen_E[e] = 1
                for j in range(first[e], first[e + 1]):
                    other = rank[j]
                    if seen_R[other] == 1:
                        continue
                    seen_R[other] = 1
                    came_from[other] = i
                    came_to[other] = j
                    queue[tail] = other
                    tail += 1
                    if load_R[other] < most and room < 0:
                        room = other
                if room >= 0:
                    break
        if room < 0:  # a cut: nothing on the ranks reached can leave them
            inside = 0
            for r in range(ranks):
                inside += load_R[r] * seen_R[r]
            most = -(-inside // seen_R.sum())
            proof_E[:] = seen_E
            proof_R[:] = seen_R
            continue
        amount = most - load_R[room]
        r = room
        while came_from[r] >= 0:
            amount = min(amount, tokens[came_from[r]])
            r = rank[came_from[r]]
        amount = min(amount, load_R[r] - most)
        load_R[r] -= amount
        load_R[room] += amount
        r = room
        while came_from[r] >= 0:
            tokens[came_from[r]] -= amount
            tokens[came_to[r]] += amount
            r = rank[came_from[r]]


@compiled
def _holders(homes_E: Array, replicas_RS: Array) -> tuple[Array, Array, Array]:
    """Entries sorted by (expert, rank): those of expert e are first[e]:first[e + 1]."""
    experts = homes_E.size
    ranks, slots = replicas_RS.shape
    first = np.zeros(experts + 1, dtype=np.int64)
    counted = np.zeros((ranks, slots), dtype=np.int64)
    for r in range(ranks):
        for s in range(slots):
            e = replicas_RS[r, s]
            if e >= 0 and homes_E[e] != r:
                counted[r, s] = 1
                for earlier in range(s):
                    if replicas_RS[r, earlier] == e:
                        counted[r, s] = 0
                first[e + 1] += counted[r, s]
    for e in range(experts):
        first[e + 1] += first[e] + 1
    expert = np.empty(first[experts], dtype=np.int64)
    rank = np.empty(first[experts], dtype=np.int64)
    filled = first[:-1].copy()
    for r in range(ranks):
        for s in range(slots):
            if counted[r, s] == 1:
                e = replicas_RS[r, s]
                expert[filled[e]] = e
                rank[filled[e]] = r
                filled[e] += 1
    for e in range(experts):  # the home goes where its rank belongs
        at = filled[e]
        while at > first[e] and rank[at - 1] > homes_E[e]:
            rank[at] = rank[at - 1]
            at -= 1
        expert[filled[e]] = e
        rank[at] = homes_E[e]
    return first, expert, rank
