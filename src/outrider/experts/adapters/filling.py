"""A table filled piece by piece in its smallest type, so that wider pieces never exist in whole. Used by the readers.

Readers go over their source twice: `Extent` sees every piece and settles the type; then `Filling` takes the pieces.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.routing import BLOCK, Ids, Mask, Replay, Routing, smallest


class Ask(msgspec.Struct, frozen=True):
    """What a file does not say by itself, and the caller may.

    experts       routed experts of a layer; None: the largest id plus one
    layers, top_k shape of a row, for SGLang's flat payloads; one of them is enough where token counts are there
    replay        R3: recorded in rollout. R2: recorded in the log-prob pass, where the last token has a row too
    step          Megatron: only this step; None: all
    pipeline      Megatron: pipeline stages whose files number layers from the stage's own first one
    warmup_rows   dumps: rows at the start of each request that belong to no token of it
    """

    experts: int | None = None
    layers: int | None = None
    top_k: int | None = None
    replay: Replay = "R3"
    step: int | None = None
    pipeline: int = 1
    warmup_rows: int = 0


@dataclass
class Extent:
    """Largest id, and whether a token has rows in some layers and none in others."""

    most: int = -1
    partial: bool = False

    def see(self, block_TLK: Ids) -> None:
        if block_TLK.size:
            self.most = max(self.most, int(block_TLK.max()))
        if block_TLK.dtype.kind == "i" and not self.partial:
            gone_TL: Mask = np.any(block_TLK < 0, axis=2)
            self.partial = bool((gone_TL.any(axis=1) & ~gone_TL.all(axis=1)).any())

    @property
    def dtype(self) -> np.dtype[Any]:
        kind: np.dtype[Any] = smallest(self.most, self.partial)
        return kind


@dataclass
class Filling:
    """tokens, layers, top_k: of the whole table; tokens that are never put stay unknown."""

    tokens: int
    layers: int
    top_k: int
    dtype: np.dtype[Any]
    routes_TLK: Ids = field(init=False)
    known_T: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.routes_TLK = np.zeros((self.tokens, self.layers, self.top_k), dtype=self.dtype)
        self.known_T = np.zeros(self.tokens, dtype=np.bool_)

    def put(self, at: int, block_TLK: Ids) -> None:
        """Rows of tokens at, at + 1, ...; a row with a negative id is missing."""
        part = slice(at, at + len(block_TLK))
        known: Mask = np.ones(len(block_TLK), dtype=np.bool_)
        if block_TLK.dtype.kind == "i":
            gone_TL: Mask = np.any(block_TLK < 0, axis=2)
            known = ~np.all(gone_TL, axis=1)
            if gone_TL.any():
                block_TLK = np.where(gone_TL[:, :, None], -1 if self.dtype.kind == "i" else 0, block_TLK)
        self.routes_TLK[part] = block_TLK
        self.known_T[part] = known

    def routing(self, lengths: Any, ask: Ask, **more: Any) -> Routing:
        """The table; lengths: tokens of each sequence."""
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return Routing.of(
            self.routes_TLK, offsets, experts=ask.experts, known_T=self.known_T, replay=ask.replay, **more
        )


def without_dense(routing: Routing) -> Routing:
    """Leave out layers that are no MoE layers: engines that number all layers fill the dense ones with one id.

    A router never chooses one expert k times, so a layer whose rows hold one and the same id throughout is filler.
    """
    if routing.top_k < 2:
        return routing
    maybe = np.arange(routing.layers)
    filler_L = np.full(routing.layers, -1, dtype=np.int64)
    step = max(1, BLOCK // max(1, routing.layers * routing.top_k * routing.routes_TLK.itemsize))
    for at in range(0, routing.tokens, step):
        block = routing.routes_TLK[at : at + step][:, maybe]
        if routing.known_T is not None:
            block = block[routing.known_T[at : at + step]]
        first = np.where(filler_L[maybe] < 0, block.max(axis=(0, 2), initial=0), filler_L[maybe])
        there = np.all(block >= 0, axis=2)
        alike = np.all((block == first[:, None]) | ~there[:, :, None], axis=(0, 2))
        filler_L[maybe] = np.where(np.any(there, axis=0), first, filler_L[maybe])
        maybe = maybe[alike]
        if not maybe.size:
            return routing
    dense_L = np.isin(np.arange(routing.layers), maybe) & (filler_L >= 0)
    if not dense_L.any() or dense_L.all():
        return routing
    kept = np.flatnonzero(~dense_L)
    gone = [routing.layer_ids[i] for i in np.flatnonzero(dense_L)]
    return msgspec.structs.replace(
        routing,
        routes_TLK=np.ascontiguousarray(routing.routes_TLK[:, kept]),
        layer_ids=tuple(routing.layer_ids[i] for i in kept),
        notes=(*routing.notes, f"layers {gone} hold one and the same id throughout: dense layers, left out"),
    )


def token_rows(name: str, array: Ids) -> Ids:
    """The array if it is integer rows [tokens, layers, top_k]; CallerError otherwise."""
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise CallerError(f"{name}: {array.dtype} of shape {array.shape}. Give integers [tokens, layers, top_k].")
    return array
