"""Thin pictures over time below the timeline and of the tiers: a level, or what moved in each moment. Pure.

Called by `page.py`. Levels come from the journals; each strip says what its full height means.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider.lab.report import calls as read
from outrider.lab.report.calls import Calls
from outrider.lab.report.draw import Level, Scale, binned, steps_path, thinned
from outrider.lab.report.tiers import Memory

BINS = 120  # of a strip of moved bytes


@dataclass(frozen=True)
class Strip:
    """`areas`: (css class, svg path) in a box of 100 x 100, drawn in order. `top`: what the full height means."""

    title: str
    top: str
    areas: list[tuple[str, str]]
    ends_at: float  # percent of the width: there the run is over


def level(title: str, css: str, levels: Sequence[Level], ends_s: float, x: Scale, top: float, says: str) -> Strip:
    """One level over time, as an area under a staircase."""
    path = steps_path(thinned(levels, x.top), x, Scale(max(top, 1e-9)), ends_s)
    return Strip(title, says, [(css, path)], x(ends_s))


def since(levels: Sequence[tuple[float, float]], zero_s: float) -> list[Level]:
    return [(moment - zero_s, value) for moment, value in levels]


def in_line(calls: Calls, x: Scale, top: int) -> Strip:
    """Calls that wait in the gateway's line."""
    levels, ends_s = since(read.waiting(calls), calls.began_s), calls.ended_s - calls.began_s
    return level("waiting in the gateway's line", "queue", levels, ends_s, x, top, f"{top:,} calls")


def at_engines(calls: Calls, x: Scale, top: int) -> Strip:
    """Calls in flight, the engines stacked: the last one at the back, so that each shows its own share."""
    ends_s = calls.ended_s - calls.began_s
    y = Scale(max(top, 1))
    areas = []
    for count in range(len(calls.engines), 0, -1):
        levels = since(in_flight(calls, calls.engines[:count]), calls.began_s)
        areas.append((f"engine engine-{(count - 1) % 2}", steps_path(thinned(levels, x.top), x, y, ends_s)))
    names = "the engine" if len(calls.engines) == 1 else f"{len(calls.engines)} engines, stacked"
    return Strip(f"calls at {names}", f"{top:,} calls", areas, x(ends_s))


def in_flight(calls: Calls, engines: Sequence[str]) -> list[tuple[float, int]]:
    """Calls in flight at these engines together."""
    changes: list[tuple[float, int]] = []
    for engine in engines:
        before = 0
        for moment, now in read.running(calls, engine):
            changes.append((moment, now - before))
            before = now
    return read.steps(changes)


def kv_in_use(calls: Calls, x: Scale) -> Strip | None:
    """KV tokens held in all engines together, as they said when they were probed; None where none said any."""
    said: dict[str, float] = {}
    levels: list[Level] = []
    for probe in calls.probes:
        said[probe.engine] = probe.kv_used
        levels.append((probe.now - calls.began_s, sum(said.values())))
    capacity_tokens = float(sum(calls.kv_tokens.values()))
    if not capacity_tokens or not any(value for _, value in levels):
        return None
    ends_s = calls.ended_s - calls.began_s
    top = f"{capacity_tokens:,.0f} tokens"
    return level("KV cache in use, all engines", "kv", levels, ends_s, x, capacity_tokens, top)


def held(memory: Memory, place: str, zero_s: float, ends_s: float, x: Scale, size: Callable[[float], str]) -> Strip:
    """Bytes in use of one tier. The full height is its capacity, or less where hardly any of it was used."""
    levels = [(one.now - zero_s, float(one.used_bytes[place])) for one in memory.levels]
    capacity = memory.capacity_bytes[place]
    peak = max((value for _, value in levels), default=0.0)
    top, says = (capacity, size(capacity)) if peak > capacity / 4 else (max(peak, 1.0), f"{size(peak)}, its peak")
    title = "cache of the hybrid device" if place == "cache" else place
    return level(title, f"tier tier-{place}", levels, ends_s, x, top, says)


def moved(memory: Memory, way: str, zero_s: float, ends_s: float, x: Scale, size: Callable[[float], str]) -> Strip:
    """Bytes that went one way, slice by slice of the run; what moved after its end is told, not drawn."""
    levels = since(memory.moved[way], zero_s)
    inside = [one for one in levels if one[0] <= ends_s]
    gained = binned(inside, ends_s, BINS) if ends_s > 0 else [0.0] * BINS
    top = max(*gained, 1.0)
    slices = [(ends_s * i / BINS, value) for i, value in enumerate(gained)]
    says = f"{size(top)} in {ends_s / BINS:.2g}\N{NO-BREAK SPACE}s"
    if after := (levels[-1][1] if levels else 0) - (inside[-1][1] if inside else 0):
        says += f"; {size(after)} after the last call's end"
    return level(way.replace("->", " → "), "moved", slices, ends_s, x, top, says)
