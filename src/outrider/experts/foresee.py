"""Foresee: from the routes that rollouts recorded to the load of every micro-step. Pure; called by training loops.

A row of routes is one token's top-k expert ids in one layer. A row with a negative id was not recorded (the last
token of a sequence, rows an engine dropped): it is routed by the live gate later and cannot be foreseen.
"""

from typing import Any

import numpy as np

from outrider.errors import CallerError
from outrider.experts.compiled import compiled
from outrider.experts.events import Array

AnyInt = np.ndarray[Any, np.dtype[Any]]


def foresee(
    routes: AnyInt, batch: AnyInt, source: AnyInt, experts: int, ranks: int, batches: int | None = None
) -> Array:
    """Count token-slots per micro-batch, layer, source rank and expert.

    routes   [tokens, layers, top_k], any integer type; -1 anywhere in a row: not recorded, not counted
    batch    [tokens] micro-batch of each token; negative: masked, not counted
    source   [tokens] rank that owns the token
    batches  number of micro-batches; None: the largest in `batch` plus one
    Returns counts_MLRE, int64. A duplicate id in a row counts twice: it is computed twice.
    Raises CallerError for shapes that do not fit and for ids beyond `experts`, `ranks` or `batches`.
    """
    if routes.ndim != 3 or batch.shape != routes.shape[:1] or source.shape != routes.shape[:1]:
        raise CallerError(
            f"routes: {routes.shape} with batch {batch.shape} and source {source.shape}."
            " Give [tokens, layers, top_k] and one batch and source per token."
        )
    rows = int(batch.max(initial=-1)) + 1 if batches is None else batches
    for name, values, limit in (("routes", routes, experts), ("batch", batch, rows), ("source", source, ranks)):
        if values.size and int(values.max()) >= limit:
            raise CallerError(
                f"{name}: holds {int(values.max())}, the limit is {limit - 1}. Is it another model's table?"
            )
    if source.size and int(source.min()) < 0:
        raise CallerError("source: holds a negative rank. Mask tokens by a negative batch instead.")
    counts_MLRE = np.zeros((rows, routes.shape[1], ranks, experts), dtype=np.int64)
    _count(routes, batch.astype(np.int64), source.astype(np.int64), counts_MLRE)
    return counts_MLRE


@compiled
def _count(routes: AnyInt, batch: Array, source: Array, counts_MLRE: Array) -> None:
    tokens, layers, top_k = routes.shape
    for i in range(tokens):
        if batch[i] < 0:
            continue
        for layer in range(layers):
            recorded = True
            for k in range(top_k):
                recorded &= routes[i, layer, k] >= 0
            if recorded:
                for k in range(top_k):
                    counts_MLRE[batch[i], layer, source[i], routes[i, layer, k]] += 1
