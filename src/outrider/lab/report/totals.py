"""Numbers that the page shows beside those of the `--json` file, from the journals alone. Pure. Called by `page.py`.

They stand in the page under `read`, so that whoever doubts a picture finds its numbers; where both have one, tests
compare them.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.lab.report.calls import Calls, Story, waiting
from outrider.lab.report.loads import Loads
from outrider.lab.report.run import Journals
from outrider.lab.report.tiers import Memory

COMPUTED, ENGINE = "computed", "engine"


def totals(journals: Journals) -> dict[str, Any]:
    """By arm, and for the experts: plain numbers, ready for JSON."""
    return {
        "arms": [{"name": name} | _arm(calls, journals.memory.get(name)) for name, calls in journals.calls.items()],
        "experts": {"before": _loads(journals.before), "after": _loads(journals.after)},
    }


def _arm(calls: Calls, memory: Memory | None) -> dict[str, Any]:
    stories = list(calls.stories.values())
    known = [story for story in stories if story.usage is not None]
    hits = memory.hit_blocks if memory else dict[str, int]()
    by_role: dict[str, list[Story]] = {}
    for story in known:
        by_role.setdefault(story.role or "(no role)", []).append(story)
    return {
        "calls": len(stories),
        "answered": sum(story.end == "Settle" for story in stories),
        "retries": sum(max(0, len(story.attempts) - 1) for story in stories),
        "workflows": len(calls.by_workflow()),
        "span_s": calls.ended_s - calls.began_s,
        "queue_peak": max((level for _, level in waiting(calls)), default=0),
        "queued_mean_s": statistics.fmean(story.queued_s for story in stories) if stories else 0.0,
        "wants": len(calls.wants),
        "prompt_tokens": sum(story.usage.prompt_tokens for story in known if story.usage),
        "tokens": by_source(known, hits),
        "output": _output(known),
        "roles": [
            {"role": role, "calls": len(group), "tokens": by_source(group, {"memory": 1}), "output": _output(group)}
            for role, group in sorted(by_role.items())
        ],
        "tiers": _tiers(memory) if memory else {},
        "moved_bytes": memory.moved_bytes if memory else {},
    }


def by_source(stories: Sequence[Story], hit_blocks: Mapping[str, int]) -> dict[str, int]:
    """Prompt tokens by where they came from; they sum up to all prompt tokens.

    hit_blocks  leased blocks by the tier in which each lay when it was asked for: what memory gave is split so
    """
    usages = [story.usage for story in stories if story.usage is not None]
    prompt = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return prompt_tokens_from(prompt, cached, sum(usage.external_tokens for usage in usages), hit_blocks)


def prompt_tokens_from(prompt: int, cached: int, external: int, hit_blocks: Mapping[str, int]) -> dict[str, int]:
    """`prompt` tokens, of which `cached` were reused, of which `external` came from memory, by source."""
    sources = {COMPUTED: prompt - cached, ENGINE: cached - external}
    if external or hit_blocks:
        sources |= shared_out(external, hit_blocks or {"memory": 1})
    return sources


def shared_out(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """`total` in whole parts by weight, summing up exactly: what is left over goes to the largest rests."""
    weight = sum(weights.values())
    if not weight:
        return {name: total if name == next(iter(weights)) else 0 for name in weights}
    parts = {name: total * share // weight for name, share in weights.items()}
    by_rest = sorted(weights, key=lambda name: -(total * weights[name] % weight))
    for name in by_rest[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _output(stories: Sequence[Story]) -> dict[str, float]:
    """Output tokens foreseen at the last dispatch against those that came."""
    pairs = [
        (story.dispatch.predicted_tokens, story.dispatch.bound_tokens, story.usage.output_tokens)
        for story in stories
        if story.dispatch and story.usage
    ]
    if not pairs:
        return {"calls": 0}
    return {
        "calls": len(pairs),
        "predicted_tokens": sum(predicted for predicted, _, _ in pairs),
        "used_tokens": sum(used for _, _, used in pairs),
        "mean_error_tokens": statistics.fmean(abs(predicted - used) for predicted, _, used in pairs),
        "covered": sum(used <= bound for _, bound, used in pairs) / len(pairs),
    }


def _tiers(memory: Memory) -> dict[str, dict[str, int]]:
    return {
        place: {
            "capacity_bytes": capacity_bytes,
            "peak_bytes": max((level.used_bytes[place] for level in memory.levels), default=0),
            "end_bytes": memory.levels[-1].used_bytes[place] if memory.levels else 0,
            "hit_blocks": memory.hit_blocks.get(place, 0),
        }
        for place, capacity_bytes in memory.capacity_bytes.items()
    }


def _loads(loads: Loads | None) -> dict[str, Any] | None:
    if loads is None:
        return None
    ratio_SL = loads.over_mean_SLR.max(axis=2)
    return {
        "micro_steps": len(ratio_SL),
        "layers": ratio_SL.shape[1],
        "ranks": loads.computed_SLR.shape[2],
        "token_slots": int(loads.computed_SLR.sum()),
        "max_over_mean": float(ratio_SL.mean()),
        "worst": float(ratio_SL.max()),
        "copies": sum(loads.copies),
    }
