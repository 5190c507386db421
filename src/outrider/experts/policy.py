"""Policy of experts: one object per rank, told the same events, reaching the same commands (law 7). Pure.

It owns where every expert is at home, what lies in every frame of every rank, and which of those copies owe a gradient
that is not home yet. Micro-steps are planned (`plan.py`, or a plan is given), then the passes over them are laid out
as visits, and `frames.py` says which copy is carried when. An owing frame is never refilled before its gradient has
gone home, and after Finished nothing is held at all: the optimizer is about to change the weights.
"""

from collections.abc import Sequence
from typing import Any, assert_never

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import (
    DIRECT,
    HOST,
    RETURN,
    Array,
    Began,
    Carry,
    Command,
    Event,
    Finished,
    Foreseen,
    Gated,
    Pass,
    Planned,
    Ran,
    Release,
    Relocate,
    Share,
    Stage,
    Tally,
    Use,
    UseLayer,
)
from outrider.experts.frames import carry
from outrider.experts.order import Order
from outrider.experts.plan import HORIZON, contiguous_homes, plan

KINDS = {"direct": DIRECT, "host": HOST}


class Settings(msgspec.Struct, frozen=True):
    """Shape of the model and of the rank group.

    slots           copies that a rank may use in each layer; 0 turns balancing off
    ring            layers whose copies are held at once; 0: all, and one layer's more to fetch ahead
    ranks_per_node  ranks that share host memory; 0: all
    recompute, update  the path of weights in these stages: direct (rank to rank) or host (out of shared memory)
    """

    layers: int
    experts: int
    ranks: int
    slots: int = 2
    ring: int = 0
    ranks_per_node: int = 0
    recompute: str = "direct"
    update: str = "direct"

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "ranks"):
            if getattr(self, name) < 1:
                raise CallerError(f"experts.{name}: {getattr(self, name)} is too few. Give 1 or more.")
        if self.slots < 0:
            raise CallerError(f"experts.slots: {self.slots} is negative. Give 0 (no balancing) or more.")
        if not 0 <= self.ring <= self.layers + 1:
            raise CallerError(f"experts.ring: {self.ring} layers. Give 1 to {self.layers + 1}, or 0 for all.")
        if self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise CallerError(
                f"experts.ranks_per_node: {self.ranks_per_node} does not divide {self.ranks} ranks. Give a divisor."
            )
        for name in ("recompute", "update"):
            if getattr(self, name) not in KINDS:
                raise CallerError(f"experts.{name}: {getattr(self, name)} is no path. Give direct or host.")

    @property
    def frames(self) -> int:
        """Places for copies that a rank has, over all layers."""
        return self.slots * (self.ring or self.layers + 1)

    @property
    def nodes(self) -> Array:
        """[ranks] the node of each."""
        nodes_R: Array = np.arange(self.ranks, dtype=np.int64) // (self.ranks_per_node or self.ranks)
        return nodes_R


class MicroStep(msgspec.Struct, frozen=True, eq=False):
    """What is known of one micro-batch. quotas as in Use; needs [n, 3]: layer, rank, expert of every copy used."""

    quotas: Array
    most_L: Array
    needs: Array


class Policy:
    """Decides copies, token split, transfers and gradient returns of one RL step after another."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        homes_E = contiguous_homes(settings.experts, settings.ranks)
        self.homes_LE = np.tile(homes_E, (settings.layers, 1))
        shape = (settings.ranks, settings.frames)
        self.page_RF = np.full(shape, -1, dtype=np.int64)  # layer * experts + expert
        self.owes_RF, self.fresh_RF, self.cancelled_RF = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self.counts_MLRE: Array | None = None
        self.replicas_LRS = self._empty()
        self._steps: list[MicroStep] = []
        self._order = Order((), 0)
        self._visits = 0  # of the passes that have begun
        self._shared = False  # whether this step's experts lie in shared memory
        self._last_RP: Array | None = None  # the last pass of the step that needs each page of a rank
        self._coming: Pass = "update", 0  # what was fetched ahead for

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event of pass `now`; what the mover must do, in order."""
        match event:
            case Foreseen(counts_MLRE, passes):
                self._anew(self._checked(counts_MLRE), passes)
                return []
            case Planned(homes_LE, quota, most_LM, passes):
                return self._take(homes_LE, quota, most_LM, passes)
            case Began(stage, batch):
                return self._begin(stage, batch)
            case Gated(stage, layer, counts_RE):
                return self._react(stage, layer, counts_RE)
            case Ran(batch, seen_LRE, _):
                over_LRE = seen_LRE - self._counts(batch)
                unforeseen, absent = int(over_LRE.clip(min=0).sum()), int((-over_LRE).clip(min=0).sum())
                return [Tally(unforeseen, absent)] if unforeseen or absent else []
            case Finished():
                rank, frame = np.nonzero(self.owes_RF)
                rows = self._returns(rank, frame, self._visits)
                self.page_RF = np.full_like(self.page_RF, -1)
                self.owes_RF, self.fresh_RF, self.cancelled_RF = (np.zeros_like(self.owes_RF) for _ in range(3))
                self._anew(None, ())
                return [*([Carry(rows)] if len(rows) else []), Release()]
            case _:
                assert_never(event)

    def _anew(self, counts_MLRE: Array | None, passes: tuple[Pass, ...]) -> None:
        """A step begins, or is over."""
        self.counts_MLRE, self._steps = counts_MLRE, []
        self._order = Order(passes, 0 if counts_MLRE is None else len(counts_MLRE))
        self.replicas_LRS, self._visits, self._shared = self._empty(), 0, False
        self._last_RP = None
        for _, batch in passes:
            self._counts(batch)

    def _take(self, homes_LE: Array, quota: Array, most_LM: Array, passes: tuple[Pass, ...]) -> list[Command]:
        """A plan of the whole step is given: take it, and bring masters to where it has them at home."""
        shape = self.settings
        layers, steps = most_LM.shape
        highest = (layers, steps, shape.ranks, shape.experts, shape.ranks)
        if (
            homes_LE.shape != self.homes_LE.shape
            or layers != shape.layers
            or not (homes_LE.min(initial=0) >= 0 and homes_LE.max(initial=0) < shape.ranks)
            or (len(quota) and ((quota[:, :5] < 0).any() or (quota[:, :5].max(axis=0) >= highest).any()))
        ):
            raise CallerError(
                f"plan: homes {homes_LE.shape}, {layers} layers. Give a plan of {shape.layers} layers,"
                f" {shape.experts} experts, {shape.ranks} ranks."
            )
        layer, step, source, expert, rank, tokens = quota.astype(np.int64).T
        size = (steps, layers, shape.ranks, shape.experts)
        cell = np.ravel_multi_index((step, layer, source, expert), size)
        counted = np.bincount(cell, weights=tokens, minlength=int(np.prod(size)))
        self._anew(counted.astype(np.int64).reshape(size), passes)
        moved = np.argwhere(homes_LE != self.homes_LE)
        commands: list[Command] = []
        if len(moved):
            at = tuple(moved.T)
            rows = np.column_stack([moved, self.homes_LE[at], homes_LE[at]])
            commands.append(Relocate(rows, homes_LE.astype(np.int64)))
        order = np.argsort(step * layers + layer, kind="stable")
        table: Array = np.column_stack([layer, expert, source, rank, tokens])[order].astype(np.int32)
        for m, some in enumerate(np.split(table, np.searchsorted(step[order], np.arange(1, steps)))):
            self._steps.append(MicroStep(some, most_LM[:, m].astype(np.int64), self._needs(some, homes_LE)))
        self.homes_LE = homes_LE.astype(np.int64)  # last: a plan that is refused changes nothing
        return commands

    def _begin(self, stage: Stage, batch: int) -> list[Command]:
        self._counts(batch)
        number, coming = self._order.begin((stage, batch))
        first, length = self._visits, self._length(stage)
        shares = [] if self._shared or HOST not in {self._kind(one) for one, _ in coming} else self._share()
        rows = self._carry(number, coming, first)
        self._visits = first + length
        step = self._step(batch)
        expected, self._coming = coming[0] == self._coming or not first, coming[-1]
        return [*shares, *([Carry(rows)] if len(rows) else []), Use(first, expected, step.quotas, step.most_L)]

    def _last(self, stage: Stage, number: int) -> tuple[Array, int]:
        """last_RP and the number of this pass, for `frames.carry`; -1 where it is not known which pass is the last."""
        size = self.settings.ranks, self.settings.layers * self.settings.experts
        if stage in ("recompute", "forward") or number < 0:
            return np.zeros(size, dtype=np.int64), -1
        if self._last_RP is None:
            self._last_RP = np.zeros(size, dtype=np.int64)
            for n, (_, m) in enumerate(self._order.passes):
                layer, rank, expert = self._step(m).needs.T
                self._last_RP[rank, layer * self.settings.experts + expert] = n
        return self._last_RP, number

    def _kind(self, stage: Stage) -> int:
        return KINDS[self.settings.recompute if stage == "recompute" else self.settings.update]

    def _length(self, stage: Stage) -> int:
        return self.settings.layers * (2 if stage == "update" else 1)

    def _carry(self, number: int, coming: Sequence[Pass], first: int) -> Array:
        """Carry rows of pass `number`, the first of these, from visit `first` on; the next is fetched ahead for."""
        layers, experts, ranks = self.settings.layers, self.settings.experts, self.settings.ranks
        needs, backward = [], []
        begin = first
        for stage, batch in coming:
            wanted = self._step(batch).needs
            kind = self._kind(stage)
            page = wanted[:, 0] * experts + wanted[:, 2]
            if stage != "backward":
                needs.append(np.column_stack([wanted[:, 1], begin + wanted[:, 0], page, np.full(len(page), kind)]))
                backward += [0] * layers
                begin += layers
            if stage in ("update", "backward"):
                visit = begin + layers - 1 - wanted[:, 0]
                needs.append(np.column_stack([wanted[:, 1], visit, page, np.full(len(page), kind)]))
                backward += [1] * layers
                begin += layers
        table = np.concatenate(needs).astype(np.int64)
        table = table[np.lexsort(table[:, 2::-1].T)]
        rows = carry(
            self.page_RF,
            self.owes_RF,
            self.fresh_RF,
            self.cancelled_RF,
            np.searchsorted(table[:, 0], np.arange(ranks + 1)),
            np.ascontiguousarray(table[:, 1:]),
            self.homes_LE.reshape(-1),
            np.array(backward, dtype=np.int64),
            first,
            self._length(coming[0][0]),
            *self._last(coming[0][0], number),
        )
        return self._sorted(rows)

    def _sorted(self, rows: Array) -> Array:
        """Pages become layer and expert; rows in the order in which they are carried."""
        page = rows[:, 3].copy()
        rows[:, 3], rows[:, 4] = page // self.settings.experts, page % self.settings.experts
        ordered: Array = rows[np.lexsort(rows[:, ::-1].T)]
        return ordered

    def _share(self) -> list[Command]:
        """Experts that a step may pull out of shared memory, when it first will: each once in every node that pulls it.

        The home puts it into its own node's, and into another's the rank there that has the home's number in its node.
        """
        assert self.counts_MLRE is not None
        nodes, width = self.settings.nodes, self.settings.ranks_per_node or self.settings.ranks
        wanted = np.concatenate([self._step(m).needs for m in range(len(self.counts_MLRE))])
        rows = np.unique(np.column_stack([nodes[wanted[:, 1]], wanted[:, 0], wanted[:, 2]]), axis=0)
        self._shared = True
        if not len(rows):
            return []
        homes = self.homes_LE[rows[:, 1], rows[:, 2]]
        return [Share(np.column_stack([rows[:, 1], rows[:, 2], homes, rows[:, 0], rows[:, 0] * width + homes % width]))]

    def _step(self, batch: int) -> MicroStep:
        """Micro-batches are planned one after another, as far as they are asked for."""
        while len(self._steps) <= batch:
            m = len(self._steps)
            step = plan(
                self._counts(m),
                self.settings.slots,
                self.homes_LE,
                self.replicas_LRS,
                ahead_HLE=self._ahead(m),
                ranks_per_node=self.settings.ranks_per_node or None,
            )
            self.replicas_LRS = step.replicas_LRS
            self._steps.append(MicroStep(step.quotas, step.most_L, self._needs(step.quotas, self.homes_LE)))
        return self._steps[batch]

    def _needs(self, quotas: Array, homes_LE: Array) -> Array:
        layer, expert, _, rank, _ = quotas.T
        away = homes_LE[layer, expert] != rank
        size = (self.settings.layers, self.settings.ranks, self.settings.experts)
        cells = np.unique(np.ravel_multi_index((layer[away], rank[away], expert[away]), size))
        needs: Array = np.column_stack(np.unravel_index(cells, size))
        copies = np.bincount(cells // self.settings.experts)
        if copies.max(initial=0) > self.settings.frames:
            raise CallerError(
                f"plan: {copies.max()} copies of one layer on a rank that has {self.settings.frames} frames."
                " Plan with as many slots as the settings have, or set a larger ring."
            )
        return needs

    def _react(self, stage: Stage, layer: int, counts_RE: Array) -> list[Command]:
        """Plan one layer of this micro-step from what its gate has just decided."""
        shape = self.settings
        if counts_RE.shape != (shape.ranks, shape.experts) or not 0 <= layer < shape.layers:
            raise CallerError(
                f"layer {layer}, counts {counts_RE.shape}: give a layer of the model, counts"
                f" {(shape.ranks, shape.experts)}."
            )
        if shape.ring and shape.ring < shape.layers:
            raise CallerError(f"ring {shape.ring}: without foresight all layers' copies are held. Leave ring out.")
        one = slice(layer, layer + 1)
        nodes = shape.ranks_per_node or None
        step = plan(counts_RE[None], shape.slots, self.homes_LE[one], self.replicas_LRS[one], ranks_per_node=nodes)
        self.replicas_LRS = self.replicas_LRS.copy()
        self.replicas_LRS[layer] = step.replicas_LRS[0]
        quotas = step.quotas
        quotas[:, 0] = layer
        rows = self._refill(layer, self._needs(quotas, self.homes_LE), stage == "update")
        return [*([Carry(rows)] if len(rows) else []), UseLayer(layer, quotas, int(step.most_L[0]))]

    def _refill(self, layer: int, needs: Array, backward: bool) -> Array:
        """Carry rows that leave in a layer's frames its replicas, and no others."""
        experts, rows = self.settings.experts, []
        for rank in range(self.settings.ranks):
            wanted = {layer * experts + expert for expert in self.replicas_LRS[layer, rank].tolist() if expert >= 0}
            used = [layer * experts + expert for _, r, expert in needs.tolist() if r == rank]
            pages = self.page_RF[rank]
            stale = [f for f, page in enumerate(pages.tolist()) if page // experts == layer and page not in wanted]
            owing = np.array([f for f in stale if self.owes_RF[rank, f]], dtype=np.int64)
            rows.append(self._returns(np.full(len(owing), rank), owing, 0))
            pages[stale] = -1
            self.owes_RF[rank, stale] = 0
            for page in sorted(wanted - set(pages.tolist())):
                frame = int(np.flatnonzero(pages < 0)[0])
                pages[frame] = page
                home = self.homes_LE[layer, page % experts]
                rows.append(np.array([[-1, 0, DIRECT, layer, page % experts, home, rank, frame]]))
            if backward:
                self.owes_RF[rank, np.isin(pages, used)] = 1
        table = np.concatenate(rows)
        ordered: Array = table[np.lexsort(table[:, ::-1].T)]
        return ordered

    def _returns(self, rank: Array, frame: Array, visit: int) -> Array:
        """Carry rows that bring the gradients of these frames home, now."""
        page = self.page_RF[rank, frame]
        layer, expert = page // self.settings.experts, page % self.settings.experts
        now = np.full(len(page), visit - 1)
        home = self.homes_LE[layer, expert]
        rows = np.column_stack([now, now + 1, np.full(len(page), RETURN), layer, expert, rank, home, frame])
        ordered: Array = rows[np.lexsort(rows[:, ::-1].T)].astype(np.int64)
        return ordered

    def _checked(self, counts_MLRE: Array) -> Array:
        want = (self.settings.layers, self.settings.ranks, self.settings.experts)
        if counts_MLRE.ndim != 4 or counts_MLRE.shape[1:] != want or not len(counts_MLRE):
            layers, ranks, experts = want
            raise CallerError(
                f"counts: shape {counts_MLRE.shape}. Give [micro-batches, layers, ranks, experts], here one or more by"
                f" {layers}, {ranks}, {experts}."
            )
        return counts_MLRE

    def _counts(self, batch: int) -> Array:
        if self.counts_MLRE is None or not 0 <= batch < len(self.counts_MLRE):
            foreseen = 0 if self.counts_MLRE is None else len(self.counts_MLRE)
            raise CallerError(f"micro-batch {batch}: {foreseen} were foreseen. Foresee all before the first.")
        counts_LRE: Array = self.counts_MLRE[batch]
        return counts_LRE

    def _ahead(self, batch: int) -> Array:
        """Load of the micro-steps after this one, [steps, layers, experts]."""
        assert self.counts_MLRE is not None
        load_HLE: Array = self.counts_MLRE[batch + 1 : batch + 1 + HORIZON].sum(axis=2)
        return load_HLE

    def _empty(self) -> Any:
        return np.full((self.settings.layers, self.settings.ranks, self.settings.slots), -1, dtype=np.int64)
