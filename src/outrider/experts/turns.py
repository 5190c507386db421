"""Whose turn it is: which transfers may start, and which a layer must wait for. Pure; kept by move.py, a rank each.

A pass is a run of visits (events.py). A transfer starts when the visit `after` which it may is over, and a visit waits
for all that must have ended `by` it. Both are numbers of the plan, so that ranks that run at different speeds start
the same transfers in the same order.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from outrider.errors import CallerError
from outrider.experts.events import Stage
from outrider.experts.frames import Copy


class Batch(msgspec.Struct, frozen=True):
    """One exchange: rows of a Carry with one (after, by, kind), and this rank's copies that it fills, in order."""

    after: int
    by: int
    kind: int
    rows: Sequence[Sequence[int]]  # layer, expert, src, dst, frame
    copies: Sequence[Copy]


class Turns:
    """Visits of one step after another, for a model of so many MoE layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._pending: deque[Batch] = deque()
        self._due: list[tuple[int, int]] = []  # (by, ticket) of what has started
        self._over = -1  # visits up to this one are over
        self._pass: tuple[Stage, int] | None = None  # under way, and its first visit
        self._several = False
        self.stage: Stage | None = None  # of the pass under way, planned ahead or not

    def begin(self) -> None:
        """A new step."""
        assert not self._pending
        self._due, self._over, self._pass = [], -1, None

    def begin_pass(self, stage: Stage, first: int, expected: bool = True, several: bool = False) -> None:
        """A pass begins with visit `first`.

        expected  it is the one that was fetched ahead for; else what is under way has come for other turns, and its
                  first layer waits for all of it
        several   the model runs more than once inside, so that no visit is over before the pass is
        """
        self._pass, self._over, self._several = (stage, first), max(self._over, first - 1), several
        self.stage = stage
        if not expected:
            self._due = [(first, ticket) for _, ticket in self._due]

    def end_pass(self) -> None:
        """All visits of the pass are over, whether or not they took place."""
        assert self._pass is not None
        stage, first = self._pass
        self._over, self._pass = first + self.layers * (2 if stage == "update" else 1) - 1, None
        self.stage = None

    def queue(self, batch: Batch) -> None:
        self._pending.append(batch)

    def ready(self, everything: bool = False) -> Iterator[Batch]:
        """What may start by now, in order; everything: what waits for visits that will not come, too."""
        while self._pending and (everything or self._pending[0].after <= self._over):
            yield self._pending.popleft()

    def started(self, batch: Batch, ticket: int) -> None:
        self._due.append((batch.by, ticket))

    def enter(self, layer: int, backward: bool) -> int:
        """A layer's turn: the ticket to wait for, 0 for none. CallerError where it is out of turn."""
        if (self.stage in ("recompute", "forward") and backward) or (self.stage == "backward" and not backward):
            way = "backward" if backward else "forward"
            raise CallerError(
                f"layer {layer} runs {way} inside a {self.stage} pass, which has no {way}. Run both inside"
                " run.micro_step(m), or forward inside run.forward(m) and backward inside run.backward(m)."
            )
        if self._pass is None:
            return 0
        visit = self._visit(layer, backward)
        if visit <= self._over and not self._several:
            raise CallerError(
                f"layer {layer} ran twice in one pass: what it needs may be gone. Run the model once inside"
                " micro_step, or say several=True."
            )
        late = [batch for batch in self._pending if batch.by <= visit]
        if late:
            raise CallerError(
                f"layer {layer} runs before its turn: its copies come only after visit {late[-1].after}, this is"
                f" {visit}. Run layers in the order in which they stand, checkpoint them one by one, or set ring to 0."
            )
        ticket = max((ticket for by, ticket in self._due if by <= visit), default=0)
        self._due = [due for due in self._due if due[0] > visit]
        return ticket

    def leave(self, layer: int, backward: bool) -> None:
        """The turn is over."""
        if self._pass is not None and not self._several:
            self._over = max(self._over, self._visit(layer, backward))

    def _visit(self, layer: int, backward: bool) -> int:
        assert self._pass is not None
        stage, first = self._pass
        return first + self.layers * (2 if stage == "update" else 1) - 1 - layer if backward else first + layer
