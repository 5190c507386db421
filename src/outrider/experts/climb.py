"""The compiled parts of a placement that changes little: better it copy by copy, and number it like the old one. Pure.

    mend   fill empty slots: experts that are nowhere first, then copies of the hottest
    climb  exchange and replicate experts of the fullest rank while that lowers it and lifts no other above it
    like   ranks of a placement renumbered so that most of their experts lie there already
    slots  experts of each rank in the slots where they lay

A placement is place_RS, the expert in each slot of each rank; tokens of an expert go evenly to all its slots, as in
serving engines. Called by adapters/vllm_eplb.py. Source: ours. Ties go to the lower slot, rank and expert.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from outrider.experts.events import Array

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Change(NamedTuple):
    """Slot s of rank r gets `expert`; the expert there goes to slot t of rank q, or, if q is -1, loses a copy."""

    r: int
    s: int
    q: int
    t: int
    expert: int


@njit(cache=True)
def holders(place_RS: Array, experts: int) -> Array:
    """on_ER: slots of each rank that hold the expert."""
    on_ER = np.zeros((experts, place_RS.shape[0]), dtype=np.int64)
    for r in range(place_RS.shape[0]):
        for e in place_RS[r]:
            if e >= 0:
                on_ER[e, r] += 1
    return on_ER


@njit(cache=True)
def loads(load_E: Floats, on_ER: Array) -> Floats:
    """load_R when the slots of an expert share evenly."""
    load_R = np.zeros(on_ER.shape[1])
    for e in range(load_E.size):
        load_R += on_ER[e] * (load_E[e] / max(on_ER[e].sum(), 1))
    return load_R


@njit(cache=True)
def mend(load_E: Floats, place_RS: Array) -> None:
    """Give each expert a slot and each empty slot (-1) an expert, on the emptiest rank; heaviest experts first.

    Where no slot is empty for an expert that is nowhere, a copy goes that computes least and is not the last.
    """
    on_ER = holders(place_RS, load_E.size)
    copies_E = on_ER.sum(axis=1)
    for e in np.argsort(-load_E, kind="mergesort"):
        if copies_E[e] == 0:
            r, s = _empty(place_RS, loads(load_E, on_ER))
            if r < 0:
                least = np.inf
                for q in range(place_RS.shape[0]):
                    for t in range(place_RS.shape[1]):
                        other = place_RS[q, t]
                        if copies_E[other] > 1 and load_E[other] / copies_E[other] < least:
                            r, s, least = q, t, load_E[other] / copies_E[other]
                copies_E[place_RS[r, s]] -= 1
                on_ER[place_RS[r, s], r] -= 1
            place_RS[r, s] = e
            copies_E[e] += 1
            on_ER[e, r] += 1
    while True:
        r, s = _empty(place_RS, loads(load_E, on_ER))
        if r < 0:
            return
        hottest = -1
        for e in range(load_E.size):
            if hottest < 0 or (on_ER[e, r] > 0, -load_E[e] / copies_E[e]) < (
                on_ER[hottest, r] > 0,
                -load_E[hottest] / copies_E[hottest],
            ):
                hottest = e
        place_RS[r, s] = hottest
        copies_E[hottest] += 1
        on_ER[hottest, r] += 1


@njit(cache=True)
def _empty(place_RS: Array, load_R: Floats) -> tuple[int, int]:
    """The first empty slot of the emptiest rank that has one; -1: none has."""
    rank, slot = -1, -1
    for r in range(place_RS.shape[0]):
        if rank >= 0 and load_R[r] >= load_R[rank]:
            continue
        for s in range(place_RS.shape[1]):
            if place_RS[r, s] < 0:
                rank, slot = r, s
                break
    return rank, slot


@njit(cache=True)
def climb(load_E: Floats, place_RS: Array, target: float) -> None:
    """Change place_RS until no rank has more than `target`, or nothing helps.

    A copy is an (expert, rank) pair that was not there at first. Of all changes the one is made that takes most off the
    fullest rank for each copy it costs. The loads, sorted from the largest, fall each time, so that it ends.
    """
    on_ER = holders(place_RS, load_E.size)
    first_ER = on_ER > 0
    while True:
        load_R = loads(load_E, on_ER)
        if load_R.max() <= target:
            return
        change = _best(load_E, place_RS, on_ER, first_ER, load_R)
        if change.r < 0:
            return
        r, s, q, t, e = change
        old = place_RS[r, s]
        place_RS[r, s] = e
        on_ER[old, r] -= 1
        on_ER[e, r] += 1
        if q >= 0:
            place_RS[q, t] = old
            on_ER[e, q] -= 1
            on_ER[old, q] += 1


@njit(cache=True)
def _best(load_E: Floats, place_RS: Array, on_ER: Array, first_ER: Any, load_R: Floats) -> Change:
    ranks, slots = place_RS.shape
    hot = int(load_R.argmax())
    least = 1e-6 * load_R.mean()
    copies_E = on_ER.sum(axis=1)
    best, best_gain = Change(-1, -1, -1, -1, -1), 0.0
    for s in range(slots):
        a = place_RS[hot, s]
        share = load_E[a] / copies_E[a]
        for r in range(ranks):
            if r == hot or on_ER[a, r] > 0:
                continue
            for t in range(slots):
                b = place_RS[r, t]
                if on_ER[b, hot] == 0:  # exchange a and b
                    off = share - load_E[b] / copies_E[b]
                    gain = min(off, load_R[hot] - load_R[r] - off)
                    copies = _new(on_ER, first_ER, a, b, r) + _new(on_ER, first_ER, b, a, hot)
                    if gain > least and gain / max(copies, 0.5) > best_gain:
                        best_gain = gain / max(copies, 0.5)
                        best = Change(hot, s, r, t, b)
                if copies_E[b] > 1:  # another copy of a in place of one of b
                    gain = _gain(load_E, on_ER, copies_E, load_R, a, b, r)
                    copies = _new(on_ER, first_ER, a, b, r)
                    if gain > least and gain / max(copies, 0.5) > best_gain:
                        best_gain = gain / max(copies, 0.5)
                        best = Change(r, t, -1, -1, a)
        if copies_E[a] > 1:  # another expert in place of this copy of a
            for e in range(load_E.size):
                if on_ER[e, hot] == 0:
                    gain = _gain(load_E, on_ER, copies_E, load_R, e, a, hot)
                    copies = _new(on_ER, first_ER, e, a, hot)
                    if gain > least and gain / max(copies, 0.5) > best_gain:
                        best_gain = gain / max(copies, 0.5)
                        best = Change(hot, s, -1, -1, e)
    return best


@njit(cache=True)
def _new(on_ER: Array, first_ER: Any, comes: int, goes: int, r: int) -> int:
    """Copies that it costs when an expert comes to rank r, where it is not, and a slot's goes."""
    new = 0 if first_ER[comes, r] else 1
    if on_ER[goes, r] == 1 and not first_ER[goes, r]:
        new -= 1
    return new


@njit(cache=True)
def _gain(load_E: Floats, on_ER: Array, copies_E: Array, load_R: Floats, more: int, less: int, r: int) -> float:
    """By how much all ranks that change stay below the fullest if rank r gives a slot of `less` to `more`."""
    now_more, now_less = load_E[more] / copies_E[more], load_E[less] / copies_E[less]
    new_more, new_less = load_E[more] / (copies_E[more] + 1), load_E[less] / (copies_E[less] - 1)
    most, gain = load_R.max(), np.inf
    for x in range(load_R.size):
        if x == r or on_ER[more, x] > 0 or on_ER[less, x] > 0:
            after = load_R[x] + on_ER[more, x] * (new_more - now_more) + on_ER[less, x] * (new_less - now_less)
            if x == r:
                after += new_more - new_less
            gain = min(gain, most - after)
    return gain


@njit(cache=True)
def like(place_RS: Array, old_RS: Array, experts: int, size: int) -> Array:
    """place_RS with its ranks in another order: first groups of `size` ranks (nodes), then ranks in each.

    Pairs that share most experts are put together first, and the order as it is stays where that shares as many.
    """
    ranks = place_RS.shape[0]
    on_ER, old_ER = holders(place_RS, experts), holders(old_RS, experts)
    shared = np.zeros((ranks, ranks), dtype=np.int64)
    for r in range(ranks):
        for q in range(ranks):
            shared[r, q] = ((on_ER[:, r] > 0) & (old_ER[:, q] > 0)).sum()
    nodes = ranks // size
    inside = np.zeros((ranks, ranks), dtype=np.int64)  # in row node * size + i: the rank of the node that goes there
    whole = np.zeros((nodes, nodes), dtype=np.int64)
    for a in range(nodes):
        for b in range(nodes):
            block = shared[a * size : (a + 1) * size, b * size : (b + 1) * size]
            order = _match(block)
            for i in range(size):
                inside[a * size + i, b] = order[i]
                whole[a, b] += block[i, order[i]]
    to_node = _match(whole)
    out = np.empty_like(place_RS)
    for a in range(nodes):
        for i in range(size):
            out[to_node[a] * size + inside[a * size + i, to_node[a]]] = place_RS[a * size + i]
    return out


@njit(cache=True)
def _match(worth: Array) -> Array:
    """Column of each row: the largest first, ties to the lower row and column; the diagonal if that is no less."""
    n = worth.shape[0]
    to = np.full(n, -1, dtype=np.int64)
    taken = np.zeros(n, dtype=np.bool_)
    total = 0
    for _ in range(n):
        row, column = -1, -1
        for i in range(n):
            if to[i] >= 0:
                continue
            for j in range(n):
                if not taken[j] and (row < 0 or worth[i, j] > worth[row, column]):
                    row, column = i, j
        to[row] = column
        taken[column] = True
        total += worth[row, column]
    if np.diag(worth).sum() >= total:
        to[:] = np.arange(n)
    return to


@njit(cache=True)
def slots(place_RS: Array, old_RS: Array) -> Array:
    """place_RS with the experts of each rank in the slots where they lay; the others fill up, in their order."""
    out = np.full(place_RS.shape, -1, dtype=np.int64)
    width = place_RS.shape[1]
    for r in range(place_RS.shape[0]):
        stays = np.zeros(width, dtype=np.bool_)
        for t in range(width):
            for s in range(width):
                if not stays[s] and place_RS[r, s] == old_RS[r, t]:
                    stays[s] = True
                    out[r, t] = place_RS[r, s]
                    break
        t = 0
        for s in range(width):
            if not stays[s]:
                while out[r, t] >= 0:
                    t += 1
                out[r, t] = place_RS[r, s]
    return out
