"""Foresee: from the routes that rollouts recorded to the load of every micro-step. Pure; called by training loops.

A row of routes is one token's top-k expert ids in one layer. A row with a negative id was not recorded (the last
token of a sequence, rows an engine dropped): it is routed by the live gate later and cannot be foreseen.

`counts` takes a `Routing`, cuts it into micro-batches and runs; `foresee` takes the cut as arrays. Legend: M
micro-batches, L layers, R source ranks, E experts, T tokens, K top-k.
"""

from itertools import pairwise
from typing import Any, Literal

import numpy as np

from outrider.errors import CallerError
from outrider.experts.compiled import compiled
from outrider.experts.events import Array
from outrider.experts.routing import Ids, Mask, Routing, Stage

AnyInt = np.ndarray[Any, np.dtype[Any]]


def counts(
    routing: Routing,
    ranks: int,
    microbatch_tokens: int | None = None,
    microbatch_seqs: int | None = None,
    *,
    experts: int | None = None,
    stage: Stage = "update",
    own_source: bool = False,
    duplicates: Literal["collapse", "twice"] = "collapse",
) -> Array:
    """Count token-slots per micro-batch, layer, source rank and expert.

    microbatch_tokens, microbatch_seqs
                how micro-batches are cut, one of the two; see `micro_batches`
    experts     columns of the result; None: `routing.experts`
    stage       the stage to be planned; CallerError where the table is not known before it (R2 before recompute)
    own_source  tokens stay on the rank that the table names; otherwise in equal contiguous runs, see `source_edges`
    duplicates  an id that stands twice in a row: one token-slot, as in a boolean routing map (Megatron, veRL), or two
    Returns counts_MLRE, int32. Tokens of unknown route take their place in a micro-batch and are not counted.
    Memory: the result, and layers x experts beside it.
    """
    if not routing.foreseen(stage):
        raise CallerError(
            f"routes: {routing.replay} records them in the {stage} pass, so its load is not known before."
            " Foresee the update, or record routes in rollout (R3)."
        )
    width = routing.experts if experts is None else experts
    if width < routing.experts:
        raise CallerError(f"experts {width}: the table has {routing.experts}. Is it another model's table?")
    edges_M1 = micro_batches(routing, microbatch_tokens, microbatch_seqs)
    runs_N4 = _own_runs(routing, edges_M1, ranks) if own_source else _even_runs(edges_M1, ranks)
    shape = len(edges_M1) - 1, routing.layers, ranks, width
    counts_MLRE: Any = np.zeros(shape, dtype=np.int32)  # half of int64; planners widen one micro-step at a time
    known_T = np.zeros(0, dtype=np.bool_) if routing.known_T is None else routing.known_T
    _count_runs(routing.routes_TLK, known_T, runs_N4, duplicates == "collapse", counts_MLRE)
    counted: Array = counts_MLRE
    return counted


def micro_batches(routing: Routing, microbatch_tokens: int | None = None, microbatch_seqs: int | None = None) -> Array:
    """[M + 1] token at which each micro-batch starts: so many tokens each, or so many whole sequences.

    Micro-batches follow the table's order; an incomplete last one is dropped. CallerError unless exactly one size is
    given and at least one micro-batch is whole.
    """
    if (microbatch_tokens is None) == (microbatch_seqs is None):
        raise CallerError(
            f"micro-batches: {'no' if microbatch_tokens is None else 'more than one'} size. Give either tokens"
            " (--microbatch-tokens) or whole sequences (--microbatch-seqs)."
        )
    size, there, unit = (
        (microbatch_tokens, routing.tokens, "tokens")
        if microbatch_tokens is not None
        else (microbatch_seqs or 0, routing.sequences, "sequences")
    )
    if not there:
        raise CallerError("micro-batches: the table has no tokens. Give one that holds routes.")
    if not 0 < size <= there:
        raise CallerError(
            f"micro-batch of {size} {unit}: the table has {there}, so there is no whole one. Give 1 to {there}."
        )
    starts = np.arange(there // size + 1, dtype=np.int64) * size
    return starts if microbatch_tokens is not None else routing.offsets_S1[starts]


def source_edges(tokens: int, ranks: int) -> Array:
    """[R + 1] where each rank's run of a micro-batch starts: contiguous, equal; the first ranks have one token more."""
    if ranks < 1:
        raise CallerError(f"ranks {ranks}: at least one rank holds the tokens. Give the size of the EP group.")
    share, more = divmod(tokens, ranks)
    rank = np.arange(ranks + 1, dtype=np.int64)
    return rank * share + np.minimum(rank, more)


def foresee(
    routes: AnyInt, batch: AnyInt, source: AnyInt, experts: int, ranks: int, batches: int | None = None
) -> Array:
    """Count token-slots per micro-batch, layer, source rank and expert.

    routes   [tokens, layers, top_k], any integer type; -1 anywhere in a row: not recorded, not counted
    batch    [tokens] micro-batch of each token; negative: masked, not counted
    source   [tokens] rank that owns the token
    batches  number of micro-batches; None: the largest in `batch` plus one
    Returns counts_MLRE, int64. A duplicate id in a row counts twice: it is computed twice by `layer.py`.
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


def _even_runs(edges_M1: Array, ranks: int) -> Array:
    """[M * R, 4] first token, end token, micro-batch, source rank."""
    cuts = [start + source_edges(end - start, ranks) for start, end in pairwise(edges_M1.tolist())]
    cuts_MR1 = np.array(cuts, dtype=np.int64).reshape(-1, ranks + 1)
    batch, rank = np.indices((len(cuts_MR1), ranks))
    return np.stack([cuts_MR1[:, :-1], cuts_MR1[:, 1:], batch, rank], axis=-1).reshape(-1, 4)


def _own_runs(routing: Routing, edges_M1: Array, ranks: int) -> Array:
    """The same where each token stays on its own rank: cut wherever the rank or the micro-batch changes."""
    source = routing.source_T
    if source is None:
        raise CallerError("source: the table does not name the ranks of its tokens. Leave own_source out.")
    end = int(edges_M1[-1])
    if int(source[:end].max(initial=0)) >= ranks:
        raise CallerError(f"source: the table names rank {int(source[:end].max())} of {ranks}. Give all the ranks.")
    cuts = np.union1d(np.flatnonzero(np.diff(source[:end])) + 1, edges_M1)
    first, last = cuts[:-1], cuts[1:]
    return np.stack([first, last, np.searchsorted(edges_M1, first, side="right") - 1, source[first]], axis=-1).astype(
        np.int64
    )


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


@compiled
def _count_runs(routes_TLK: Ids, known_T: Mask, runs_N4: Array, once: bool, counts_MLRE: Array) -> None:
    """Token by token, into a table of one run that stays in the cache; a row is missing where its first id is.

    once: an id counts once in a row. Each cell holds the last token that counted (high half) and the count (low half).
    """
    _, layers, top_k = routes_TLK.shape
    experts = counts_MLRE.shape[3]
    run_LE = np.zeros((layers, experts), dtype=np.int64)
    for n in range(runs_N4.shape[0]):
        first, end, m, q = runs_N4[n]
        run_LE[:] = 0
        for t in range(first, end):
            if known_T.size > 0 and not known_T[t]:
                continue
            stamp = np.int64(t - first + 1) << 32
            for layer in range(layers):
                if routes_TLK[t, layer, 0] >= 0:
                    for k in range(top_k):
                        cell = run_LE[layer, routes_TLK[t, layer, k]]
                        if cell < stamp or not once:
                            run_LE[layer, routes_TLK[t, layer, k]] = stamp | ((cell & 0xFFFFFFFF) + 1)
        for layer in range(layers):
            for e in range(experts):
                counts_MLRE[m, layer, q, e] += run_LE[layer, e] & 0xFFFFFFFF
