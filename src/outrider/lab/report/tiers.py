"""Reads memory's journal, live or simulated, by replaying it: what each tier held, when, and what moved between them.

The recorded events go once more through the policy object, so its books are those of the run: the last sample equals
what the server's `stats` said. Pure but for reading the file. Called by `run.py` and `trace.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from outrider import journal
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings

LINES = 4000  # replayed at most: a policy whose host is full needs about half a millisecond for each


@dataclass(slots=True)
class Sample:
    """The books after one event that changed them. `used_bytes` by place, `moved_bytes` by way, since the start."""

    now: float
    used_bytes: dict[str, int]
    moved_bytes: dict[str, int]


@dataclass(slots=True)
class Flight:
    """One copy between tiers. `ended_s` None: in flight when the journal ends."""

    number: int
    item: str
    way: str  # "disk->host"
    size_bytes: int
    began_s: float
    ended_s: float | None = None
    failed: str = ""


@dataclass(slots=True)
class Memory:
    """A whole journal. `paths`: request id -> its blocks; `wanted`: (time, path or block) as the wants came in."""

    capacity_bytes: dict[str, int] = field(default_factory=dict)  # fastest first
    samples: list[Sample] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    wanted: list[tuple[float, str]] = field(default_factory=list)
    hit_blocks: dict[str, int] = field(default_factory=dict)  # by where they lay when they were asked for
    stats: dict[str, Any] = field(default_factory=dict)
    stops: str = ""  # why the last sample is not the end of the run; "" where it is


def read(path: Path) -> Memory:
    """Replay a journal named memory.jsonl. CallerError where it is none, or its events are of another version."""
    memory = Memory()
    watches: list[_Watch] = []

    def fresh(settings: msgspec.Raw) -> "_Watch":
        watches.append(_Watch(memory, Policy(msgspec.json.decode(settings, type=Settings))))
        return watches[0]

    _, lines = journal.read(path)
    _, difference = journal.replay(path, ev.Event, fresh, (_granted(memory, line) for line in islice(lines, LINES)))
    if difference is not None:
        memory.stops = f"From line {difference.line} of {path.name} on this version of Outrider decides otherwise."
    for line in lines:  # too many to replay; where the blocks lay that were found is told by the commands alone
        _granted(memory, line)
        memory.stops = memory.stops or f"The first {LINES:,} events of {path.name} are drawn."
    memory.stats = watches[0].policy.stats()
    return memory


class _Said(msgspec.Struct):
    """A command, as far as hits by tier are told by it."""

    type: str
    lay: dict[str, int] = {}


def _granted(memory: Memory, line: journal.Line) -> journal.Line:
    """Count where the blocks lay that a lease was given."""
    if b'"lay":{"' in bytes(line.commands):
        for command in msgspec.json.decode(line.commands, type=list[_Said]):
            for place, count in command.lay.items():
                memory.hit_blocks[place] = memory.hit_blocks.get(place, 0) + count
    return line


class _Watch:
    """The policy object, and a look at its books after every event."""

    def __init__(self, memory: Memory, policy: Policy) -> None:
        self.memory, self.policy = memory, policy
        places = policy.residency.places
        memory.capacity_bytes = {place: policy.residency.ledger.capacity_bytes(place) for place in places}

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        self._before(event, now)
        commands = self.policy.handle(event, now)
        self._after(commands, now)
        return commands

    def _before(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.Remembered(path, items):
                self.memory.paths[path] = items
            case ev.Wanted(want):
                self.memory.wanted.append((now, want.item))
            case ev.Copied(copies):
                for number in copies:
                    self.memory.flights[number].ended_s = now
            case ev.CopyFailed(copy, reason):
                self.memory.flights[copy].ended_s, self.memory.flights[copy].failed = now, reason
            case _:
                pass  # the books say the rest

    def _after(self, commands: list[ev.Command], now: float) -> None:
        for command in commands:
            match command:
                case ev.Load(copies, src):
                    self._fly(copies, f"{src}->host", now)
                case ev.Save(copies, src, dst):
                    self._fly(copies, f"{src}->{dst}", now)
                case ev.Prefetch(copies):
                    self._fly(copies, "hybrid->cache", now)
                case _:
                    pass
        books = Sample(now, dict(self.policy.residency.ledger.used_bytes), dict(self.policy.tally.moved_bytes))
        last = self.memory.samples[-1] if self.memory.samples else None
        if last is None or (last.used_bytes, last.moved_bytes) != (books.used_bytes, books.moved_bytes):
            self.memory.samples.append(books)

    def _fly(self, copies: Iterable[ev.Copy], way: str, now: float) -> None:
        for copy in copies:
            self.memory.flights[copy.number] = Flight(copy.number, copy.item, way, copy.size_bytes, now)
