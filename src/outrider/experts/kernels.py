"""The compiled heart of planning: tokens of one layer as a flow from experts to the ranks that hold them. Pure.

    lay      every token at its home, copies empty
    push     shift tokens along shortest residual paths until no rank is over `most`, or nothing helps
    exact    the least `most` that these holders allow, with the cut that proves it
    improve  new copies, one by one, where they let the most excess drain
    place    all of it, layer by layer: the only function that plan.py calls

A residual path leads rank -> expert with tokens there -> another holder of that expert -> ... Three quantities steer
`improve`: `wide_R`, the excess that can be brought to a rank along such paths; `deep_R`, the tokens that a rank can
take in and pass on to ranks with room; and the tokens of an expert. The least of the three is what a new copy of that
expert, from the one rank to the other, drains at once. Counting chains is what fills the last tokens (docs/log.md).

Everything is integer; ties go to the copy that the known micro-steps ahead need more, then to the lower rank and
expert. numba caches compiled code beside the file; all of it lies here, since its cache watches one file only.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from outrider.experts.events import Array

FAR = 1 << 60
UNKNOWN = -2


class Layer(NamedTuple):
    """What is given for one layer: home and slots, node of each rank, and what H micro-steps ahead will need."""

    homes_E: Array
    slots_R: Array
    nodes_R: Array
    bias_R: Array
    spill_EH: Array  # of each expert in each of those: tokens that its home, over ceil(mean), would give away
    room_RH: Array  # of each rank: what it is below ceil(mean) at home
    least_gain: int  # tokens that a new copy must drain to be worth its move


class Proof(NamedTuple):
    """The cut behind a largest load: 1 for the experts X and the ranks U that belong to it."""

    experts_E: Array
    ranks_R: Array


class Flow(NamedTuple):
    """One layer's working memory, reused for every layer. R ranks, E experts, X experts on a rank, H holders."""

    held_ER: Array  # 1 where the rank holds the expert
    tokens_ER: Array
    load_R: Array
    on_RX: Array  # experts on each rank: homes, then copies; the first on_R[r] are valid
    on_R: Array
    at_EH: Array  # ranks that hold each expert, its home first; the first at_E[e] are valid
    at_E: Array
    queue_R: Array
    via_expert_R: Array  # the step into a rank on the path found: this expert, from that rank; -1: the path's root
    via_rank_R: Array
    seen_R: Array
    seen_E: Array
    wide_R: Array
    deep_R: Array
    picks_RP: Array


def flow_of(experts: int, ranks: int, slots: int) -> Flow:
    """Working memory for layers of this shape; `slots` is the largest number of spare slots of a rank."""
    row, column = np.zeros(ranks, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    return Flow(
        held_ER=np.zeros((experts, ranks), dtype=np.uint8),
        tokens_ER=np.zeros((experts, ranks), dtype=np.int32),
        load_R=row.copy(),
        on_RX=np.zeros((ranks, experts + slots), dtype=np.int16),
        on_R=row.copy(),
        at_EH=np.zeros((experts, ranks), dtype=np.int16),
        at_E=column.copy(),
        queue_R=row.copy(),
        via_expert_R=row.copy(),
        via_rank_R=row.copy(),
        seen_R=row.copy(),
        seen_E=column.copy(),
        wide_R=row.copy(),
        deep_R=row.copy(),
        picks_RP=np.zeros((ranks, 4), dtype=np.int64),
    )


@njit(cache=True)
def lay(flow: Flow, load_E: Array, homes_E: Array, bias_R: Array, replicas_RS: Array) -> None:
    """All tokens at home; each copy in `replicas_RS` is a holder without tokens. A copy beside its home counts once.

    bias_R: tokens that a rank counts as carrying already (or as not carrying): slower ranks get so many fewer.
    """
    flow.held_ER[:] = 0
    flow.tokens_ER[:] = 0
    flow.load_R[:] = bias_R
    flow.on_R[:] = 0
    flow.at_E[:] = 0
    for e in range(load_E.size):
        add(flow, e, homes_E[e])
        flow.tokens_ER[e, homes_E[e]] = load_E[e]
        flow.load_R[homes_E[e]] += load_E[e]
    for r in range(replicas_RS.shape[0]):
        for s in range(replicas_RS.shape[1]):
            e = replicas_RS[r, s]
            if e >= 0 and flow.held_ER[e, r] == 0:
                add(flow, e, r)


@njit(cache=True)
def add(flow: Flow, e: int, r: int) -> None:
    """Rank r holds expert e from now on."""
    flow.held_ER[e, r] = 1
    flow.on_RX[r, flow.on_R[r]] = e
    flow.on_R[r] += 1
    flow.at_EH[e, flow.at_E[e]] = r
    flow.at_E[e] += 1


@njit(cache=True)
def remove(flow: Flow, homes_E: Array, e: int, r: int) -> None:
    """Rank r gives up its copy of e; what it computed goes back to e's home."""
    home = homes_E[e]
    flow.tokens_ER[e, home] += flow.tokens_ER[e, r]
    flow.load_R[home] += flow.tokens_ER[e, r]
    flow.load_R[r] -= flow.tokens_ER[e, r]
    flow.tokens_ER[e, r] = 0
    flow.held_ER[e, r] = 0
    _cut(flow.on_RX[r], flow.on_R, r, e)
    _cut(flow.at_EH[e], flow.at_E, e, r)


@njit(cache=True)
def _cut(row: Array, sizes: Array, at: int, value: int) -> None:
    i = 0
    while row[i] != value:
        i += 1
    for j in range(i, sizes[at] - 1):
        row[j] = row[j + 1]
    sizes[at] -= 1


@njit(cache=True)
def push(flow: Flow, most: int) -> int:
    """Drain ranks above `most` into ranks below it; the excess that is left.

    Where some is left, seen_R and seen_E are the cut: every holder of an expert seen lies in a rank seen, and all those
    ranks hold `most` at least.
    """
    load_R, tokens_ER = flow.load_R, flow.tokens_ER
    for r in range(load_R.size):  # paths of one step, which are most, without a search
        for i in range(flow.on_R[r]):
            if load_R[r] <= most:
                break
            e = flow.on_RX[r, i]
            for j in range(flow.at_E[e]):
                other = flow.at_EH[e, j]
                amount = min(tokens_ER[e, r], load_R[r] - most, most - load_R[other])
                if amount > 0:
                    tokens_ER[e, r] -= amount
                    tokens_ER[e, other] += amount
                    load_R[r] -= amount
                    load_R[other] += amount
    while True:
        flow.seen_R[:] = 0
        flow.seen_E[:] = 0
        tail, excess = 0, 0
        for r in range(load_R.size):
            if load_R[r] > most:
                flow.queue_R[tail] = r
                tail += 1
                flow.seen_R[r] = 1
                flow.via_expert_R[r] = -1
                excess += load_R[r] - most
        if excess == 0:
            return excess
        head, room = 0, -1
        while head < tail and room < 0:
            r = flow.queue_R[head]
            head += 1
            for i in range(flow.on_R[r]):
                e = flow.on_RX[r, i]
                if tokens_ER[e, r] == 0 or flow.seen_E[e] == 1:
                    continue
                flow.seen_E[e] = 1
                for j in range(flow.at_E[e]):
                    other = flow.at_EH[e, j]
                    if flow.seen_R[other] == 1:
                        continue
                    flow.seen_R[other] = 1
                    flow.via_expert_R[other] = e
                    flow.via_rank_R[other] = r
                    flow.queue_R[tail] = other
                    tail += 1
                    if load_R[other] < most and room < 0:
                        room = other
                if room >= 0:
                    break
        if room < 0:
            return excess
        amount, r = most - load_R[room], room
        while flow.via_expert_R[r] >= 0:
            amount = min(amount, tokens_ER[flow.via_expert_R[r], flow.via_rank_R[r]])
            r = flow.via_rank_R[r]
        amount = min(amount, load_R[r] - most)
        load_R[r] -= amount
        load_R[room] += amount
        r = room
        while flow.via_expert_R[r] >= 0:
            e, before = flow.via_expert_R[r], flow.via_rank_R[r]
            tokens_ER[e, before] -= amount
            tokens_ER[e, r] += amount
            r = before


@njit(cache=True)
def exact(flow: Flow, ranks: int, proof: Proof) -> int:
    """Push to the least `most` there is, from ceil(mean) over `ranks` ranks; the proof is the last cut, or all.

    The cut (X, U) says that experts X lie on ranks U alone, so no split does better than ceil(C(X) / |U|); the flow
    stays valid when `most` rises to that. Source: parametric max-flow on a transportation problem, in excess form.
    """
    most = -(-flow.load_R.sum() // ranks)
    proof.experts_E[:] = 1
    proof.ranks_R[:] = 1
    while push(flow, most) > 0:
        most = -(-(flow.load_R * flow.seen_R).sum() // flow.seen_R.sum())
        proof.experts_E[:] = flow.seen_E
        proof.ranks_R[:] = flow.seen_R
    return int(most)


@njit(cache=True)
def _measure(flow: Flow, most: int) -> None:
    """wide_R and deep_R after a push that left some excess: relax until nothing grows."""
    wide_R, deep_R, load_R, tokens_ER = flow.wide_R, flow.deep_R, flow.load_R, flow.tokens_ER
    for r in range(load_R.size):
        wide_R[r] = max(0, load_R[r] - most)
        deep_R[r] = max(0, most - load_R[r])
    grows = True
    while grows:
        grows = False
        for r in range(load_R.size):
            brings = flow.seen_R[r] == 1
            if not brings and load_R[r] < most:
                continue
            for i in range(flow.on_R[r]):
                e = flow.on_RX[r, i]
                here = tokens_ER[e, r]
                if flow.at_E[e] == 1 or here == 0:
                    continue
                for j in range(flow.at_E[e]):
                    other = flow.at_EH[e, j]
                    if brings:
                        amount = min(here, wide_R[r])
                        if load_R[other] <= most and amount > wide_R[other]:
                            wide_R[other] = amount
                            grows = True
                    else:
                        amount = min(here, deep_R[other])
                        if amount > deep_R[r]:
                            deep_R[r] = amount
                            grows = True


@njit(cache=True)
def _worth(given: Layer, e: int, r: int) -> int:
    """Tokens that a copy of e on r would take off e's home in the micro-steps ahead, each counting half the last."""
    total = 0
    for h in range(given.room_RH.shape[1]):
        total += min(given.spill_EH[e, h], given.room_RH[r, h]) >> h
    return total


@njit(cache=True)
def _slot(flow: Flow, given: Layer, replicas_RS: Array, r: int) -> tuple[int, int]:
    """The slot of rank r to be taken next and what its copy computes: empty, idle and worth least, computing least.

    Slot -1 where r has none.
    """
    slot, loss, least = -1, FAR, FAR
    for s in range(given.slots_R[r]):
        e = replicas_RS[r, s]
        computes, worth = 0, -1
        if e >= 0:
            computes = flow.tokens_ER[e, r] if given.homes_E[e] != r else 0
            worth = _worth(given, e, r) if computes == 0 else 0
        if computes < loss or (computes == loss and worth < least):
            slot, loss, least = s, computes, worth
    return slot, loss


@njit(cache=True)
def _choose(flow: Flow, given: Layer, replicas_RS: Array, across: bool) -> int:
    """For each rank the copy that drains most there, less what its slot computes now: `picks_RP`; the most of all.

    picks_RP [ranks, 4]: gain, expert, from rank, slot. across: copies from another node, or only from the own one.
    """
    ranks = given.slots_R.size
    one_node = given.nodes_R[ranks - 1] == given.nodes_R[0]
    most = 0
    if across and one_node:
        return most
    off_R = flow.queue_R  # what one expert can take off each rank at most
    for u in range(ranks):
        off_R[u] = 0
        for i in range(flow.on_R[u]):
            off_R[u] = max(off_R[u], min(flow.wide_R[u], flow.tokens_ER[flow.on_RX[u, i], u]))
    for r in range(ranks):
        flow.picks_RP[r, 0] = 0
        if flow.seen_R[r] == 1 or flow.deep_R[r] < given.least_gain or flow.deep_R[r] * 2 < most:
            continue
        slot, loss = _slot(flow, given, replicas_RS, r)
        if slot < 0:
            continue
        best, best_worth = given.least_gain, -1
        pick = flow.picks_RP[r]
        for u in range(ranks):
            limit = min(flow.deep_R[r] + loss, off_R[u])
            if limit - loss < best:
                continue
            for i in range(flow.on_R[u]):
                e = flow.on_RX[u, i]
                gain = min(limit, flow.tokens_ER[e, u]) - loss
                if gain < best or flow.held_ER[e, r] == 1 or (not one_node and across == _near(flow, given, e, r)):
                    continue
                worth = UNKNOWN
                if gain == best:  # ties alone need to know what is ahead
                    if best_worth == UNKNOWN:
                        best_worth = _worth(given, pick[1], r)
                    worth = _worth(given, e, r)
                if gain > best or worth > best_worth:
                    best, best_worth = gain, worth
                    pick[0], pick[1], pick[2], pick[3] = gain, e, u, slot
        most = max(most, flow.picks_RP[r, 0])
    return most


@njit(cache=True)
def _bring_best(flow: Flow, given: Layer, replicas_RS: Array, most: int, first: int) -> None:
    """Bring the best picks, as long as each still drains half of what the first did."""
    while True:
        r = 0
        for other in range(given.slots_R.size):
            if flow.picks_RP[other, 0] > flow.picks_RP[r, 0]:
                r = other
        gain, e, u, s = flow.picks_RP[r, 0], flow.picks_RP[r, 1], flow.picks_RP[r, 2], flow.picks_RP[r, 3]
        if gain * 2 < max(first, 1):  # taken or none: zero
            return
        flow.picks_RP[r, 0] = 0
        if flow.wide_R[u] * 2 < first or flow.tokens_ER[e, u] * 2 < first:
            continue
        _bring(flow, given, replicas_RS, e, r, s)
        flow.wide_R[u] -= gain
        amount = min(flow.tokens_ER[e, u], flow.load_R[u] - most, most - flow.load_R[r])
        if amount > 0:
            flow.tokens_ER[e, u] -= amount
            flow.tokens_ER[e, r] += amount
            flow.load_R[u] -= amount
            flow.load_R[r] += amount


@njit(cache=True)
def _near(flow: Flow, given: Layer, e: int, r: int) -> bool:
    """Is a holder of e in r's node?"""
    for j in range(flow.at_E[e]):  # noqa: SIM110 - numba compiles loops, not generators
        if given.nodes_R[flow.at_EH[e, j]] == given.nodes_R[r]:
            return True
    return False


@njit(cache=True)
def _bring(flow: Flow, given: Layer, replicas_RS: Array, e: int, r: int, s: int) -> None:
    """A copy of e takes slot s of rank r."""
    old = replicas_RS[r, s]
    if old >= 0 and given.homes_E[old] != r:
        remove(flow, given.homes_E, old, r)
    replicas_RS[r, s] = e
    add(flow, e, r)


@njit(cache=True)
def improve(flow: Flow, most: int, given: Layer, replicas_RS: Array) -> None:
    """Put copies into `replicas_RS` until no rank is over `most`, or the excess falls no more."""
    before = FAR
    while True:
        excess = push(flow, most)
        if excess == 0 or excess >= before:
            return
        before = excess
        _measure(flow, most)
        gain = _choose(flow, given, replicas_RS, False)
        if gain == 0:
            gain = _choose(flow, given, replicas_RS, True)
        if gain == 0:
            return
        _bring_best(flow, given, replicas_RS, most, gain)


@njit(cache=True)
def rough(flow: Flow, most: int, given: Layer, replicas_RS: Array) -> None:
    """The large copies first, node by node, straight from the hottest rank to the coldest that has a slot to spare.

    In each node as long as a copy takes off half of what the node's first one did.
    """
    load_R, ranks = flow.load_R, given.slots_R.size
    begin = 0
    while begin < ranks:
        end = begin + 1
        while end < ranks and given.nodes_R[end] == given.nodes_R[begin]:
            end += 1
        first = 0
        while True:
            hot, cold, slot = begin, -1, -1
            for r in range(begin, end):
                if load_R[r] > load_R[hot]:
                    hot = r
            if load_R[hot] <= most:
                break
            for r in range(begin, end):
                if load_R[r] < most and (cold < 0 or load_R[r] < load_R[cold]):
                    s, loss = _slot(flow, given, replicas_RS, r)
                    if s >= 0 and loss == 0:
                        cold, slot = r, s
            if cold < 0:
                break
            want = min(load_R[hot] - most, most - load_R[cold])
            chosen, amount, best_worth = -1, 0, -1
            for i in range(flow.on_R[hot]):
                e = flow.on_RX[hot, i]
                some = min(want, flow.tokens_ER[e, hot])
                if some < max(amount, 1) or flow.held_ER[e, cold] == 1:
                    continue
                worth = _worth(given, e, cold)
                if some > amount or worth > best_worth:
                    chosen, amount, best_worth = e, some, worth
            first = max(first, amount)
            if amount < given.least_gain or amount * 2 < first:
                break
            _bring(flow, given, replicas_RS, chosen, cold, slot)
            flow.tokens_ER[chosen, hot] -= amount
            flow.tokens_ER[chosen, cold] += amount
            load_R[hot] -= amount
            load_R[cold] += amount
        begin = end


@njit(cache=True)
def _keep(flow: Flow, slots_R: Array, previous_RS: Array, replicas_RS: Array) -> None:
    """Copies that compute something: in the slot they had, else in the first that is free; old copies in the rest."""
    for r in range(slots_R.size):
        active = replicas_RS[r].copy()
        replicas_RS[r] = previous_RS[r]
        for i in range(active.size):
            if active[i] >= 0 and flow.tokens_ER[active[i], r] == 0:
                active[i] = -1
        for pick in range(3):  # what stays; then into empty slots; then over idle copies
            for i in range(active.size):
                if active[i] < 0:
                    continue
                for s in range(slots_R[r]):
                    old = replicas_RS[r, s]
                    fits = old == active[i] if pick == 0 else old < 0
                    if pick == 2 and old >= 0:
                        fits = flow.tokens_ER[old, r] == 0
                    if fits:
                        replicas_RS[r, s] = active[i]
                        active[i] = -1
                        break


@njit(cache=True)
def _place_layer(
    flow: Flow, load_E: Array, ranks: int, given: Layer, previous_RS: Array, replicas_RS: Array, proof: Proof
) -> int:
    """The lowest of four attempts, or the first that is perfect: from the copies that are there or from none, large
    copies first or not. The flow and the proof are the result's."""
    least = -(-(load_E.sum() + given.bias_R.sum()) // ranks)
    lowest = FAR
    trial_RS = np.empty_like(previous_RS)
    for attempt in range(4):
        trial_RS[:] = previous_RS
        if attempt % 2 == 1:
            trial_RS[:] = -1
        lay(flow, load_E, given.homes_E, given.bias_R, trial_RS)
        if attempt < 2 and push(flow, least) > 0:
            rough(flow, least, given, trial_RS)
        improve(flow, least, given, trial_RS)
        most = exact(flow, ranks, proof)
        if most < lowest:
            lowest = most
            _keep(flow, given.slots_R, previous_RS, trial_RS)
            replicas_RS[:] = trial_RS
        if lowest == least:
            return lowest
    lay(flow, load_E, given.homes_E, given.bias_R, replicas_RS)  # the proof must speak of these holders, idle ones too
    return exact(flow, ranks, proof)


@njit(cache=True)
def place(
    flow: Flow,
    load_LE: Array,
    ranks: int,
    homes_LE: Array,
    slots_R: Array,
    nodes_R: Array,
    previous_LRS: Array,
    ahead_LHE: Array,
    bias_LR: Array,
    least_gain: int,
    replicas_LRS: Array,
    most_L: Array,
    proof_LE: Array,
    proof_LR: Array,
) -> Array:
    """Place copies and split tokens in every layer. ranks: those that may hold experts at all.

    Fills replicas_LRS, most_L, proof_LE, proof_LR; returns shares [n, 4]: layer, expert, rank, tokens, in that order,
    one row for each holder that computes something.
    """
    layers, experts = load_LE.shape
    horizon = ahead_LHE.shape[1]
    spill_EH = np.empty((experts, horizon), dtype=np.int64)
    room_RH = np.empty((slots_R.size, horizon), dtype=np.int64)
    shares = np.empty((layers * (experts + slots_R.sum()), 4), dtype=np.int64)
    n = 0
    for layer in range(layers):
        for h in range(horizon):
            room_RH[:, h] = -(-ahead_LHE[layer, h].sum() // ranks)
            for e in range(experts):
                room_RH[homes_LE[layer, e], h] -= ahead_LHE[layer, h, e]
            for e in range(experts):
                spill_EH[e, h] = max(0, min(-room_RH[homes_LE[layer, e], h], ahead_LHE[layer, h, e]))
            room_RH[:, h] = np.maximum(0, room_RH[:, h])
        given = Layer(homes_LE[layer], slots_R, nodes_R, bias_LR[layer], spill_EH, room_RH, least_gain)
        proof = Proof(proof_LE[layer], proof_LR[layer])
        _place_layer(flow, load_LE[layer], ranks, given, previous_LRS[layer], replicas_LRS[layer], proof)
        most_L[layer] = (flow.load_R - bias_LR[layer]).max()
        for e in range(experts):
            for r in range(slots_R.size):
                if flow.tokens_ER[e, r] > 0:
                    shares[n, 0], shares[n, 1], shares[n, 2], shares[n, 3] = layer, e, r, flow.tokens_ER[e, r]
                    n += 1
    return shares[:n]
