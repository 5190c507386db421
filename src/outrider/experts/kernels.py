"""The compiled heart of planning: tokens of one layer as a flow from experts to the ranks that hold them. Pure.

    lay      every token at its home, copies empty
    push     shift tokens along residual paths until no rank is over `most`, or nothing helps
    exact    the least `most` that these holders allow, with the cut that proves it
    improve  new copies where they let the most excess drain, a batch at a time
    place    all of it, layer by layer: the only function that plan.py calls

A residual path leads rank -> expert with tokens there -> another holder of that expert -> ... Three quantities steer
`improve`: `wide_R`, the excess that can be brought to a rank along such paths; `deep_R`, the tokens that a rank can
take in and pass on to ranks with room; and the tokens of an expert. The least of the three is what a new copy of that
expert, from the one rank to the other, drains at once. Counting chains is what fills the last tokens (docs/log.md).

Everything is integer; ties go to the copy that the known micro-steps ahead need more, then to the lower rank and
expert. numba caches compiled code beside the file; all of it lies here, since its cache watches one file only.
Small numbers lie in unsigned tables, as an index that may be negative costs a comparison; and what is hard to predict
is written without branches.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from outrider.experts.events import Array

FAR = 1 << 60


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
    """One layer's working memory, reused for every layer. R ranks, E experts, H holders of an expert, P picks."""

    tokens_ER: Array  # -1 where the rank does not hold the expert
    load_R: Array
    at_EH: Array  # ranks that hold each expert, its home first; the first at_E[e] are valid
    at_E: Array
    on_RX: Array  # experts on each rank that other ranks hold too; the first on_R[r] are valid
    on_R: Array
    queue_R: Array
    seen_R: Array
    seen_E: Array
    wide_R: Array
    from_expert_R: Array  # the last step of a path into a rank: this expert, from that rank; the rank itself at a root
    from_rank_R: Array
    deep_R: Array
    to_expert_R: Array  # the first step of a path out of a rank
    to_rank_R: Array
    pick_expert_P: Array
    pick_rank_P: Array
    near_expert_P: Array
    near_rank_P: Array
    near_wide_P: Array


@njit(cache=True)
def flow_of(experts: int, ranks: int, slots: int) -> Flow:
    """Working memory for layers of this shape; `slots` is the largest number of spare slots of a rank."""
    picks = experts + ranks * slots + 1
    return Flow(
        np.empty((experts, ranks), dtype=np.int32),
        np.empty(ranks, dtype=np.int64),
        np.empty((experts, ranks), dtype=np.uint16),
        np.empty(experts, dtype=np.int64),
        np.empty((ranks, experts + slots), dtype=np.uint16),
        np.empty(ranks, dtype=np.int64),
        np.empty(ranks + 1, dtype=np.uint16),
        np.empty(ranks, dtype=np.int64),
        np.empty(experts, dtype=np.int64),
        np.empty(ranks, dtype=np.int64),
        np.empty(ranks, dtype=np.uint16),
        np.empty(ranks, dtype=np.uint16),
        np.empty(ranks, dtype=np.int64),
        np.empty(ranks, dtype=np.uint16),
        np.empty(ranks, dtype=np.uint16),
        np.empty(picks, dtype=np.uint16),
        np.empty(picks, dtype=np.uint16),
        np.empty(picks, dtype=np.uint16),
        np.empty(picks, dtype=np.uint16),
        np.empty(picks, dtype=np.int64),
    )


@njit(cache=True)
def lay(flow: Flow, load_E: Array, homes_E: Array, bias_R: Array, replicas_RS: Array) -> None:
    """All tokens at home; each copy in `replicas_RS` is a holder without tokens. A copy beside its home counts once.

    bias_R: tokens that a rank counts as carrying already (or as not carrying): slower ranks get so many fewer.
    """
    flow.tokens_ER[:] = -1
    flow.load_R[:] = bias_R
    flow.on_R[:] = 0
    flow.at_E[:] = 1
    for e in range(load_E.size):
        flow.at_EH[e, 0] = homes_E[e]
        flow.tokens_ER[e, homes_E[e]] = load_E[e]
        flow.load_R[homes_E[e]] += load_E[e]
    for r in range(replicas_RS.shape[0]):
        for s in range(replicas_RS.shape[1]):
            e = replicas_RS[r, s]
            if e >= 0 and flow.tokens_ER[e, r] < 0:
                _add(flow, e, r)


@njit(cache=True)
def _add(flow: Flow, e: int, r: int) -> None:
    """Rank r holds expert e from now on."""
    if flow.at_E[e] == 1:
        home = flow.at_EH[e, 0]
        flow.on_RX[home, flow.on_R[home]] = e
        flow.on_R[home] += 1
    flow.tokens_ER[e, r] = 0
    flow.on_RX[r, flow.on_R[r]] = e
    flow.on_R[r] += 1
    flow.at_EH[e, flow.at_E[e]] = r
    flow.at_E[e] += 1


@njit(cache=True)
def _remove(flow: Flow, e: int, r: int) -> None:
    """Rank r gives up its copy of e; what it computed goes back to e's home."""
    home, tokens = flow.at_EH[e, 0], flow.tokens_ER[e, r]
    flow.tokens_ER[e, home] += tokens
    flow.load_R[home] += tokens
    flow.load_R[r] -= tokens
    flow.tokens_ER[e, r] = -1
    _cut(flow.on_RX[r], flow.on_R, r, e)
    _cut(flow.at_EH[e], flow.at_E, e, r)
    if flow.at_E[e] == 1:
        _cut(flow.on_RX[home], flow.on_R, home, e)


@njit(cache=True)
def _cut(row: Array, sizes: Array, at: int, value: int) -> None:
    i = 0
    while row[i] != value:
        i += 1
    sizes[at] -= 1
    for j in range(i, sizes[at]):
        row[j] = row[j + 1]


@njit(cache=True)
def _shift(flow: Flow, e: int, r: int, other: int, amount: int) -> None:
    flow.tokens_ER[e, r] -= amount
    flow.tokens_ER[e, other] += amount
    flow.load_R[r] -= amount
    flow.load_R[other] += amount


@njit(cache=True)
def _narrowest(flow: Flow, r: int, expert_R: Array, rank_R: Array, inwards: bool) -> tuple[int, int]:
    """Tokens that the path at r lets through now, into r or out of it; and the rank at its other end."""
    amount = FAR
    while rank_R[r] != r:
        e, other = expert_R[r], rank_R[r]
        giver, taker = (other, r) if inwards else (r, other)
        amount = min(amount, flow.tokens_ER[e, giver])
        if flow.tokens_ER[e, taker] < 0:  # its copy has given way to another
            amount = 0
        r = other
    return amount, r


@njit(cache=True)
def _send(flow: Flow, r: int, expert_R: Array, rank_R: Array, inwards: bool, amount: int) -> None:
    """Shift so many tokens along the path at r, into r or out of it."""
    while rank_R[r] != r:
        e, other = expert_R[r], rank_R[r]
        _shift(flow, e, other if inwards else r, r if inwards else other, amount)
        r = other


@njit(cache=True)
def _incoming(flow: Flow, most: int, r: int) -> int:
    """Excess that the path into r can bring now."""
    amount, end = _narrowest(flow, r, flow.from_expert_R, flow.from_rank_R, True)
    return int(min(amount, flow.load_R[end] - most))


@njit(cache=True)
def _draw(flow: Flow, r: int, amount: int) -> None:
    _send(flow, r, flow.from_expert_R, flow.from_rank_R, True, amount)


@njit(cache=True)
def _outgoing(flow: Flow, most: int, r: int) -> int:
    """Tokens that the path out of r can take now."""
    amount, end = _narrowest(flow, r, flow.to_expert_R, flow.to_rank_R, False)
    return int(min(amount, most - flow.load_R[end]))


@njit(cache=True)
def _pass(flow: Flow, r: int, amount: int) -> None:
    _send(flow, r, flow.to_expert_R, flow.to_rank_R, False, amount)


@njit(cache=True)
def pour(flow: Flow, most: int) -> None:
    """Drain ranks above `most` straight into ranks below it: most that can be drained is, and without a search."""
    load_R, tokens_ER = flow.load_R, flow.tokens_ER
    for r in range(load_R.size):
        if load_R[r] <= most:
            continue
        for i in range(flow.on_R[r]):
            e = flow.on_RX[r, i]
            for j in range(flow.at_E[e]):
                other = flow.at_EH[e, j]
                amount = max(0, min(tokens_ER[e, r], load_R[r] - most, most - load_R[other]))
                _shift(flow, e, r, other, amount)


@njit(cache=True)
def push(flow: Flow, most: int) -> int:
    """Drain ranks above `most` into ranks below it along short paths; the excess that is left.

    Where some is left, seen_R and seen_E are the cut: every holder of an expert seen lies in a rank seen, and all those
    ranks hold `most` at least.
    """
    load_R, tokens_ER, queue_R = flow.load_R, flow.tokens_ER, flow.queue_R
    while True:
        flow.seen_R[:] = 0
        flow.seen_E[:] = 0
        tail, excess = 0, 0
        for r in range(load_R.size):
            flow.wide_R[r] = max(0, load_R[r] - most)
            if load_R[r] > most:
                queue_R[tail] = r
                tail += 1
                flow.seen_R[r] = 1
                flow.from_rank_R[r] = r
                excess += load_R[r] - most
        if excess == 0:
            return 0
        sources, head, moved = tail, 0, 0
        while head < tail:
            r = queue_R[head]
            head += 1
            for i in range(flow.on_R[r]):
                e = flow.on_RX[r, i]
                if flow.seen_E[e] == 1 or tokens_ER[e, r] == 0:
                    continue
                flow.seen_E[e] = 1
                for j in range(flow.at_E[e]):
                    other = flow.at_EH[e, j]
                    if flow.seen_R[other] == 0:
                        flow.seen_R[other] = 1
                        flow.wide_R[other] = min(flow.wide_R[r], tokens_ER[e, r])
                        flow.from_expert_R[other] = e
                        flow.from_rank_R[other] = r
                        queue_R[tail] = other
                        tail += 1
        for i in range(sources, tail):  # along the tree, into each rank with room what the ones before it left
            room = queue_R[i]
            if load_R[room] < most:
                amount = min(most - load_R[room], _incoming(flow, most, room))
                _draw(flow, room, amount)
                moved += amount
        if moved == 0:
            return excess


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
        for e in range(flow.at_E.size):  # what has but one holder
            home = flow.at_EH[e, 0]
            flow.seen_E[e] |= flow.seen_R[home] & (flow.tokens_ER[e, home] > 0)
        most = -(-(flow.load_R * flow.seen_R).sum() // flow.seen_R.sum())
        proof.experts_E[:] = flow.seen_E
        proof.ranks_R[:] = flow.seen_R
    return int(most)


@njit(cache=True)
def _sound(flow: Flow, most: int) -> None:
    """deep_R and the paths out, after a push that left some excess: backwards from the ranks with room."""
    deep_R, load_R, tokens_ER, queue_R = flow.deep_R, flow.load_R, flow.tokens_ER, flow.queue_R
    head, tail = 0, 0
    for r in range(load_R.size):
        deep_R[r] = max(0, most - load_R[r])
        if load_R[r] < most:
            flow.to_rank_R[r] = r
            queue_R[tail] = r
            tail += 1
    while head < tail:
        r = queue_R[head]
        head += 1
        for i in range(flow.on_R[r]):
            e = flow.on_RX[r, i]
            for j in range(flow.at_E[e]):
                other = flow.at_EH[e, j]
                if deep_R[other] == 0 and tokens_ER[e, other] > 0:
                    deep_R[other] = min(deep_R[r], tokens_ER[e, other])
                    flow.to_expert_R[other] = e
                    flow.to_rank_R[other] = r
                    queue_R[tail] = other
                    tail += 1


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
def _wide(flow: Flow, least: int) -> int:
    """Holders that a copy could relieve of `least` tokens at least, into `pick_*_P`; how many."""
    n = 0
    for e in range(flow.at_E.size):
        for j in range(flow.at_E[e]):
            u = flow.at_EH[e, j]
            flow.pick_expert_P[n], flow.pick_rank_P[n] = e, u
            n += min(flow.wide_R[u], flow.tokens_ER[e, u]) >= least
    return n


@njit(cache=True)
def _near(flow: Flow, n: int, begin: int, end: int, across: bool) -> int:
    """Of the first n picks those whose expert a node holds (across: does not hold), into `near_*_P`; how many."""
    near, whole = 0, end - begin == flow.load_R.size
    for i in range(n):
        e, u = flow.pick_expert_P[i], flow.pick_rank_P[i]
        held = False
        for j in range(flow.at_E[e]):
            held |= begin <= flow.at_EH[e, j] < end
        flow.near_expert_P[near], flow.near_rank_P[near] = e, u
        flow.near_wide_P[near] = min(flow.wide_R[u], flow.tokens_ER[e, u])
        near += whole or across != held
    return near


@njit(cache=True)
def _pick(flow: Flow, given: Layer, r: int, deep: int, loss: int, least: int, near: int) -> tuple[int, int]:
    """Which pick drains most through r, -1 for none, and how much, less what its slot computes now.

    Ties go to what is needed ahead and to what has more tokens.
    """
    best, best_worth, pick = least - 1, -1, -1
    for i in range(near):
        e, gain = flow.near_expert_P[i], min(deep, flow.near_wide_P[i] - loss)
        if gain < max(best, least) or flow.tokens_ER[e, r] >= 0:
            continue
        worth = -1
        if gain == best:  # ties alone need to know what is ahead
            if best_worth < 0:
                best_worth = _tie(flow, given, pick, r)
            worth = _tie(flow, given, i, r)
        if gain > best or worth > best_worth:
            best, best_worth, pick = gain, worth, i
    return pick, best


@njit(cache=True)
def _tie(flow: Flow, given: Layer, pick: int, r: int) -> int:
    e = flow.near_expert_P[pick]
    return int(_worth(given, e, r) + flow.tokens_ER[e, flow.near_rank_P[pick]])


@njit(cache=True)
def _bring(flow: Flow, given: Layer, replicas_RS: Array, most: int, e: int, u: int, r: int, slot: int) -> None:
    """A copy of e takes this slot of rank r, and what can drains at once: into u, from u to r, and on from r."""
    old = replicas_RS[r, slot]
    if old >= 0 and given.homes_E[old] != r:
        _remove(flow, old, r)
    replicas_RS[r, slot] = e
    _add(flow, e, r)
    amount = min(_incoming(flow, most, u), flow.tokens_ER[e, u], _outgoing(flow, most, r))
    if amount > 0:
        _draw(flow, u, amount)
        _shift(flow, e, u, r, amount)
        _pass(flow, r, min(amount, max(0, _outgoing(flow, most, r))))


@njit(cache=True)
def _fill(flow: Flow, given: Layer, replicas_RS: Array, most: int, begin: int, end: int, near: int, batch: int) -> int:
    """Copies in one node, a batch at most: how many were made.

    Each to the rank that is deepest by then, as long as a copy drains a quarter of what the first one did.
    """
    wide_R, deep_R, near_wide_P, made, least = flow.wide_R, flow.deep_R, flow.near_wide_P, 0, given.least_gain
    widest = FAR
    while made < batch and widest >= least:
        r = begin
        for other in range(begin + 1, end):
            r = other if deep_R[other] > deep_R[r] else r
        if deep_R[r] < least:
            break
        deep = _outgoing(flow, most, r)
        if deep < deep_R[r]:  # copies made before took some of it
            deep_R[r] = deep
            continue
        deep, deep_R[r] = deep_R[r], 0
        slot, loss = _slot(flow, given, replicas_RS, r)
        pick, gain = _pick(flow, given, r, deep, loss, least, near) if slot >= 0 else (-1, 0)
        if pick < 0:
            continue
        e, u = flow.near_expert_P[pick], flow.near_rank_P[pick]
        wide = _incoming(flow, most, u)
        if wide < wide_R[u]:
            deep_R[r] = deep  # it is asked again, by what u has left
        else:
            if loss > 0:
                flow.to_rank_R[r] = r  # the way out may have led through the copy that goes
            _bring(flow, given, replicas_RS, most, e, u, r, slot)
            made, least = made + 1, max(least, (gain + 3) // 4)
            wide = _incoming(flow, most, u)
            deep_R[r] = max(0, _outgoing(flow, most, r)) if loss == 0 else 0
            if wide <= 0 and deep_R[r] > 0 and flow.load_R[u] >= most:  # u passes on what r can take
                deep_R[u] = min(deep_R[r], flow.tokens_ER[e, u])
                flow.to_expert_R[u], flow.to_rank_R[u] = e, r
        wide_R[u], widest = max(0, wide), 0
        for i in range(near):
            if flow.near_rank_P[i] == u:
                near_wide_P[i] = min(wide_R[u], flow.tokens_ER[flow.near_expert_P[i], u])
            widest = max(widest, near_wide_P[i])
    return made


@njit(cache=True)
def _copy(flow: Flow, given: Layer, replicas_RS: Array, most: int, across: bool, batch: int) -> int:
    """A batch of copies at most, node by node: how many were made. across: from another node, or only from the own."""
    n, made, end, ranks = _wide(flow, given.least_gain), 0, 0, given.slots_R.size
    while end < ranks:
        begin = end
        while end < ranks and given.nodes_R[end] == given.nodes_R[begin]:
            end += 1
        if flow.deep_R[begin:end].max() >= given.least_gain:
            near = _near(flow, n, begin, end, across)
            if near > 0:
                made += _fill(flow, given, replicas_RS, most, begin, end, near, batch - made)
    return made


@njit(cache=True)
def improve(flow: Flow, most: int, given: Layer, replicas_RS: Array, batch: int) -> None:
    """Put copies into `replicas_RS` until no rank is over `most`, or the excess falls no more."""
    before = FAR
    pour(flow, most)
    while True:
        excess = push(flow, most)
        if excess == 0 or excess >= before:
            return
        before = excess
        _sound(flow, most)
        if _copy(flow, given, replicas_RS, most, False, batch) > 0:
            continue
        if given.nodes_R[-1] == given.nodes_R[0]:
            return
        _sound(flow, most)
        if _copy(flow, given, replicas_RS, most, True, batch) == 0:
            return


@njit(cache=True)
def _keep(flow: Flow, slots_R: Array, previous_RS: Array, replicas_RS: Array) -> None:
    """Copies that compute something: in the slot they had, else in the first that is free; old copies in the rest."""
    for r in range(slots_R.size):
        same = True
        for s in range(slots_R[r]):
            same &= replicas_RS[r, s] == previous_RS[r, s]
        if same:
            continue
        active = replicas_RS[r].copy()
        replicas_RS[r] = previous_RS[r]
        for i in range(active.size):
            if active[i] >= 0 and flow.tokens_ER[active[i], r] <= 0:
                active[i] = -1
        for pick in range(3):  # what stays; then into empty slots; then over idle copies
            for i in range(active.size):
                if active[i] < 0:
                    continue
                for s in range(slots_R[r]):
                    old = replicas_RS[r, s]
                    fits = old == active[i] if pick == 0 else old < 0
                    if pick == 2 and old >= 0:
                        fits = flow.tokens_ER[old, r] <= 0
                    if fits:
                        replicas_RS[r, s] = active[i]
                        active[i] = -1
                        break


@njit(cache=True)
def standing(previous_LRS: Array, homes_LE: Array, slots_R: Array) -> tuple[Array, bool]:
    """Copies that may stay: in a slot that is there, not beside their home, once a rank; and if all are experts."""
    standing_LRS, known = np.full_like(previous_LRS, -1), True
    layers, ranks, _ = previous_LRS.shape
    experts = homes_LE.shape[1]
    for layer in range(layers):
        for r in range(ranks):
            for s in range(slots_R[r]):
                e = previous_LRS[layer, r, s]
                known &= -1 <= e < experts
                if 0 <= e < experts and homes_LE[layer, e] != r and not (standing_LRS[layer, r, :s] == e).any():
                    standing_LRS[layer, r, s] = e
    return standing_LRS, known


@njit(cache=True)
def _place_layer(
    flow: Flow, load_E: Array, ranks: int, given: Layer, previous_RS: Array, replicas_RS: Array, proof: Proof
) -> int:
    """The lowest of several attempts, or the first that is perfect: in batches, then copy by copy; near copies first,
    or from anywhere; beside the copies that are there, or from none. The flow and the proof are the result's."""
    least = -(-(load_E.sum() + given.bias_R.sum()) // ranks)
    lowest = FAR
    anywhere = Layer(
        given.homes_E,
        given.slots_R,
        np.zeros_like(given.nodes_R),
        given.bias_R,
        given.spill_EH,
        given.room_RH,
        given.least_gain,
    )
    one_node = given.nodes_R[-1] == given.nodes_R[0]
    trial_RS = np.empty_like(previous_RS)
    for attempt in range(8 if given.slots_R.sum() > 0 else 1):
        near_first, batch = attempt % 2 == 0, FAR if attempt < 4 else 1
        if one_node and not near_first:
            continue
        trial_RS[:] = previous_RS
        if attempt // 2 % 2 == 1:
            trial_RS[:] = -1
        lay(flow, load_E, given.homes_E, given.bias_R, trial_RS)
        improve(flow, least, given if near_first else anywhere, trial_RS, batch)
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
    flow = flow_of(experts, slots_R.size, previous_LRS.shape[2])
    spill_EH = np.empty((experts, horizon), dtype=np.int64)
    room_RH = np.empty((slots_R.size, horizon), dtype=np.int64)
    shares = np.empty((layers * (experts + slots_R.sum()) + 1, 4), dtype=np.int64)
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
            if flow.at_E[e] == 1:
                home = flow.at_EH[e, 0]
                shares[n, 0], shares[n, 1], shares[n, 2], shares[n, 3] = layer, e, home, flow.tokens_ER[e, home]
                n += flow.tokens_ER[e, home] > 0
            else:
                for r in range(slots_R.size):
                    shares[n, 0], shares[n, 1], shares[n, 2], shares[n, 3] = layer, e, r, flow.tokens_ER[e, r]
                    n += flow.tokens_ER[e, r] > 0
    return shares[:n]
