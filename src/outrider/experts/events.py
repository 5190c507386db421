"""The whole interface of experts: what its policy is told, and what it asks for. Pure data.

`now` is the micro-step number of this RL step: 0 .. M-1 recompute, M .. 2M-1 update. Every rank has one policy
object; all of them are told the same events and so reach the same commands (law 7), which the mover checks by digest.

    event      emitted by           when                                             how often
    Foreseen   the training loop    the routing that rollouts recorded is known      once per RL step
    Began      the mover            before the forward pass of a micro-step          every micro-step
    Gated      the mover            live counts of a layer are known: no foresight   every layer and micro-step
    Ran        the mover            after it (backward included), gathered           every micro-step foreseen
    Finished   the mover            all backwards are done, before optimizer.step    once per RL step

    command          carried out by the mover                                        answers
    ReturnGradients  gradients of these replicas go home, their slots' are zeroed    Began, Gated, Finished
    Fetch            expert weights go from a holder into a spare slot               Began, Gated
    Use              this placement and token split from now on                      Began
    UseLayer         the same, for one layer                                         Gated
    Tally            what was seen differs from what was planned: add it up          Ran
    Release          every replica is void: the optimizer will change the weights    Finished

Legend of array suffixes: M micro-steps, L MoE layers, R ranks, E experts, S spare slots of a rank. All int64.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
else:
    Array = np.ndarray  # what msgspec hands to the journal's hook

Stage = Literal["recompute", "update"]


class Foreseen(msgspec.Struct, frozen=True, tag=True, eq=False):
    """counts_MLRE: token-slots (one token, one chosen expert) of each micro-batch, layer, source rank and expert."""

    counts_MLRE: Array


class Began(msgspec.Struct, frozen=True, tag=True):
    """Micro-batch `batch` (a row of the foreseen table) is about to run; `stage` update has a backward pass."""

    stage: Stage
    batch: int


class Gated(msgspec.Struct, frozen=True, tag=True, eq=False):
    """The live gate of a layer sent counts_RE token-slots of each source to each expert; nobody foresaw them."""

    stage: Stage
    layer: int
    counts_RE: Array


class Ran(msgspec.Struct, frozen=True, tag=True, eq=False):
    """The micro-batch ran: seen_LRE token-slots by source and expert, computed_LR token-slots by computing rank."""

    batch: int
    seen_LRE: Array
    computed_LR: Array


class Finished(msgspec.Struct, frozen=True, tag=True):
    """Every backward pass of the RL step is done."""


class ReturnGradients(msgspec.Struct, frozen=True, tag=True, eq=False):
    """rows [n, 5]: layer, expert, rank of the replica, its slot, home rank; sorted by (layer, rank, slot)."""

    rows: Array


class Fetch(msgspec.Struct, frozen=True, tag=True, eq=False):
    """rows [n, 5]: layer, expert, src rank, dst rank, dst slot; sorted by (layer, dst, slot)."""

    rows: Array


class Use(msgspec.Struct, frozen=True, tag=True, eq=False):
    """replicas_LRS: expert or -1. quotas [n, 5]: layer, expert, source, rank, tokens. most_L: planned largest load."""

    replicas_LRS: Array
    quotas: Array
    most_L: Array


class UseLayer(msgspec.Struct, frozen=True, tag=True, eq=False):
    """replicas_RS: expert or -1. quotas as in Use, of this layer alone. most: planned largest load."""

    layer: int
    replicas_RS: Array
    quotas: Array
    most: int


class Tally(msgspec.Struct, frozen=True, tag=True):
    """Token-slots that nobody foresaw (computed at home), and token-slots foreseen that never came."""

    unforeseen: int
    absent: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """All replica slots are empty from now on."""


Event = Foreseen | Began | Gated | Ran | Finished
Command = ReturnGradients | Fetch | Use | UseLayer | Tally | Release
