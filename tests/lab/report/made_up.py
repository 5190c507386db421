"""Makes runs for the report's tests: simulated arms and the journal of an RL step, real journals in milliseconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider.experts import events as ev
from outrider.experts.policy import Settings
from outrider.journal import Journal
from outrider.lab.simulate import arm, profiles
from outrider.lab.traces.workload import Call, Workflow, Workload
from outrider.memory.settings import Settings as MemorySettings

BLOCK = 16


def workload(workflows: int = 4, turns: int = 4, name: str = "flow") -> Workload:
    """Conversations whose every turn begins with all of the turn before."""
    flows = []
    for w in range(workflows):
        calls: list[Call] = []
        for t in range(turns):
            prompt_blocks, output = 10 + 6 * t, 3 + (7 * t + 5 * w) % 40
            prompt = ((1000 * w, prompt_blocks),)
            chain = ((1000 * w, (BLOCK * prompt_blocks + 5 + output) // BLOCK),)
            parents = (calls[-1].id,) if calls else ()
            calls.append(
                Call(
                    f"{name}-{w}.{t}",
                    "reviewer" if t else "planner",
                    f"turn/{t}",
                    parents,
                    1.5,
                    BLOCK * prompt_blocks + 5,
                    output,
                    prompt,
                    chain,
                )
            )
        flows.append(Workflow(f"{name}-{w}", 0.7 * w, tuple(calls)))
    return Workload("outrider", "made up", BLOCK, tuple(flows), ()).check()


def simulate(directory: Path, load: Workload, memory: MemorySettings | None) -> dict[str, Any]:
    fleet = arm.Fleet(profiles.named(profiles.EMBEDDED), 2, 640, 2, "fcfs", "sticky")
    if memory is not None:
        fleet = replace(fleet, policy="srtf", routing="residency", memory=memory)
    directory.mkdir(parents=True, exist_ok=True)
    return arm.play(load, fleet, directory, lambda: None)


def train(directory: Path, experts: int, computed_SLR: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
    """An RL step's journal as the mover writes it: `experts` copies before each micro-step, then its load."""
    directory.mkdir(parents=True, exist_ok=True)
    _, layers, ranks = computed_SLR.shape
    journal = Journal(directory / "experts.0.jsonl", "experts", Settings(layers, 4, ranks))
    for step, computed_LR in enumerate(computed_SLR):
        rows = np.zeros((experts, 8), dtype=np.int64)
        rows[:, 2] = ev.DIRECT
        journal.write(step, ev.Began("recompute", step), [ev.Carry(rows)] if experts else [])
        seen = np.zeros((layers, ranks, 4), dtype=np.int64)
        journal.write(step, ev.Ran(step, seen, computed_LR), [])
    journal.close()
