"""The routing table of one RL step: which experts every token chose in every layer, and what of it is known when. Pure.

Readers in `adapters/` make it from what engines and trainers record; `foresee.py` counts it. Legend: T tokens, L MoE
layers, K top-k, S sequences.

    routes_TLK   row of token t, layer l: its K expert ids, in the order in which the router gave them
    offsets_S1   [S + 1] token at which each sequence starts; the last is the number of tokens
    known_T      False: the token is computed, but nobody recorded its route (the last of a sequence, rows that an
                 engine dropped, rows that replay leaves to the live gate). None: all are known. Padding is no token:
                 readers leave it out
    -1           a row that is missing in some layers only; ids are signed then
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array

Ids: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Replay = Literal["R3", "R2"]
Stage = Literal["recompute", "update"]


class Routing(msgspec.Struct, frozen=True, eq=False):
    """One RL step's routes. Build it with `Routing.of`, which checks and narrows; readers do.

    experts    routed experts of a layer; ids lie below it
    replay     R3: rollout's routes, known before recompute. R2: recorded in the log-prob pass, known before update only
    source_T   rank that held the token where it was recorded, None if unknown
    domains    name -> (first sequence, end sequence), in the order of the table
    layer_ids  the model's number of each layer, as its source counts them
    notes      what a reader assumed, in plain words
    """

    routes_TLK: Ids
    offsets_S1: Array
    experts: int
    known_T: Mask | None = None
    replay: Replay = "R3"
    source_T: Ids | None = None
    domains: Mapping[str, tuple[int, int]] = {}
    layer_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        routes_TLK: Ids,
        offsets_S1: Any = None,
        *,
        experts: int | None = None,
        known_T: Any = None,
        replay: Replay = "R3",
        source_T: Any = None,
        domains: Mapping[str, tuple[int, int]] | None = None,
        layer_ids: tuple[int, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> "Routing":
        """A checked table in the smallest integer type.

        offsets_S1  None: one sequence
        experts     None: the largest id plus one
        A token without a row in any layer becomes unknown. The array is taken over, not copied, where it already is
        contiguous and of the smallest type. CallerError says what does not fit.
        """
        if routes_TLK.ndim != 3 or routes_TLK.dtype.kind not in "iu":
            raise CallerError(
                f"routes: {routes_TLK.dtype} of shape {routes_TLK.shape}. Give integers [tokens, layers, top_k]."
            )
        tokens, layers, _ = routes_TLK.shape
        offsets = np.array([0, tokens] if offsets_S1 is None else offsets_S1, dtype=np.int64)
        rising = offsets.ndim == 1 and offsets.size > 0 and bool((np.diff(offsets) >= 0).all())
        if not rising or offsets[0] != 0 or offsets[-1] != tokens:
            raise CallerError(
                f"offsets: {offsets.tolist()[:4]}... for {tokens} tokens. They rise from 0 to the number of tokens."
            )
        known = None if known_T is None else np.array(known_T, dtype=np.bool_)
        source = None if source_T is None else np.asarray(source_T)
        for name, values in (("known", known), ("source", source)):
            if values is not None and values.shape != (tokens,):
                raise CallerError(f"{name}: shape {values.shape} for {tokens} tokens. Give one value per token.")
        if source is not None:
            source = source.astype(smallest(int(source.max(initial=0)), False), copy=False)
        if layer_ids and len(layer_ids) != layers:
            raise CallerError(f"layer_ids: {len(layer_ids)} for {layers} layers. Give one per layer, or none.")
        for name, (first, end) in (domains or {}).items():
            if not 0 <= first <= end < len(offsets):
                raise CallerError(
                    f"domain {name}: sequences {first} to {end} of {len(offsets) - 1}. Give a range inside."
                )
        most = int(routes_TLK.max()) if routes_TLK.size else -1
        limit = most + 1 if experts is None else experts
        if most >= limit:
            raise CallerError(f"routes: holds expert {most}, the limit is {limit - 1}. Is it another model's table?")
        routes, known = narrow(routes_TLK, most, known)
        return cls(
            routes,
            offsets,
            limit,
            known,
            replay,
            source,
            dict(domains or {}),
            tuple(layer_ids) or tuple(range(layers)),
            notes,
        )

    @property
    def tokens(self) -> int:
        return int(self.routes_TLK.shape[0])

    @property
    def layers(self) -> int:
        return int(self.routes_TLK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.routes_TLK.shape[2])

    @property
    def sequences(self) -> int:
        return len(self.offsets_S1) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the table with everything per token and sequence."""
        parts = (self.routes_TLK, self.offsets_S1, self.known_T, self.source_T)
        return sum(part.nbytes for part in parts if part is not None)

    def foreseen(self, stage: Stage) -> bool:
        """May the load of `stage` be planned from this table before the stage begins?"""
        return stage == "update" or self.replay == "R3"

    def domain(self, name: str) -> "Routing":
        """The sequences of one domain; a view, nothing is copied. CallerError for a name that is not there."""
        if name not in self.domains:
            there = ", ".join(self.domains) or "none: the table has no domains"
            raise CallerError(f"domain {name!r}: not in this table. It has {there}.")
        first, end = self.domains[name]
        part = slice(int(self.offsets_S1[first]), int(self.offsets_S1[end]))
        return msgspec.structs.replace(
            self,
            routes_TLK=self.routes_TLK[part],
            offsets_S1=self.offsets_S1[first : end + 1] - self.offsets_S1[first],
            known_T=None if self.known_T is None else self.known_T[part],
            source_T=None if self.source_T is None else self.source_T[part],
            domains={name: (0, end - first)},
        )

    def same(self, other: "Routing") -> bool:
        """Equal routes, sequences, gaps, experts and replay: whatever counting could tell apart."""
        mine, theirs = self.known(), other.known()
        return (
            self.routes_TLK.shape == other.routes_TLK.shape
            and (self.experts, self.replay) == (other.experts, other.replay)
            and bool((self.offsets_S1.shape == other.offsets_S1.shape) and (self.offsets_S1 == other.offsets_S1).all())
            and bool((mine == theirs).all())
            and bool((self.routes_TLK == other.routes_TLK).all())
        )

    def known(self) -> Mask:
        """[T] known_T, spelled out."""
        return np.ones(self.tokens, dtype=np.bool_) if self.known_T is None else self.known_T


def smallest(most: int, signed: bool) -> Any:
    """The smallest of int8, uint8, int16 and int32 that holds 0 to `most`, and -1 too where `signed`."""
    kinds: tuple[Any, ...] = (np.int8 if signed else np.uint8, np.int16)
    return next((np.dtype(kind) for kind in kinds if most <= np.iinfo(kind).max), np.dtype(np.int32))


BLOCK = 1 << 20  # bytes worked on at once, so that wide types never exist in whole


def narrow(routes_TLK: Ids, most: int, known_T: Mask | None) -> tuple[Ids, Mask | None]:
    """The table in its smallest type, and which tokens are known; rows of unknown tokens become 0.

    Goes through the table in blocks: what is held at once is the table, the narrow table and a few megabytes.
    """
    tokens, layers, top_k = routes_TLK.shape
    step = max(1, BLOCK // max(1, layers * top_k * routes_TLK.itemsize))
    known = known_T
    partial = False
    if routes_TLK.dtype.kind == "i":
        for at in range(0, tokens, step):
            gone_TL: Mask = np.any(routes_TLK[at : at + step] < 0, axis=2)
            if gone_TL.any():
                known = np.ones(tokens, dtype=np.bool_) if known is None else known
                known[at : at + step] &= ~gone_TL.all(axis=1)
                partial |= bool((gone_TL.any(axis=1) & known[at : at + step]).any())
    if known is not None and known.all():
        known = None
    dtype = smallest(most, partial)
    touched = partial or known is not None
    same = routes_TLK.dtype == dtype and routes_TLK.flags.c_contiguous and (routes_TLK.flags.writeable or not touched)
    routes = routes_TLK if same else np.empty(routes_TLK.shape, dtype=dtype)
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        if not same:
            routes[part] = routes_TLK[part].clip(min=-1) if partial else routes_TLK[part]
        if known is not None:
            routes[part][~known[part]] = 0
    if partial:
        _whole_rows(routes, step)
    return routes, known


def _whole_rows(routes_TLK: Ids, step: int) -> None:
    """A row with any id missing is missing: -1 throughout."""
    for at in range(0, len(routes_TLK), step):
        block = routes_TLK[at : at + step]
        block[(block < 0).any(axis=2)] = -1
