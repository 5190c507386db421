"""The whole interface of experts: what its policy is told, and what it asks for. Pure data.

`now` is the pass number of this RL step. Every rank has one policy object; all of them are told the same events and so
reach the same commands (law 7), which the mover checks by digest. When a transfer ended is no event: ranks would hear
of it at different times. What is decided follows from the plan and the order of passes alone.

    pass        what runs                                         its visits, L layers: in this order
    recompute   forward of one micro-batch, nothing is kept       0 .. L-1
    update      forward and backward of one micro-batch           0 .. L-1, L-1 .. 0
    forward     the first half of an update (1F1B)                0 .. L-1
    backward    the second half, any number of passes later       L-1 .. 0

    event      emitted by           when                                             how often
    Foreseen   the training loop    the routing that rollouts recorded is known      once per RL step, or Planned
    Planned    the training loop    a plan of the whole step is given                once per RL step, or Foreseen
    Began      the mover            before a pass                                    every pass
    Gated      the mover            live counts of a layer are known: no foresight   every layer and micro-step
    Ran        the mover            after a forward pass, gathered                   every micro-step foreseen
    Finished   the mover            all backwards are done, before optimizer.step    once per RL step

    command    carried out by the mover                                              answers
    Relocate   masters, with their optimizer state, change their homes               Planned
    Share      homes put experts into shared host memory, to be pulled from there    Began
    Carry      transfers: which may start after which visit, and must be there by    Began, Gated, Finished
    Use        this token split from now on                                          Began
    UseLayer   the same, for one layer                                               Gated
    Tally      what was seen differs from what was planned: add it up                Ran
    Release    every copy is void: the optimizer will change the weights             Finished

Legend of array suffixes: M micro-steps, L MoE layers, R ranks, E experts, F frames (places for copies) of a rank.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
else:
    Array = np.ndarray  # what msgspec hands to the journal's hook

Stage = Literal["recompute", "update", "forward", "backward"]
Pass = tuple[Stage, int]  # what runs, and which micro-batch

# Kinds of a Carry row. A cancelled copy still arrives, since what is sent cannot be un-sent; wanted again, it is used.
RETURN, DIRECT, HOST, CANCEL, WANT = range(5)
ROW = ("after", "by", "kind", "layer", "expert", "src", "dst", "frame")
END = 1 << 40  # `by` of what no visit waits for: the end of the step is soon enough


class Foreseen(msgspec.Struct, frozen=True, tag=True, eq=False):
    """counts_MLRE: token-slots (one token, one chosen expert) of each micro-batch, layer, source rank and expert.

    passes: the order in which they will run; empty: recompute of all, then update of all, or updates alone.
    """

    counts_MLRE: Array
    passes: tuple[Pass, ...] = ()


class Planned(msgspec.Struct, frozen=True, tag=True, eq=False):
    """homes_LE; quota [n, 6]: layer, micro-step, source, expert, rank, tokens; most_LM: as in a StepPlan."""

    homes_LE: Array
    quota: Array
    most_LM: Array
    passes: tuple[Pass, ...] = ()


class Began(msgspec.Struct, frozen=True, tag=True):
    """A pass over micro-batch `batch` (a row of the foreseen table) is about to run."""

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


class Relocate(msgspec.Struct, frozen=True, tag=True, eq=False):
    """rows [n, 4]: layer, expert, old home, new home; sorted. homes_LE: where all experts live from now on."""

    rows: Array
    homes_LE: Array


class Share(msgspec.Struct, frozen=True, tag=True, eq=False):
    """rows [n, 5]: layer, expert, home, node whose shared memory takes it, rank of that node that writes it there.

    Sorted by (node, layer, expert).
    """

    rows: Array


class Carry(msgspec.Struct, frozen=True, tag=True, eq=False):
    """rows [n, 8], see ROW: what may start once visit `after` is over and must have ended before visit `by` begins.

    DIRECT and HOST: weights from home `src`, over the ranks' links or out of shared memory, into `frame` of `dst`.
    RETURN: the gradient in `frame` of `src` goes to home `dst`. CANCEL: what is under way to `frame` of `dst` is not
    wanted any more; WANT: it is again. Rows with one (after, by, kind) are one exchange; sorted by all columns.
    """

    rows: Array

    @property
    def fetches(self) -> int:
        """Copies that it fetches."""
        return int(np.isin(self.rows[:, 2], (DIRECT, HOST)).sum())


class Use(msgspec.Struct, frozen=True, tag=True, eq=False):
    """quotas [n, 5], int32: layer, expert, source, rank, tokens. most_L: planned largest load.

    visit     the pass's first
    expected  it is the pass that was fetched ahead for; else what is under way may have come for another turn
    """

    visit: int
    expected: bool
    quotas: Array
    most_L: Array


class UseLayer(msgspec.Struct, frozen=True, tag=True, eq=False):
    """quotas as in Use, of this layer alone. most: planned largest load."""

    layer: int
    quotas: Array
    most: int


class Tally(msgspec.Struct, frozen=True, tag=True):
    """Token-slots that nobody foresaw (computed at home), and token-slots foreseen that never came."""

    unforeseen: int
    absent: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """All frames are empty from now on."""


Event = Foreseen | Planned | Began | Gated | Ran | Finished
Command = Relocate | Share | Carry | Use | UseLayer | Tally | Release
