"""Split: how many tokens of each expert each of its holders computes, so that the fullest rank is as empty as it can
be. Exact, integer, with a proof. Pure; for callers that have their replicas already; plan.py does the same in one go.

Tokens flow from experts to the ranks that hold them (kernels.py: push, exact). The certificate reads: "the load cannot
go below `most`, as experts X live only on ranks U".
"""

import msgspec
import numpy as np

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
    Deterministic: paths are searched in order of (rank, expert, holder).
    """
    from outrider.experts import kernels  # numba: heavy, and an optional dependency of the package

    load_E, homes_E, replicas_RS = (np.ascontiguousarray(a, dtype=np.int64) for a in (load_E, homes_E, replicas_RS))
    ranks, slots = replicas_RS.shape
    flow = kernels.flow_of(len(load_E), ranks, slots)
    kernels.lay(flow, load_E, homes_E, np.zeros(ranks, dtype=np.int64), replicas_RS)
    proof_E, proof_R = np.empty(len(load_E), dtype=np.int64), np.empty(ranks, dtype=np.int64)
    most = kernels.exact(flow, ranks, kernels.Proof(proof_E, proof_R))
    expert, rank = np.nonzero(flow.tokens_ER >= 0)
    return Split(int(most), expert, rank, flow.tokens_ER[expert, rank].astype(np.int64), proof_E, proof_R)
