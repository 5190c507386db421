"""The order of a step's passes: as told, or the plain one, recompute before update. Pure; used by policy.py."""

from collections.abc import Sequence
from typing import get_args

from outrider.errors import CallerError
from outrider.experts.events import Pass, Stage


class Order:
    """told: passes as the training loop names them, () where it does not; batches: micro-batches of the step.

    CallerError for what is no pass, and for a backward half without its forward half before it.
    """

    def __init__(self, told: Sequence[Pass], batches: int) -> None:
        for at, one in enumerate(told):
            if len(one) != 2 or one[0] not in get_args(Stage):
                raise CallerError(f"passes: {one!r} is none. Give pairs such as ('update', 0), see events.py.")
            if one[0] == "backward" and ("forward", one[1]) not in told[:at]:
                raise CallerError(
                    f"passes: backward of micro-batch {one[1]} has no forward before it. Give them in order."
                )
        self._plain: list[Pass] = [(stage, m) for stage in ("recompute", "update") for m in range(batches)]
        self.passes = list(told) or self._plain
        self._begun = 0

    def begin(self, this: Pass) -> tuple[int, list[Pass]]:
        """A pass begins, in order or not: its number in `passes`, -1 if it is none of them; it, and what comes next."""
        in_order = self._begun < len(self.passes) and self.passes[self._begun] == this
        number = self._begun if in_order else self.passes.index(this) if this in self.passes else -1
        self._begun += 1
        known = self.passes if number >= 0 else self._plain
        at = number if number >= 0 else self._plain.index(this) if this in self._plain else len(self._plain)
        return number, [this, *known[at + 1 : at + 2]]
