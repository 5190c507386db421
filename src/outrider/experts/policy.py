"""Policy of experts: one object per rank, told the same events, reaching the same commands (law 7). Pure.

It owns what lies in every spare slot of every rank and which of those copies carry gradients that are not home yet:

    free -> (Fetch) -> ready -> (an update micro-step uses it) -> dirty -> (ReturnGradients) -> free or refilled

A dirty slot is never refilled before its gradients have gone home, and after Finished nothing is held at all: the
optimizer is about to change the weights, so a copy kept longer would be stale.
"""

from typing import Any, TypeAlias, assert_never

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import (
    Array,
    Began,
    Command,
    Event,
    Fetch,
    Finished,
    Foreseen,
    Gated,
    Ran,
    Release,
    ReturnGradients,
    Stage,
    Tally,
    Use,
    UseLayer,
)
from outrider.experts.plan import contiguous_homes, plan

HORIZON = 3  # micro-steps that a plan looks ahead (docs/log.md)

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


class Settings(msgspec.Struct, frozen=True):
    """Shape of the model and of the rank group. slots: spare expert slots per rank and layer; 0 turns balancing off."""

    layers: int
    experts: int
    ranks: int
    slots: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "ranks"):
            if getattr(self, name) < 1:
                raise CallerError(f"experts.{name}: {getattr(self, name)} is too few. Give 1 or more.")
        if self.slots < 0:
            raise CallerError(f"experts.slots: {self.slots} is negative. Give 0 (no balancing) or more.")


class Policy:
    """Decides copies, token split and gradient returns of one RL step after another."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.homes_E = contiguous_homes(settings.experts, settings.ranks)
        self.counts_MLRE: Array | None = None
        shape = (settings.layers, settings.ranks, settings.slots)
        self.replicas_LRS = np.full(shape, -1, dtype=np.int64)
        self.dirty_LRS = np.zeros(shape, dtype=np.bool_)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event of micro-step `now`; what the mover must do, in order."""
        match event:
            case Foreseen(counts_MLRE):
                self.counts_MLRE = self._checked(counts_MLRE)
                return []
            case Began(stage, batch):
                step = plan(
                    self._counts(batch),
                    self.settings.slots,
                    self.homes_E,
                    self.replicas_LRS,
                    ahead_HLE=self._ahead(stage, batch),
                )
                commands: list[Command] = []
                refilled_LRS = self.replicas_LRS != step.replicas_LRS
                self._return_gradients(self.dirty_LRS & refilled_LRS, commands)
                self.replicas_LRS = step.replicas_LRS
                if stage == "update":
                    self.dirty_LRS |= used(step.replicas_LRS, step.quotas, self.settings.experts)
                if len(step.moves):
                    commands.append(Fetch(step.moves))
                commands.append(Use(step.replicas_LRS, step.quotas, step.most_L))
                return commands
            case Gated(stage, layer, counts_RE):
                return self._react(stage, layer, counts_RE)
            case Ran(batch, seen_LRE, _):
                over_LRE = seen_LRE - self._counts(batch)
                unforeseen, absent = int(over_LRE.clip(min=0).sum()), int((-over_LRE).clip(min=0).sum())
                return [Tally(unforeseen, absent)] if unforeseen or absent else []
            case Finished():
                ending: list[Command] = []
                self._return_gradients(self.dirty_LRS.copy(), ending)
                self.replicas_LRS = np.full_like(self.replicas_LRS, -1)
                self.counts_MLRE = None
                return [*ending, Release()]
            case _:
                assert_never(event)

    def _react(self, stage: Stage, layer: int, counts_RE: Array) -> list[Command]:
        """Plan one layer of this micro-step from what its gate has just decided."""
        want = (self.settings.ranks, self.settings.experts)
        if counts_RE.shape != want or not 0 <= layer < self.settings.layers:
            raise CallerError(f"layer {layer}, counts {counts_RE.shape}: give a layer of the model, counts {want}.")
        before_LRS = self.replicas_LRS[layer : layer + 1]
        step = plan(counts_RE[None], self.settings.slots, self.homes_E, before_LRS)
        commands: list[Command] = []
        refilled_LRS = np.zeros_like(self.dirty_LRS)
        refilled_LRS[layer] = before_LRS[0] != step.replicas_LRS[0]
        self._return_gradients(self.dirty_LRS & refilled_LRS, commands)
        self.replicas_LRS = self.replicas_LRS.copy()  # the old one may be part of a command
        self.replicas_LRS[layer] = step.replicas_LRS[0]
        if stage == "update":
            self.dirty_LRS[layer] |= used(step.replicas_LRS, step.quotas, self.settings.experts)[0]
        moves, quotas = step.moves.copy(), step.quotas.copy()
        moves[:, 0] = quotas[:, 0] = layer
        if len(moves):
            commands.append(Fetch(moves))
        return [*commands, UseLayer(layer, step.replicas_LRS[0], quotas, int(step.most_L[0]))]

    def _checked(self, counts_MLRE: Array) -> Array:
        want = (self.settings.layers, self.settings.ranks, self.settings.experts)
        if counts_MLRE.ndim != 4 or counts_MLRE.shape[1:] != want:
            raise CallerError(f"counts: shape {counts_MLRE.shape}. Give [micro-batches, *{want}].")
        return counts_MLRE

    def _counts(self, batch: int) -> Array:
        if self.counts_MLRE is None or not 0 <= batch < len(self.counts_MLRE):
            foreseen = 0 if self.counts_MLRE is None else len(self.counts_MLRE)
            raise CallerError(f"micro-batch {batch}: {foreseen} were foreseen. Foresee all before the first.")
        counts_LRE: Array = self.counts_MLRE[batch]
        return counts_LRE

    def _ahead(self, stage: Stage, batch: int) -> Array:
        """Load of the micro-steps after this one, [steps, layers, experts]; after recompute the update begins anew."""
        assert self.counts_MLRE is not None
        order = list(range(batch + 1, len(self.counts_MLRE)))
        if stage == "recompute":
            order += range(len(self.counts_MLRE))
        load_HLE: Array = self.counts_MLRE[order[:HORIZON]].sum(axis=2)
        return load_HLE

    def _return_gradients(self, which_LRS: Mask, commands: list[Command]) -> None:
        layer, rank, slot = np.nonzero(which_LRS)
        if len(layer):
            expert = self.replicas_LRS[layer, rank, slot]
            commands.append(ReturnGradients(np.stack([layer, expert, rank, slot, self.homes_E[expert]], axis=1)))
            self.dirty_LRS[layer, rank, slot] = False


def used(replicas_LRS: Array, quotas: Array, experts: int) -> Mask:
    """Slots whose copy computes tokens under these quotas, and so gathers a gradient."""
    layers, ranks, _ = replicas_LRS.shape
    used_LER = np.zeros((layers, experts, ranks), dtype=np.bool_)
    used_LER[quotas[:, 0], quotas[:, 1], quotas[:, 3]] = True
    layer, rank, slot = np.nonzero(replicas_LRS >= 0)
    used_LRS = np.zeros(replicas_LRS.shape, dtype=np.bool_)
    used_LRS[layer, rank, slot] = used_LER[layer, replicas_LRS[layer, rank, slot], rank]
    return used_LRS
