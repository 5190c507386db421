"""Plan: which experts get a copy on which rank in a micro-step, and who computes how many tokens. Pure; called by
policy.py.

Homes never change inside a step. Per layer, copies that are still there from the micro-step before cost nothing, so
they are tried first; only if the fullest rank stays above ceil(mean) are new ones made, hottest rank to coldest, each
taking the heaviest expert that the hottest rank still computes. The token split over the result is exact (split.py).
Idle copies are not thrown out: they may be of use again. Source: greedy of ForeMoE's kind, ours in detail.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.compiled import compiled
from outrider.experts.events import Array
from outrider.experts.split import Split, split


class Plan(msgspec.Struct, frozen=True, eq=False):
    """One micro-step, all layers.

    replicas_LRS      expert in each spare slot, -1 for none
    quotas [n, 5]     layer, expert, source, rank, tokens: sorted by the first four; only positive tokens
    moves [n, 5]      layer, expert, src, dst, slot: weights to fetch from home; sorted by (layer, dst, slot)
    most_L            largest rank load of each layer, the least for these replicas
    proof_LE, proof_LR  the certificate of most_L, see split.py
    """

    replicas_LRS: Array
    quotas: Array
    moves: Array
    most_L: Array
    proof_LE: Array
    proof_LR: Array

    def rank_load(self) -> Array:
        """[layers, ranks] token-slots that each rank computes."""
        load = np.zeros(self.replicas_LRS.shape[:2], dtype=np.int64)
        np.add.at(load, (self.quotas[:, 0], self.quotas[:, 3]), self.quotas[:, 4])
        return load


def contiguous_homes(experts: int, ranks: int) -> Array:
    """homes_E: expert ids in runs, rank by rank; the first experts % ranks ranks have one more."""
    return np.sort(np.arange(experts, dtype=np.int64) % ranks)


def plan(
    counts_LRE: Array, slots: int | Sequence[int], homes_E: Array | None = None, previous_LRS: Array | None = None
) -> Plan:
    """Plan one micro-step.

    counts_LRE    token-slots per layer, source rank and expert
    slots         spare slots of every rank, or of each rank
    homes_E       home rank of each expert; None: contiguous
    previous_LRS  replicas of the micro-step before; None: all slots are empty
    Least largest load first, then fewest moves. Ties go to the lower rank, then to the lower expert id, so that every
    rank derives the same plan. Nothing moves in a layer that is balanced already. CallerError where shapes do not fit.
    """
    if counts_LRE.ndim != 3:
        raise CallerError(f"counts: shape {counts_LRE.shape}. Give [layers, ranks, experts] of one micro-step.")
    layers, ranks, experts = counts_LRE.shape
    slots_R = np.broadcast_to(np.asarray(slots, dtype=np.int64), (ranks,)).copy()
    width = int(slots_R.max(initial=0))
    homes_E = contiguous_homes(experts, ranks) if homes_E is None else homes_E
    if previous_LRS is None:
        previous_LRS = np.full((layers, ranks, width), -1, dtype=np.int64)
    if homes_E.shape != (experts,) or previous_LRS.shape != (layers, ranks, width):
        raise CallerError(
            f"plan: homes {homes_E.shape} and previous {previous_LRS.shape} do not fit {layers} layers, {ranks} ranks,"
            f" {experts} experts and {width} slots. Give [experts] and [layers, ranks, slots]."
        )
    replicas_LRS = np.empty_like(previous_LRS)
    shares: list[Split] = []
    rows: list[Array] = []
    for layer in range(layers):
        replicas_LRS[layer], share = _place(counts_LRE[layer].sum(axis=0), homes_E, slots_R, previous_LRS[layer])
        shares.append(share)
        rows.append(_quotas(layer, np.ascontiguousarray(counts_LRE[layer]), share.expert, share.rank, share.tokens))
    return Plan(
        replicas_LRS,
        np.concatenate(rows) if rows else np.empty((0, 5), dtype=np.int64),
        _moves(replicas_LRS, previous_LRS, homes_E),
        np.array([share.most for share in shares], dtype=np.int64),
        np.array([share.proof_E for share in shares], dtype=np.int64).reshape(layers, experts),
        np.array([share.proof_R for share in shares], dtype=np.int64).reshape(layers, ranks),
    )


def _place(load_E: Array, homes_E: Array, slots_R: Array, previous_RS: Array) -> tuple[Array, Split]:
    """Replicas of one layer and their split: from what is there, or from nothing where that ends lower."""
    least = -(-int(load_E.sum()) // len(slots_R))
    kept = _improve(load_E, homes_E, slots_R, previous_RS, previous_RS, least)
    if kept[1].most == least or not (previous_RS >= 0).any():
        return kept
    fresh = _improve(load_E, homes_E, slots_R, previous_RS, np.full_like(previous_RS, -1), least)
    return min((kept, fresh), key=lambda placed: (placed[1].most, int((placed[0] != previous_RS).sum())))


def _improve(
    load_E: Array, homes_E: Array, slots_R: Array, previous_RS: Array, replicas_RS: Array, least: int
) -> tuple[Array, Split]:
    """Add copies until the largest load is `least` or falls no more."""
    share = split(load_E, homes_E, replicas_RS)
    while share.most > least:
        more_RS = _replicate(homes_E, slots_R, replicas_RS, share.expert, share.rank, share.tokens, least)
        better = split(load_E, homes_E, more_RS)
        if better.most >= share.most:
            break
        replicas_RS, share = more_RS, better
    settled_RS = _settle(slots_R, previous_RS, replicas_RS, share.expert, share.rank, share.tokens)
    if not np.array_equal(settled_RS, replicas_RS):
        share = split(load_E, homes_E, settled_RS)  # idle copies that stayed may serve too
    return settled_RS, share


@compiled
def _replicate(
    homes_E: Array, slots_R: Array, replicas_RS: Array, expert: Array, rank: Array, tokens: Array, least: int
) -> Array:
    """Copies from hottest rank to coldest, on top of a split; a slot whose copy computes nothing is free."""
    ranks = slots_R.size
    replicas_RS = replicas_RS.copy()
    amount_ER = np.zeros((homes_E.size, ranks), dtype=np.int64)
    held_ER = np.zeros((homes_E.size, ranks), dtype=np.bool_)
    load_R = np.zeros(ranks, dtype=np.int64)
    for i in range(expert.size):
        amount_ER[expert[i], rank[i]] = tokens[i]
        held_ER[expert[i], rank[i]] = True
        load_R[rank[i]] += tokens[i]
    while True:
        hot = np.argmax(load_R)
        if load_R[hot] <= least:
            return replicas_RS
        cold = -1
        heaviest = -1
        slot = -1
        for r in range(ranks):
            if load_R[r] >= least or (cold >= 0 and load_R[r] >= load_R[cold]):
                continue
            free = -1
            for s in range(slots_R[r]):
                if replicas_RS[r, s] < 0:
                    free = s
                    break
            if free < 0:
                for s in range(slots_R[r]):
                    if amount_ER[replicas_RS[r, s], r] == 0:
                        free = s
                        break
            chosen = -1
            for e in range(homes_E.size):
                if amount_ER[e, hot] > 0 and (free >= 0 or held_ER[e, r]):  # noqa: SIM102
                    if chosen < 0 or amount_ER[e, hot] > amount_ER[chosen, hot]:
                        chosen = e
            if chosen >= 0:
                cold, heaviest, slot = r, chosen, free
        if cold < 0:
            return replicas_RS
        if not held_ER[heaviest, cold]:
            if replicas_RS[cold, slot] >= 0:
                held_ER[replicas_RS[cold, slot], cold] = False
            replicas_RS[cold, slot] = heaviest
            held_ER[heaviest, cold] = True
        shift = min(load_R[hot] - least, least - load_R[cold], amount_ER[heaviest, hot])
        amount_ER[heaviest, hot] -= shift
        amount_ER[heaviest, cold] += shift
        load_R[hot] -= shift
        load_R[cold] += shift


@compiled
def _settle(slots_R: Array, previous_RS: Array, replicas_RS: Array, expert: Array, rank: Array, tokens: Array) -> Array:
    """Slots for the copies that compute something: the slot they had, else the lowest; old copies stay in the rest."""
    ranks, width = previous_RS.shape
    settled_RS = previous_RS.copy()
    for r in range(ranks):
        taken = np.zeros(width, dtype=np.bool_)
        waiting = np.empty(width, dtype=np.int64)
        n = 0
        for s in range(width):
            e = replicas_RS[r, s]
            used = False
            for i in range(expert.size):
                used |= expert[i] == e and rank[i] == r and tokens[i] > 0
            if not used:
                continue
            stays = False
            for old in range(width):
                if previous_RS[r, old] == e:
                    taken[old] = True
                    stays = True
            if not stays:
                waiting[n] = e
                n += 1
        for empty_first in (True, False):
            for s in range(slots_R[r]):
                if n > 0 and not taken[s] and (not empty_first or previous_RS[r, s] < 0):
                    n -= 1
                    settled_RS[r, s] = waiting[n]
                    taken[s] = True
    return settled_RS


@compiled
def _quotas(layer: int, counts_RE: Array, expert: Array, rank: Array, tokens: Array) -> Array:
    """Who sends whom: own tokens first (they cross no link), then sources to holders in rank order."""
    ranks, experts = counts_RE.shape
    rows = np.empty((ranks * experts + 2 * expert.size, 5), dtype=np.int64)
    left_R = np.empty(ranks, dtype=np.int64)
    n = 0
    begin = 0
    for e in range(experts):
        end = begin
        while end < expert.size and expert[end] == e:
            end += 1
        room = tokens[begin:end].copy()
        left_R[:] = counts_RE[:, e]
        own_R = np.zeros(ranks, dtype=np.int64)
        for i in range(begin, end):
            own = min(left_R[rank[i]], room[i - begin])
            own_R[rank[i]] = own
            left_R[rank[i]] -= own
            room[i - begin] -= own
        at = begin
        for q in range(ranks):
            told = own_R[q] == 0
            while left_R[q] > 0 or not told:
                while at < end and room[at - begin] == 0:
                    at += 1
                if not told and (left_R[q] == 0 or rank[at] > q):  # keep the rows of a source in rank order
                    rows[n] = (layer, e, q, q, own_R[q])
                    told = True
                    n += 1
                    continue
                some = min(left_R[q], room[at - begin])
                left_R[q] -= some
                room[at - begin] -= some
                rows[n] = (layer, e, q, rank[at], some)
                n += 1
        begin = end
    return rows[:n].copy()


def _moves(replicas_LRS: Array, previous_LRS: Array, homes_E: Array) -> Array:
    layer, dst, slot = np.nonzero((replicas_LRS != previous_LRS) & (replicas_LRS >= 0))
    expert = replicas_LRS[layer, dst, slot]
    return np.stack([layer, expert, homes_E[expert], dst, slot], axis=1)
