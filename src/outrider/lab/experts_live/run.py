"""Starts a live run's ranks and sums up what they saw. Called by bench/experts_live.py and by tests."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from outrider.errors import WorldError
from outrider.lab.experts_live.rank import ARMS, Seen, Step, in_line
from outrider.lab.experts_live.routes import Case
from outrider.lab.experts_live.timeline import Panel
from outrider.lab.processes import Children


def run(case: Case, ranks: int, directory: Path, within_s: float = 400.0) -> list[Seen]:
    """A process a rank; what each saw. WorldError if one ends badly or time is up. `directory` gets logs and files."""
    (directory / "case.json").write_bytes(msgspec.json.encode(case))
    rank_of = [sys.executable, "-m", "outrider.lab.experts_live.rank", str(directory)]
    with Children(directory) as children:
        started = [children.start(f"rank{rank}", [*rank_of, str(rank), str(ranks)]) for rank in range(ranks)]
        by_s = time.monotonic() + within_s
        while any(child.running for child in started) and not any(child.process.poll() for child in started):
            if time.monotonic() > by_s:
                raise WorldError(f"live run: not over within {within_s:.0f} s; rank 0 said: {started[0].last_words()}")
            time.sleep(0.05)
        for child in started:
            if child.process.poll():
                raise WorldError(f"live run: {child.name} failed: {child.last_words(12)}")
    return [msgspec.json.decode((directory / f"rank{r}.json").read_bytes(), type=Seen) for r in range(ranks)]


def steps_of(seen: list[Seen], arm: str, quiet: float) -> list[list[Step]]:
    """An arm's steps, each as all ranks saw it: the quiet ones, or all where there are none."""
    mine = [list(step) for step in zip(*(one.steps for one in seen), strict=True) if step[0].arm == arm]
    return [step for step in mine if in_line(step) <= quiet] or mine


def summed(seen: list[Seen], case: Case) -> dict[str, Any]:
    """By arm: medians over its steps of the slowest rank's seconds, and of what a rank carried and waited for."""
    table = {arm: _row(seen, arm, steps_of(seen, arm, case.quiet)) for arm in ARMS}
    static, even = table["static"]["seconds"], table["even gate"]["seconds"]
    for row in table.values():
        row["times_static"], row["share_of_even"] = round(static / row["seconds"], 3), round(even / row["seconds"], 3)
    return table


def _row(seen: list[Seen], arm: str, steps: list[list[Step]]) -> dict[str, Any]:
    load, first = np.array(seen[0].loads[arm]), steps[0]
    every = [one.figures for step in steps for one in step]
    carried_s, exposed_s = (median(one[i] for one in map(msgspec.structs.astuple, every)) for i in (1, 2))
    return {
        "seconds": round(median(map(seconds_of, steps)), 4),
        "seconds_of_steps": [round(seconds_of(step), 3) for step in steps],
        "in_line_share": round(max(map(in_line, steps)), 3),
        "largest_over_mean_load": round(float(load.max(axis=2).sum() / load.mean(axis=2).sum()), 4),
        "experts_s_of_ranks": [
            round(median(step[r].figures.computed_s for step in steps), 4) for r in range(len(seen))
        ],
        "lane_s": round(carried_s, 4),
        "exposed_s": round(exposed_s, 4),
        "under_experts_s": round(median(one.under_s for one in every), 4),
        "hidden_share": round(1 - exposed_s / carried_s, 3) if first[0].copies else None,
        "copies": first[0].copies,
        "fetched_bytes": first[0].copies * seen[0].expert_bytes,
        "sent_bytes": sum(one.sent_bytes for one in first),
        "losses": seen[0].losses[arm],
        "gradients_apart": max(one.apart[arm] for one in seen),
    }


def seconds_of(step: list[Step]) -> float:
    """Until the slowest rank was done."""
    return max(one.seconds for one in step)


def panels(seen: list[Seen], case: Case, arms: Sequence[str]) -> list[Panel]:
    """Of each arm the step in the middle of its steps by time."""
    found = []
    for arm in arms:
        steps = sorted(steps_of(seen, arm, case.quiet), key=seconds_of)
        middle = steps[len(steps) // 2]
        found.append(Panel(arm, f"{seconds_of(middle):.2f} s", [one.spans for one in middle]))
    return found
