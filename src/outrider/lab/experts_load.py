"""Synthetic expert load, seeded: what a gate might send where in the micro-steps of one RL step. For benches and tests.

    regime       popularity of experts          each sequence's own taste
    mild         log-normal, sigma 0.3          Dirichlet, 6 x experts x popularity: close to the popularity
    skewed       log-normal, sigma 0.8          the same
    specialised  log-normal, sigma 0.8          Dirichlet, 0.3 x experts x popularity: few experts a sequence

Every layer has its own popularity. A token goes to top_k different experts, drawn without replacement by its sequence's
taste. No recorded routing is behind these numbers: they bracket what real routing may be, and results on them say
`synthetic`. The random state is the caller's seed and the layer's number, nothing else.
"""

from types import MappingProxyType

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.foresee import source_edges


class Regime(msgspec.Struct, frozen=True):
    """sigma of log popularity; concentration of a sequence's Dirichlet draw, a mean expert's share of it."""

    sigma: float
    concentration: float


REGIMES = MappingProxyType({"mild": Regime(0.3, 6.0), "skewed": Regime(0.8, 6.0), "specialised": Regime(0.8, 0.3)})


def synthetic(
    regime: str,
    ranks: int,
    seed: int,
    *,
    layers: int = 1,
    micro_steps: int = 24,
    sequences: int = 8,
    tokens: int = 2048,
    experts: int = 128,
    top_k: int = 8,
) -> Array:
    """counts_MLRE, int64: token-slots by micro-step, layer, source rank and expert.

    sequences  in a micro-batch, of `tokens` tokens each; tokens go to source ranks in equal contiguous runs
    The first layers of a call with more of them are the same. CallerError for an unknown regime, and too large a top_k.
    """
    if regime not in REGIMES or not 0 < top_k <= experts:
        raise CallerError(
            f"{regime}, top-{top_k} of {experts}: regimes are {', '.join(REGIMES)}; top_k is 1 to experts."
        )
    shape = REGIMES[regime]
    of_token = np.searchsorted(source_edges(sequences * tokens, ranks), np.arange(sequences * tokens), side="right") - 1
    counts_MLRE = np.zeros((micro_steps, layers, ranks, experts), dtype=np.int64)
    for layer in range(layers):
        rng = np.random.default_rng((seed, layer))
        popular_E = rng.lognormal(0, shape.sigma, experts)
        popular_E /= popular_E.sum()
        for m in range(micro_steps):
            taste_SE = rng.dirichlet(shape.concentration * experts * popular_E, sequences).clip(1e-12)
            for s, taste_E in enumerate(taste_SE):
                waits_TE = rng.standard_exponential((tokens, experts), dtype=np.float32) / taste_E.astype(np.float32)
                ids_TK = np.argpartition(waits_TE, top_k - 1, axis=1)[:, :top_k]  # who rings first, top_k times
                source_T = of_token[s * tokens : (s + 1) * tokens]
                cell = (source_T[:, None] * experts + ids_TK).ravel()
                counts_MLRE[m, layer] += np.bincount(cell, minlength=ranks * experts).reshape(ranks, experts)
    return counts_MLRE
