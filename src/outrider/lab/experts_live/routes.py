"""Which experts the tokens of a live run go to: recorded, made with a skew, or even. Seeded; called by rank.py.

    hot   SYNTHETIC, and made to be skewed: one rank's experts are wanted most, another rank's in each layer and
          micro-batch, as in workload W6 (rotating hot rank); within a rank popularity is log-normal, sigma 0.8
    even  an even gate: every expert gets as many token-slots as every other; the limit that balancing can reach
    PATH  recorded: NAME_ids [layers, tokens, top_k] of an npz like moe-routing-deepseek-v2-lite's, tokens in their
          order, layers spread evenly over those that were recorded
All are [micro-batches, ranks, tokens of a rank, layers, top_k]; a token's experts differ from each other.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.plan import contiguous_homes

SIGMA = 0.8


class Case(msgspec.Struct, frozen=True):
    """A live run: the model's shape, its tokens, and how they are routed.

    tokens   of a rank in a micro-batch, in sequences of `length`
    hot      share of the routes' weight that the hot rank gets
    routes   hot, or the path of recorded ones, of which domain is read
    ring     layers whose copies are held at once in the arms with a ring
    row_s    EMULATED seconds of an expert for a row in a forward pass, twice that in a backward pass; 0: only what the
             real matrices take
    job_s    EMULATED seconds that each of the lane's jobs takes besides what it takes
    rounds   steps that each arm needs in which no rank stood in line for a core for more than the share `quiet` of
             its time; when budget_s is over, what there is must do
    seed     of weights, tokens and synthetic routes
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: int
    batches: int
    length: int = 256
    slots: int = 2
    hot: float = 0.8
    routes: str = "hot"
    domain: str = "intent"
    ring: int = 2
    row_s: float = 0.0
    job_s: float = 0.0
    rounds: int = 5
    quiet: float = 1.0
    budget_s: float = 110.0
    seed: int = 0


def routed(case: Case, ranks: int) -> Any:
    """int64 routes of the case. CallerError where the file has too few tokens or another shape."""
    return _hot(case, ranks) if case.routes == "hot" else _recorded(case, ranks)


def even(case: Case, ranks: int) -> Any:
    """int64 routes of an even gate: token-slots go round the experts."""
    shape = (case.batches, ranks, case.tokens, case.layers, case.top_k)
    slot = np.arange(ranks * case.tokens * case.top_k) % case.experts
    return np.broadcast_to(slot.reshape(1, ranks, case.tokens, 1, case.top_k), shape).copy()


def counted(routes: Any, experts: int) -> Any:
    """counts [micro-batches, layers, ranks, experts], int64, of such routes."""
    batches, ranks, _, layers, _ = routes.shape
    found = np.zeros((batches, layers, ranks, experts), dtype=np.int64)
    for m, layer, rank in np.ndindex(batches, layers, ranks):
        found[m, layer, rank] = np.bincount(routes[m, rank, :, layer].ravel(), minlength=experts)
    return found


def _hot(case: Case, ranks: int) -> Any:
    homes = contiguous_homes(case.experts, ranks)
    routes = np.empty((case.batches, ranks, case.tokens, case.layers, case.top_k), dtype=np.int64)
    for m, layer in np.ndindex(case.batches, case.layers):
        rng = np.random.default_rng((case.seed, m, layer))
        weight = rng.lognormal(0, SIGMA, case.experts)
        for rank in range(ranks):
            share = case.hot if rank == (m + layer) % ranks else (1 - case.hot) / max(1, ranks - 1)
            weight[homes == rank] *= share / weight[homes == rank].sum()
        waits = rng.standard_exponential((ranks, case.tokens, case.experts)) / weight  # who rings first, top_k times
        routes[m, :, :, layer] = np.argpartition(waits, case.top_k - 1, axis=-1)[..., : case.top_k]
    return routes


def _recorded(case: Case, ranks: int) -> Any:
    path, needed = Path(case.routes), case.batches * ranks * case.tokens
    ids = np.load(path)[f"{case.domain}_ids"]
    layers, tokens, top_k = ids.shape
    if layers < case.layers or tokens < needed or top_k != case.top_k or ids.max() >= case.experts:
        raise CallerError(
            f"{path.name}, {case.domain}: {layers} layers, {tokens} tokens, top-{top_k}, experts to {ids.max()}."
            f" This run takes {case.layers} layers, {needed} tokens, top-{case.top_k} of {case.experts}."
        )
    some = np.linspace(0, layers - 1, case.layers).round().astype(int)
    mine = ids[some, :needed].astype(np.int64).transpose(1, 0, 2)
    return mine.reshape(case.batches, ranks, case.tokens, case.layers, top_k)
