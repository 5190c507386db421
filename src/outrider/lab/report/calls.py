"""Reads the gateway's journal, live or simulated: every call's story, and what the engines said of themselves.

Pure but for reading the file. Called by `run.py` and `trace.py`. Times are seconds on the journal's own clock.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec

from outrider import journal
from outrider.agents import events as ev
from outrider.wants import Want


@dataclass(slots=True)
class Attempt:
    """One send of a call to one engine. `ended_s` None: the journal ends before it does."""

    engine: str
    began_s: float
    first_byte_s: float | None = None
    ended_s: float | None = None
    failed: str = ""  # why, where it ended badly


@dataclass(slots=True)
class Story:
    """One call from arrival to its one terminal command. `end` is that command's name, "" where there is none yet."""

    id: str
    workflow: str
    role: str
    stage: str
    arrived_s: float
    attempts: list[Attempt] = field(default_factory=list)
    dispatch: ev.Dispatch | None = None  # the last one
    ahead: int = 0  # calls before it in the line when it arrived
    ended_s: float | None = None
    end: str = ""
    why: str = ""
    usage: ev.Usage | None = None

    def until_s(self, otherwise: float) -> float:
        return otherwise if self.ended_s is None else self.ended_s

    @property
    def queued_s(self) -> float:
        """From arrival to its first engine; 0 where it never reached one."""
        return self.attempts[0].began_s - self.arrived_s if self.attempts else 0.0


@dataclass(slots=True)
class Probe:
    """What an engine said when it was probed."""

    now: float
    engine: str
    kv_used: float  # tokens
    running: int
    waiting: int


@dataclass
class Calls:
    """A whole journal, read to its end. `engines` in the order of the settings; `wants` as (time, want) to memory."""

    engines: tuple[str, ...] = ()
    stories: dict[str, Story] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    kv_tokens: dict[str, int] = field(default_factory=dict)  # of each engine, 0 where it does not say
    wants: list[tuple[float, Want]] = field(default_factory=list)
    last_s: float = 0.0

    @cached_property
    def began_s(self) -> float:
        """The first arrival: zero of the report's time axis."""
        return min((story.arrived_s for story in self.stories.values()), default=self.last_s)

    @cached_property
    def ended_s(self) -> float:
        """The last ending of a call."""
        return max((story.until_s(self.last_s) for story in self.stories.values()), default=self.last_s)

    def by_workflow(self) -> dict[str, list[Story]]:
        """Workflows by first arrival, their calls by arrival. A call that names none stands for itself."""
        flows: dict[str, list[Story]] = {}
        for story in sorted(self.stories.values(), key=lambda s: (s.arrived_s, s.id)):
            flows.setdefault(story.workflow or story.id, []).append(story)
        return flows


class _Names(msgspec.Struct):
    engines: tuple[str, ...] = ()


def read(path: Path) -> Calls:
    """All of a journal named agents.jsonl. CallerError where it is none, or its events are of another version."""
    calls = Calls(engines=journal.settings(path, _Names).engines)
    for now, event, commands in journal.told(path, ev.Event, ev.Command):
        _saw(calls, event, now)
        for command in commands:
            _said(calls, command, now)
        calls.last_s = now
    return calls


def _saw(calls: Calls, event: ev.Event, now: float) -> None:
    match event:
        case ev.Arrived(call):
            who = call.identity
            calls.stories[call.id] = Story(call.id, who.workflow, who.role, who.stage, now)
        case ev.FirstByte(call, number):
            _attempt(calls, call, number).first_byte_s = now
        case ev.Finished(call, number):
            _end(_attempt(calls, call, number), now)
        case ev.Failed(call, number, kind, why):
            _end(_attempt(calls, call, number), now, f"{kind}: {why}")
        case ev.EngineUp():
            used = event.kv_usage * (event.kv_tokens or 0)
            calls.kv_tokens[event.engine] = event.kv_tokens or 0
            calls.probes.append(Probe(now, event.engine, used, event.running, event.waiting))
        case _:
            pass  # the commands say the rest


def _attempt(calls: Calls, call: str, number: int) -> Attempt:
    return calls.stories[call].attempts[number - 1]


def _end(attempt: Attempt, now: float, failed: str = "") -> None:
    """Late news of an attempt that is over changes nothing."""
    if attempt.ended_s is None:
        attempt.ended_s, attempt.failed = now, failed


def _said(calls: Calls, command: ev.Command, now: float) -> None:
    match command:
        case ev.Dispatch():
            story = calls.stories[command.call]
            story.dispatch = command
            story.attempts.append(Attempt(command.engine, now))
        case ev.Hold():
            calls.stories[command.call].ahead = command.position - 1
        case ev.Tell(want):
            calls.wants.append((now, want))
        case ev.Settle() | ev.Reject() | ev.Relay() | ev.Break() | ev.Abort():
            story = calls.stories[command.call]
            story.ended_s, story.end = now, type(command).__name__
            story.why, story.usage = getattr(command, "why", ""), getattr(command, "usage", None)
            if story.attempts:
                _end(story.attempts[-1], now)
        case _:
            pass  # timers


def steps(changes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Sum up changes into a level over time: one point a moment, in order."""
    level, points = 0, list[tuple[float, int]]()
    for now, change in sorted(changes):
        level += change
        if points and points[-1][0] == now:
            points[-1] = (now, level)
        else:
            points.append((now, level))
    return points


def waiting(calls: Calls) -> list[tuple[float, int]]:
    """Calls in the gateway's line over time: between arrival, or a failed attempt, and the next dispatch."""
    changes: list[tuple[float, int]] = []
    for story in calls.stories.values():
        enters_s = story.arrived_s
        for attempt in story.attempts:
            changes += [(enters_s, 1), (attempt.began_s, -1)]
            enters_s = calls.last_s if attempt.ended_s is None else attempt.ended_s
        if not story.attempts:
            changes += [(enters_s, 1), (story.until_s(calls.last_s), -1)]
    return steps(changes)


def running(calls: Calls, engine: str) -> list[tuple[float, int]]:
    """Calls in flight at one engine over time."""
    changes: list[tuple[float, int]] = []
    for story in calls.stories.values():
        for attempt in story.attempts:
            if attempt.engine == engine:
                changes += [(attempt.began_s, 1), (calls.last_s if attempt.ended_s is None else attempt.ended_s, -1)]
    return steps(changes)


def short(calls: Calls, engine: str) -> str:
    """`engine 0`: engines by their place in the settings, which is easier to read than a URL."""
    return f"engine {calls.engines.index(engine)}" if engine in calls.engines else engine
