"""Split: how many tokens of each expert each of its holders computes, so that the fullest rank is as empty as it can
be. Exact, integer, with a proof. Pure; for callers that have their replicas already; plan.py does the same in one go.

Tokens flow from experts to the ranks that hold them (kernels.py: push, exact). The certificate reads: "the load cannot
go below `most`, as experts X live only on ranks U".
"""

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.plan import LARGEST_TOKENS


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
    Deterministic: paths are searched in order of (rank, expert, holder). CallerError for what does not fit.
    """
    from outrider.experts import kernels  # numba: heavy, and an optional dependency of the package

    load_E, homes_E, replicas_RS = (np.ascontiguousarray(a, dtype=np.int64) for a in (load_E, homes_E, replicas_RS))
    _check(load_E, homes_E, replicas_RS)
    ranks, slots = replicas_RS.shape
    flow = kernels.flow_of(len(load_E), ranks, slots)
    kernels.lay(flow, load_E, homes_E, np.zeros(ranks, dtype=np.int64), replicas_RS)
    proof_E, proof_R = np.empty(len(load_E), dtype=np.int64), np.empty(ranks, dtype=np.int64)
    most = kernels.exact(flow, ranks, kernels.Proof(proof_E, proof_R))
    expert, rank = np.nonzero(flow.tokens_ER >= 0)
    return Split(int(most), expert, rank, flow.tokens_ER[expert, rank].astype(np.int64), proof_E, proof_R)


def _check(load_E: Array, homes_E: Array, replicas_RS: Array) -> None:
    if load_E.ndim != 1 or homes_E.shape != load_E.shape or replicas_RS.ndim != 2:
        raise CallerError(
            f"split: loads {load_E.shape}, homes {homes_E.shape}, replicas {replicas_RS.shape}. Give [experts],"
            " [experts] and [ranks, slots]."
        )
    if load_E.min(initial=0) < 0 or load_E.max(initial=0) > LARGEST_TOKENS:
        raise CallerError(f"split: loads from {load_E.min()} to {load_E.max()}. Give 0 to {LARGEST_TOKENS}.")
    experts, ranks = len(load_E), len(replicas_RS)
    if homes_E.min(initial=0) < 0 or homes_E.max(initial=0) >= ranks:
        raise CallerError(f"split: homes from {homes_E.min()} to {homes_E.max()}. Give ranks from 0 to {ranks - 1}.")
    if replicas_RS.min(initial=-1) < -1 or replicas_RS.max(initial=-1) >= experts:
        raise CallerError(
            f"split: replicas from {replicas_RS.min()} to {replicas_RS.max()}. Give experts from 0 to {experts - 1},"
            " -1 for none."
        )
