"""Predicted against actual: a simulated run of a live run's calls beside what the live gateway's journal says came.

That is a prediction only where both had the same policy, sizes and kind of memory, and the engines were calibrated on
another run: `differs` says in what they do not agree, `run.py` what follows from it.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider import journal
from outrider.agents import events as ev
from outrider.agents.settings import GatewaySettings
from outrider.lab.simulate import calibrate
from outrider.lab.simulate.arm import Fleet
from outrider.lab.simulate.figures import quantile

JUDGED = ("workflow_completion_mean_s", "ttft_p50_s", "ttft_p95_s", "prompt_tokens_computed", "wall_s")


@dataclass(frozen=True, slots=True)
class Live:
    """What a live run had, from its agents.jsonl. kv_tokens of each engine, 0 where they did not say."""

    policy: str
    routing: str
    engines: int
    kv_tokens: int
    credit: int
    memory: str  # attached or none


def actual(path: Path) -> dict[str, float]:
    """The live run's figures under the simulator's names, from its agents.jsonl alone."""
    workflow_of: dict[str, str] = {}
    begun_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    ttfts: list[float] = []
    computed = 0
    for now, event, commands in journal.told(path, ev.Event, ev.Command):
        if isinstance(event, ev.Arrived):
            identity = event.call.identity
            workflow_of[event.call.id] = identity.workflow or event.call.id
            begun_s.setdefault(workflow_of[event.call.id], now)
        for command in commands:
            if isinstance(command, ev.Settle) and command.usage is not None:
                ended_s[workflow_of[command.call]] = now
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


def live(path: Path) -> Live:
    """What the run had whose agents.jsonl this is. CallerError where it is none, or of another version."""
    settings = journal.settings(path, GatewaySettings)
    _, kv_tokens = calibrate.observe(path)
    return Live(
        settings.policy,
        settings.routing,
        len(settings.engines),
        kv_tokens,
        settings.credit,
        "attached" if settings.memory_attached else "none",
    )


def differs(live: Live, fleet: Fleet) -> list[str]:
    """In what a simulated arm is not the live run: nothing, where its figures foretell that run's."""
    ours = Live(
        fleet.policy,
        fleet.routing,
        fleet.engines,
        fleet.kv_tokens if live.kv_tokens else 0,
        fleet.credit,
        "none" if fleet.memory is None else "attached",
    )
    return [
        f"{name} {getattr(ours, name)} (live: {getattr(live, name)})"
        for name in Live.__slots__
        if getattr(ours, name) != getattr(live, name)
    ]


def against(path: Path, simulated: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`predicted`, `actual`, and `error`: predicted over actual, less one; None where nothing was measured."""
    came = actual(path)
    predicted = {name: simulated[name] for name in JUDGED}
    error = {
        name: predicted[name] / came[name] - 1 if came[name] and predicted[name] is not None else None
        for name in JUDGED
    }
    return {"predicted": predicted, "actual": dict(came), "error": error}
