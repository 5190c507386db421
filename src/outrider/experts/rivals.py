"""The compiled parts of rival planners that are not EPLB's. Pure; called by peers.py alone.

    adjust  FlexMoE's loop: one more vExpert for a hot expert, one less for a cool one, while the maximum falls
    spill   LLEP: a rank over its cap sends the rest of an expert's tokens, and its weights, to the emptiest ranks

Both are written from their papers' descriptions (FlexMoE, arXiv 2304.03946; LLEP, arXiv 2601.17111).
"""

from typing import Any

import numpy as np
from numba import njit

from outrider.experts.events import Array


@njit(cache=True)
def adjust(load_E: Array, hosts_RX: Array, room_R: Array, enough: float) -> int:
    """Change hosts_RX until no rank is over `enough` times the mean, or no change lowers the maximum; the changes made.

    A vExpert is a slot: tokens of an expert go evenly to all of its slots. Expand puts an expert of the fullest rank
    into an empty slot of another; where that has none, into the slot of its coolest expert that has another copy
    (shrink). The change that lowers the maximum most is made; ties go to the lower expert, then to the lower rank.
    room_R  slots of each rank, the first ones of a row; -1 in them: empty
    """
    ranks, experts = room_R.size, load_E.size
    copies_E = np.zeros(experts, dtype=np.int64)
    on_ER = np.zeros((experts, ranks), dtype=np.int64)
    for r in range(ranks):
        for e in hosts_RX[r, : room_R[r]]:
            if e >= 0:
                copies_E[e] += 1
                on_ER[e, r] += 1
    load_R = np.zeros(ranks)
    changes = 0
    while True:
        load_R = _even(load_E, copies_E, on_ER)
        fullest = int(load_R.argmax())
        most = load_R[fullest]
        if most <= enough * load_R.mean():
            return changes
        best, expert, rank, slot = most - 1e-6, -1, -1, -1
        for e in range(experts):
            if on_ER[e, fullest] == 0:
                continue
            each = load_E[e] / (copies_E[e] + 1)
            without = load_R + on_ER[e] * (each - load_E[e] / copies_E[e])
            for r in range(ranks):
                place = _place(load_E, hosts_RX[r], room_R[r], copies_E) if on_ER[e, r] == 0 else -1
                if place < 0:
                    continue
                after = without.copy()
                after[r] += each
                old = hosts_RX[r, place]
                if old >= 0:
                    left = load_E[old] / (copies_E[old] - 1)
                    after += on_ER[old] * (left - load_E[old] / copies_E[old])
                    after[r] -= left
                if after.max() < best:
                    best, expert, rank, slot = after.max(), e, r, place
        if rank < 0:
            return changes
        old = hosts_RX[rank, slot]
        if old >= 0:
            copies_E[old] -= 1
            on_ER[old, rank] -= 1
        hosts_RX[rank, slot] = expert
        copies_E[expert] += 1
        on_ER[expert, rank] += 1
        changes += 1


@njit(cache=True)
def _even(load_E: Array, copies_E: Array, on_ER: Array) -> Any:
    load_R = np.zeros(on_ER.shape[1])
    for e in range(load_E.size):
        load_R += on_ER[e] * (load_E[e] / copies_E[e])
    return load_R


@njit(cache=True)
def _place(load_E: Array, hosts_X: Array, room: int, copies_E: Array) -> int:
    """An empty slot, else that of the expert that has another copy and computes least; -1: there is none."""
    place, least = -1, 0.0
    for s in range(room):
        e = hosts_X[s]
        if e < 0:
            return s
        if copies_E[e] > 1 and (place < 0 or load_E[e] / copies_E[e] < least):
            place, least = s, load_E[e] / copies_E[e]
    return place


@njit(cache=True)
def spill(load_E: Array, homes_E: Array, ranks: int, factor: float, least: int) -> Array:
    """tokens_ER that each rank computes of each expert; experts with most tokens are placed first.

    factor  a rank takes up to this many times the mean (rounded down); its own experts yet to be placed count
    least   fewer tokens than this are not worth a copy, unless they are all that is left of an expert
    Where all ranks are full, what is left goes to the emptiest rank whatever it holds.
    """
    tokens_ER = np.zeros((load_E.size, ranks), dtype=np.int64)
    full_R = np.zeros(ranks, dtype=np.int64)  # tokens placed, and those of home experts not placed yet
    for e in range(load_E.size):
        full_R[homes_E[e]] += load_E[e]
    mean = load_E.sum() // ranks
    cap = max(int(factor * mean), 1) if mean > 0 else load_E.sum()
    for e in np.argsort(-load_E, kind="mergesort"):
        home, left = homes_E[e], load_E[e]
        full_R[home] -= left
        while left > 0:
            room = cap - full_R[home]
            if tokens_ER[e, home] == 0 and (room > 0 or ranks == 1):
                to, some = home, left if ranks == 1 else min(left, room)
            else:
                to, emptiest = -1, -1
                for r in range(ranks):
                    if r == home:
                        continue
                    if emptiest < 0 or full_R[r] < full_R[emptiest]:
                        emptiest = r
                    chunk = min(left, cap - full_R[r])
                    worth = chunk > 0 and (chunk >= least or chunk == left)
                    if worth and (to < 0 or full_R[r] < full_R[to]):
                        to = r
                some = left
                if to >= 0:
                    some = min(left, cap - full_R[to])
                else:
                    to = emptiest
            tokens_ER[e, to] += some
            full_R[to] += some
            left -= some
    return tokens_ER
