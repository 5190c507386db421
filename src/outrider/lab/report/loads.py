"""Reads one rank's journal of an RL step: the load that every rank really computed, micro-step by micro-step.

Every rank's journal holds the load of all, since they agreed on it. Pure but for reading files. Called by `run.py`.

Legend of array suffixes: S micro-steps of the journal, in order; L MoE layers; R ranks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider import journal
from outrider.experts import events as ev

Array = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Loads:
    """computed_SLR token-slots; stages[s] is recompute or update; copies[s] experts fetched before micro-step s."""

    computed_SLR: Array
    stages: tuple[str, ...]
    copies: tuple[int, ...]

    @property
    def over_mean_SLR(self) -> Floats:
        """Each rank's load over the mean rank load: 1 is perfect balance; all 0 where nothing was computed."""
        load = self.computed_SLR
        ratio: Floats = load / np.maximum(load.mean(axis=2, keepdims=True), 1.0 / load.shape[2])
        return ratio


def read(path: Path) -> Loads | None:
    """All of experts.RANK.jsonl; None where no micro-step ran. CallerError where it is no such journal."""
    computed: list[Array] = []
    stages: list[str] = []
    copies: list[int] = []
    for _, event, commands in journal.told(path, ev.Event, ev.Command):
        match event:
            case ev.Began(stage) if stage != "backward":
                stages.append(stage)
                copies.append(sum(command.fetches for command in commands if isinstance(command, ev.Carry)))
            case ev.Ran(computed_LR=computed_LR):
                computed.append(computed_LR)
            case _:
                pass
    if not computed:
        return None
    whole = len(computed)  # the last micro-step that began may not have run
    return Loads(np.stack(computed), tuple(stages[:whole]), tuple(copies[:whole]))
