"""Plan one micro-step: which experts get a copy on which rank, and who computes how many tokens. Pure; called by
policy.py, and micro-step by micro-step by schedule.py.

Homes never change inside a step. Per layer, copies that are still there from the micro-step before cost nothing and are
tried first; new ones are made only if the fullest rank stays above ceil(mean). The work is done in kernels.py and
quotas.py. Source: foresight balancing of ForeMoE's kind (its abstract); search, split and proof are ours.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError, LawBroken
from outrider.experts.events import Array

HORIZON = 3  # micro-steps that plans of whole steps look ahead (docs/log.md)
LARGEST_RANKS_EXPERTS = 32_767  # what the kernels' compact tables hold
LARGEST_TOKENS = 2**31 - 1


class Plan(msgspec.Struct, frozen=True, eq=False):
    """One micro-step, all layers.

    replicas_LRS      expert in each spare slot, -1 for none
    quotas [n, 5]     layer, expert, source, rank, tokens: sorted by the first four; only positive tokens; int32
    moves [n, 5]      layer, expert, src, dst, slot: weights to fetch from home; sorted by (layer, dst, slot)
    most_L            largest rank load of each layer, the least for these replicas
    proof_LE, proof_LR  the certificate of most_L: experts X (1) live on ranks U (1) alone, and C(X) > (most - 1) * |U|
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


def contiguous_homes(experts: int, ranks: int, excluded: Sequence[int] = ()) -> Array:
    """homes_E: expert ids in runs, rank by rank; the first ranks have one more where it does not come out even.

    excluded  ranks that hold nothing. CallerError where none is left.
    """
    open_ranks = np.array([rank for rank in range(ranks) if rank not in excluded], dtype=np.int64)
    if not len(open_ranks):
        raise CallerError(f"excluded: all {ranks} ranks are. Leave one that may hold experts.")
    each, over = divmod(experts, len(open_ranks))
    homes_E: Array = np.repeat(open_ranks, each + (np.arange(len(open_ranks)) < over))
    return homes_E


def plan(
    counts_LRE: Array,
    slots: int | Sequence[int],
    homes: Array | None = None,
    previous_LRS: Array | None = None,
    *,
    ahead_HLE: Array | None = None,
    ranks_per_node: int | None = None,
    excluded: Sequence[int] = (),
    bias_LR: Array | None = None,
    least_gain: int = 1,
) -> Plan:
    """Plan one micro-step.

    counts_LRE      token-slots per layer, source rank and expert
    slots           spare slots of every rank, or of each rank
    homes           home rank of each expert, [experts] or [layers, experts]; None: contiguous
    previous_LRS    replicas of the micro-step before; None: all slots are empty. What cannot stay where it is (at home
                    now, on an excluded rank, twice on one) is dropped
    ahead_HLE       token-slots per layer and expert of the next H micro-steps: copies that they need too are preferred
    ranks_per_node  copies inside a node come first; None: one node
    excluded        ranks that hold nothing and compute nothing; they may still be sources
    bias_LR         token-slots that a rank counts as carrying besides: slow ranks get so many fewer; then the largest
                    of load + bias is the least, and the certificate speaks of that
    least_gain      token-slots that a new copy must take off an overfull rank to be made at all
    Least largest load first, then few moves. Ties go to the lower rank, then to the lower expert id, so that every rank
    derives the same plan. Nothing moves in a layer that is balanced already. CallerError where shapes do not fit.
    """
    from outrider.experts import kernels, quotas  # numba: heavy, and an optional dependency of the package

    if counts_LRE.ndim != 3 or counts_LRE.dtype.kind not in "iu" or 0 in counts_LRE.shape:
        raise CallerError(
            f"counts: {counts_LRE.dtype} of shape {counts_LRE.shape}. Give integers [layers, ranks, experts] of one"
            " micro-step."
        )
    layers, ranks, experts = counts_LRE.shape
    slots_R = slots_of(slots, ranks, excluded)
    width = int(slots_R.max(initial=0))
    homes_LE = homes_of(homes, layers, experts, ranks, excluded)
    nodes_R = np.arange(ranks, dtype=np.int64) // (ranks_per_node or ranks)
    if previous_LRS is None:
        previous_LRS = np.full((layers, ranks, width), -1, dtype=np.int64)
    previous_LRS = np.ascontiguousarray(previous_LRS, dtype=np.int64)  # one type, one layout: compiled once
    counts_LRE = np.ascontiguousarray(counts_LRE, dtype=np.int64)
    load_LE, cells, least = quotas.tally(counts_LRE)
    ahead_LHE = np.zeros((layers, 0, experts), dtype=np.int64)
    if ahead_HLE is not None:
        ahead_LHE = np.ascontiguousarray(ahead_HLE.transpose(1, 0, 2), dtype=np.int64)
    bias_given_LR = np.zeros((layers, ranks), dtype=np.int64)
    if bias_LR is not None:
        bias_given_LR[:] = bias_LR
        bias_given_LR -= bias_given_LR.min(axis=1, keepdims=True)  # what counts is differences, and loads stay positive
        bias_given_LR[:, list(excluded)] = 0  # they carry nothing, so that they are neither slow nor fast
    _check(load_LE, least, ranks, previous_LRS, (layers, ranks, width), ahead_LHE)
    previous_LRS, known = kernels.standing(previous_LRS, homes_LE, slots_R)
    if not known:
        raise CallerError(f"previous: holds an expert that is none. Give ids from 0 to {experts - 1}, -1 for no copy.")

    replicas_LRS, most_L = np.empty_like(previous_LRS), np.empty(layers, dtype=np.int64)
    proof_LE, proof_LR = np.empty((layers, experts), dtype=np.int64), np.empty((layers, ranks), dtype=np.int64)
    shares = kernels.place(
        load_LE,
        ranks - len(set(excluded)),
        homes_LE,
        slots_R,
        nodes_R,
        previous_LRS,
        ahead_LHE,
        bias_given_LR,
        max(1, least_gain),
        replicas_LRS,
        most_L,
        proof_LE,
        proof_LR,
    )
    proof_LR[:, list(excluded)] = 0  # where all ranks are the certificate, those that may compute are meant
    rows: Any = np.empty((cells + 2 * len(shares) + 1, 5), dtype=np.int32)
    rows = rows[: quotas.fill(rows, counts_LRE, shares, nodes_R)]
    check_rows(rows, counts_LRE, homes_LE, replicas_LRS, most_L)
    moves = quotas.moved(replicas_LRS, previous_LRS, homes_LE)
    return Plan(replicas_LRS, rows, moves, most_L, proof_LE, proof_LR)


def check_rows(rows: Array, counts_LRE: Array, homes_LE: Array, replicas_LRS: Array, most_L: Array) -> None:
    """LawBroken, naming the row, where quota rows do not come out (quotas.recount)."""
    from outrider.experts import quotas  # numba: heavy

    bad = quotas.recount(rows, counts_LRE, homes_LE, replicas_LRS, most_L)
    if bad >= 0:
        raise LawBroken(6, f"quota row {bad} of {len(rows)} does not come out: {rows[bad : bad + 1].tolist()}")


def slots_of(slots: int | Sequence[int], ranks: int, excluded: Sequence[int] = ()) -> Array:
    """slots_R; an excluded rank has none. CallerError for a list of another length and for negative numbers."""
    given = np.asarray(slots, dtype=np.int64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != ranks) or given.min(initial=0) < 0:
        raise CallerError(f"slots: {slots} for {ranks} ranks. Give one number, 0 or more, or one for each rank.")
    if any(not 0 <= rank < ranks for rank in excluded):
        raise CallerError(f"excluded: {list(excluded)} with {ranks} ranks. Give ranks from 0 to {ranks - 1}.")
    slots_R = np.empty(ranks, dtype=np.int64)
    slots_R[:] = given
    slots_R[list(excluded)] = 0
    return slots_R


def homes_of(homes: Array | None, layers: int, experts: int, ranks: int, excluded: Sequence[int] = ()) -> Array:
    """homes_LE from what was given. CallerError for another shape, and for a home on a rank that is not there."""
    if homes is None:
        homes = contiguous_homes(experts, ranks, excluded)
    if homes.shape not in ((experts,), (layers, experts)):
        raise CallerError(f"homes: shape {homes.shape}. Give [{experts}] or [{layers}, {experts}].")
    homes_LE = np.empty((layers, experts), dtype=np.int64)
    homes_LE[:] = homes
    closed = bool(excluded) and np.isin(homes_LE, list(excluded)).any()
    if experts and (closed or homes_LE.min() < 0 or homes_LE.max() >= ranks):
        raise CallerError(f"homes: an expert lives on no open rank of 0 to {ranks - 1}. Give each a home there.")
    return homes_LE


def _check(
    load_LE: Array, least: int, ranks: int, previous_LRS: Array, fits: tuple[int, ...], ahead_LHE: Array
) -> None:
    layers, experts = load_LE.shape
    if previous_LRS.shape != fits or ahead_LHE.shape[2] != experts or ahead_LHE.shape[0] != layers:
        raise CallerError(
            f"plan: previous {previous_LRS.shape} and ahead {ahead_LHE.shape} do not fit."
            f" Give {list(fits)} and [steps, {layers}, {experts}]."
        )
    if max(ranks, experts) > LARGEST_RANKS_EXPERTS or load_LE.max(initial=0) > LARGEST_TOKENS:
        raise CallerError(
            f"plan: {ranks} ranks, {experts} experts, {load_LE.max(initial=0)} token-slots of one expert."
            f" The limits are {LARGEST_RANKS_EXPERTS} and {LARGEST_TOKENS}."
        )
    if least < 0:
        raise CallerError("counts: a negative number of token-slots. Count tokens, 0 or more.")
