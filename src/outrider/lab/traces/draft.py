"""What a reader hands over, and how workflows get their starts. Pure: chance comes from the seed.

the trace has starts    they are kept; a rate stretches them to that mean, in the same order and proportions
it has none             a Poisson process of that rate, drawn from the seed; the first workflow starts at 0
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from outrider.lab.traces.workload import Workflow

PER_SECOND = 1 / 60  # workflows, where a trace has no starts and the caller names no rate


@dataclass(frozen=True)
class Draft:
    """A trace as read. Where `timed`, start_s counts from any origin; else it means nothing yet."""

    block_tokens: int
    workflows: Sequence[Workflow]
    timed: bool
    notes: tuple[str, ...]


def started(draft: Draft, seed: int, rate: float | None, limit: int | None) -> tuple[tuple[Workflow, ...], str]:
    """The first `limit` workflows by start, the first at 0, and a note on where the starts come from.

    rate   workflows per second; None keeps the trace's own starts, or PER_SECOND where it has none
    Ties keep the file's order. The first n workflows are the same whatever the limit.
    """
    if not draft.timed:
        per_second = PER_SECOND if rate is None else rate
        draws, start_s, drawn = random.Random(seed), 0.0, list[Workflow]()
        for workflow in draft.workflows[:limit]:
            drawn.append(replace(workflow, start_s=start_s))
            start_s += draws.expovariate(per_second)
        return tuple(drawn), (
            f"the trace has no arrival times: workflows start as a Poisson process of {per_second:.6g} a second, "
            f"drawn with seed {seed}"
        )
    ordered = sorted(draft.workflows, key=lambda workflow: workflow.start_s)
    first_s, last_s = ordered[0].start_s, ordered[-1].start_s
    factor, note = 1.0, "workflows start as the trace says"
    if rate is not None and last_s > first_s:
        factor = (len(ordered) - 1) / (last_s - first_s) / rate
        note = f"workflows start as the trace says, its gaps multiplied by {factor:.6g} to {rate:.6g} a second"
    elif rate is not None:
        note = "all workflows start at the same moment, as the trace says: no rate can be reached by stretching"
    return tuple(replace(workflow, start_s=(workflow.start_s - first_s) * factor) for workflow in ordered[:limit]), note
