"""Which waiting call starts next, and on which engine. Pure: touches only the sticky choice cached in a Waiting.

order    by urgency (policy.py makes it: fcfs or srtf); but every Nth start of an engine goes to the oldest call
         that may run there, and the engine takes no other until that call fits (law 9)
where    residency: the engine with the fewest predicted seconds to the first byte; sticky: the workflow's engine
waiting  a call whose best engine is full waits for it, and its work then counts there for those behind it: so the
         other engines win as soon as waiting costs more than a prefill
"""

from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from outrider.agents.engines import Engine
from outrider.agents.events import Score
from outrider.agents.line import Line, Waiting
from outrider.agents.prefixes import Prefixes
from outrider.agents.rates import Rates

LOOK_AHEAD = 64  # waiting calls weighed for residency at one event; bounds the cost of an event


class Start(msgspec.Struct, frozen=True):
    """`waiting` goes to `engine` now. `scores` are those of all engines that could serve it, in engine order."""

    waiting: Waiting
    engine: Engine
    reason: str
    scores: tuple[Score, ...]


class Routes(msgspec.Struct):
    """What choosing an engine depends on, owned by the policy. `epoch` counts changes in which engines live."""

    engines: Sequence[Engine]
    routing: str
    oldest_every: int
    rates: Rates
    remembered: Prefixes | None  # None: no memory attached
    epoch: int = 0


def plan(line: Line, routes: Routes, now: float) -> Start | None:
    """The next start, or None when nothing can start. Call again after booking it.

    Ties between engines go to the first in the settings; between calls there are none (arrival numbers).
    """
    open_engines = []
    for engine in routes.engines:
        if not engine.alive or engine.free <= 0:
            continue
        if (engine.starts + 1) % routes.oldest_every == 0:
            oldest = next((w for w in line.by_age() if engine in choices(w, routes)), None)
            if oldest is not None:
                if engine.has_room(oldest.reserve_tokens):
                    return Start(oldest, engine, f"oldest, {routes.routing}", scores(oldest, routes, now))
                continue  # it drains until the oldest fits
        open_engines.append(engine)
    if not open_engines:
        return None
    choose = _sticky if routes.routing == "sticky" else _residency
    return choose(line, routes, open_engines, now)


def _sticky(line: Line, routes: Routes, open_engines: Sequence[Engine], now: float) -> Start | None:
    full: list[Engine] = []
    for waiting in line.by_urgency():
        for engine in choices(waiting, routes):  # one, or none
            if engine in open_engines and engine not in full:
                if engine.has_room(waiting.reserve_tokens):
                    return Start(waiting, engine, "order, sticky", scores(waiting, routes, now))
                full.append(engine)  # no overtaking by smaller calls
                if len(full) == len(open_engines):
                    return None
    return None


def _residency(line: Line, routes: Routes, open_engines: Sequence[Engine], now: float) -> Start | None:
    held_s = {engine.name: 0.0 for engine in routes.engines}
    full: list[Engine] = []
    for waiting, _ in zip(line.by_urgency(), range(LOOK_AHEAD), strict=False):
        options = choices(waiting, routes)
        if not options:
            continue
        found = scores(waiting, routes, now)
        at = min(range(len(found)), key=lambda i: (found[i].total_s + held_s[found[i].engine], i))
        best = options[at]
        if best in open_engines and best not in full:
            if best.has_room(waiting.reserve_tokens):
                return Start(waiting, best, "order, residency", found)
            full.append(best)
            if len(full) == len(open_engines):
                return None
        held_s[best.name] += found[at].prefill_s + found[at].load_s + decode_s(waiting, routes.rates) / best.credit
    return None


def choices(waiting: Waiting, routes: Routes) -> list[Engine]:
    """Live engines that may take the call, in order: those that did not fail it, else any; when sticky, one."""
    live = [engine for engine in routes.engines if engine.alive and engine.serves(waiting.call.model)]
    if not live:
        live = [engine for engine in routes.engines if engine.alive]  # it will say itself that it lacks the model
    fresh = [engine for engine in live if engine.name not in waiting.tried] or live
    if routes.routing != "sticky" or not fresh:
        return fresh
    if waiting.home_epoch != routes.epoch:
        waiting.home = max(fresh, key=lambda engine: rendezvous(waiting.workflow, engine.name)).name
        waiting.home_epoch = routes.epoch
    return [engine for engine in fresh if engine.name == waiting.home]


def rendezvous(workflow: str, engine: str) -> bytes:
    """Highest wins: an engine that goes takes only its own workflows with it."""
    return blake2b(f"{workflow}\n{engine}".encode(errors="replace"), digest_size=16).digest()


def scores(waiting: Waiting, routes: Routes, now: float) -> tuple[Score, ...]:
    return tuple(score(waiting, engine, routes, now) for engine in choices(waiting, routes))


def score(waiting: Waiting, engine: Engine, routes: Routes, now: float) -> Score:
    """Predicted seconds to the call's first byte on one engine. A remembered prefix is loaded where that is cheaper."""
    rates = routes.rates
    call = waiting.call
    resident_chars = engine.prefixes.resident_chars(call.chain)
    loadable_chars = 0
    if routes.remembered is not None and rates.load_s < rates.prefill_s:
        loadable_chars = max(0, routes.remembered.resident_chars(call.chain) - resident_chars)
    computed_chars = call.chars - resident_chars - loadable_chars
    return Score(
        engine=engine.name,
        prefill_s=computed_chars * rates.tokens_per_char * rates.prefill_s,
        load_s=loadable_chars * rates.tokens_per_char * rates.load_s,
        outstanding_s=engine.outstanding_s(now),
        resident_tokens=round(resident_chars * rates.tokens_per_char),
    )


def decode_s(waiting: Waiting, rates: Rates) -> float:
    return waiting.forecast.tokens * rates.decode_s
