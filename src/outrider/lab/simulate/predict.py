"""Predicted against actual: a simulated run of a live run's calls beside what the live gateway's journal says came.

The engines must have been calibrated on another run for this to be a prediction; `run.py` says on which.
"""

import statistics
from pathlib import Path
from typing import Any

import msgspec

from outrider import journal
from outrider.agents import events as ev
from outrider.lab.simulate.figures import quantile

JUDGED = ("workflow_completion_mean_s", "ttft_p50_s", "ttft_p95_s", "prompt_tokens_computed", "wall_s")


def actual(path: Path) -> dict[str, float]:
    """The live run's figures under the simulator's names, from its agents.jsonl alone."""
    _, lines = journal.read(path)
    events, commands = msgspec.json.Decoder(ev.Event), msgspec.json.Decoder(list[ev.Command])
    workflow_of: dict[str, str] = {}
    begun_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    ttfts: list[float] = []
    computed = 0
    for line in lines:
        event = events.decode(line.event)
        if isinstance(event, ev.Arrived):
            identity = event.call.identity
            workflow_of[event.call.id] = identity.workflow or event.call.id
            begun_s.setdefault(workflow_of[event.call.id], line.now)
        for command in commands.decode(line.commands):
            if isinstance(command, ev.Settle) and command.usage is not None:
                ended_s[workflow_of[command.call]] = line.now
                ttfts.append(command.ttft_s)
                computed += command.usage.prompt_tokens - command.usage.cached_tokens
    took_s = [ended_s[name] - begun_s[name] for name in ended_s]
    return {
        "workflow_completion_mean_s": statistics.fmean(took_s) if took_s else 0.0,
        "ttft_p50_s": quantile(ttfts, 0.5) or 0.0,
        "ttft_p95_s": quantile(ttfts, 0.95) or 0.0,
        "prompt_tokens_computed": computed,
        "wall_s": max(ended_s.values(), default=0.0) - min(begun_s.values(), default=0.0),
    }


def against(path: Path, simulated: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`predicted`, `actual`, and `error`: predicted over actual, less one; None where nothing was measured."""
    came = actual(path)
    predicted = {name: simulated[name] for name in JUDGED}
    error = {
        name: predicted[name] / came[name] - 1 if came[name] and predicted[name] is not None else None
        for name in JUDGED
    }
    return {"predicted": predicted, "actual": dict(came), "error": error}
