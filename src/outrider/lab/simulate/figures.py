"""What a simulated run cost, under the names of the demo's JSON where they mean the same. Pure."""

import statistics
from collections.abc import Mapping
from typing import Any

from outrider.lab.simulate.callers import Record
from outrider.lab.traces.workload import Workload
from outrider.lab.twins.agents import AgentsTwin
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.links import Lane
from outrider.lab.twins.memory import MemoryTwin


def figures(
    record: Record,
    workload: Workload,
    gateway: AgentsTwin,
    engines: Mapping[str, Engine],
    memory: MemoryTwin | None,
    busy_s: Mapping[Lane, float],
    wall_s: float,
) -> dict[str, Any]:
    """Seconds are simulated; `wall_s` from the first workflow's start to the last answer.

    busy_s  every link, and how long it was in use by then; the bytes are those of the whole simulation, which ends when
            memory has nothing left to move
    """
    answers = record.answers
    ttfts = [answer.ttft_s for answer in answers]
    returning = [answer.ttft_s for answer in answers if answer.returning]
    prompt = sum(answer.call.prompt_tokens for answer in answers)
    sources: dict[str, int] = {"computed": prompt}
    for answer in answers:
        for place, tokens in answer.reused.items():
            sources[place] = sources.get(place, 0) + tokens
            sources["computed"] -= tokens
    stats = gateway.policy.stats()
    completions = list(record.completions_s.values())
    reused = prompt - sources["computed"]
    return {
        "calls": sum(len(workflow.calls) for workflow in workload.workflows),
        "answered": len(answers),
        "sends": record.sends,
        "refused": dict(sorted(record.refused.items())),
        "workflows": len(completions),
        "workflows_abandoned": record.abandoned,
        "prompt_tokens": prompt,
        "output_tokens": sum(answer.call.output_tokens for answer in answers),
        "prompt_tokens_computed": sources["computed"],
        "prompt_tokens_reused": reused,
        "prompt_tokens_from_memory": reused - sources.get("engine", 0),
        "prompt_tokens_from": dict(sorted(sources.items())),
        "returning": len(returning),
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p95_s": quantile(ttfts, 0.95),
        "returning_ttft_p50_s": quantile(returning, 0.5),
        "returning_ttft_p95_s": quantile(returning, 0.95),
        "workflow_completion_mean_s": statistics.fmean(completions) if completions else None,
        "workflow_completion_p95_s": quantile(completions, 0.95),
        "workflows_late": record.late,
        "wall_s": wall_s,
        "arrivals": gateway.arrived,
        "unended": gateway.arrived - gateway.ended,
        "preemptions": sum(engine.preemptions for engine in engines.values()),
        "failed_attempts": stats["failed_attempts"],
        "queued_mean_s": stats["queued_mean_s"],
        "queued_max_s": stats["queued_max_s"],
        "kv": {
            "reserved_tokens": stats["reserved_tokens"],
            "reserved_by_max_tokens": stats["max_tokens_reserved"],
            "used_tokens": stats["used_tokens"],
        },
        "engines": {name: _engine(engine, wall_s) for name, engine in engines.items()},
        "links": {"->".join(lane.way): _lane(lane, used_s, wall_s) for lane, used_s in busy_s.items()},
        "bytes_moved": dict(memory.policy.tally.moved_bytes) if memory else {},
        "memory": memory.policy.stats() if memory else {},
    }


def _engine(engine: Engine, wall_s: float) -> dict[str, float]:
    return {
        "busy_share": engine.busy_s / wall_s if wall_s else 0.0,
        "steps": engine.steps,
        "tokens_computed": engine.computed_tokens,
        "preemptions": engine.preemptions,
    }


def _lane(lane: Lane, used_s: float, wall_s: float) -> dict[str, float]:
    return {
        "moved_bytes": lane.moved_bytes,
        "bytes_per_s": lane.link.bandwidth,
        "busy_share": used_s / wall_s / lane.link.slots if wall_s else 0.0,
    }


def quantile(values: list[float], share: float) -> float | None:
    """Nearest-rank quantile, as the demo's; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
