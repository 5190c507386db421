"""Reads memory's journal, live or simulated, by replaying it: what each tier held, when, and what moved between them.

The recorded events go once more through the policy object, so its books are those of the run: the last sample equals
what the server's `stats` said. Pure but for reading the file. Called by `run.py` and `trace.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from outrider import journal
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Settings


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
    differs: str = ""  # where this version decides otherwise than the run did: what follows is not told


def read(path: Path) -> Memory:
    """Replay a journal named memory.jsonl. CallerError where it is none, or its events are of another version."""
    memory = Memory()
    watches: list[_Watch] = []

    def fresh(settings: msgspec.Raw) -> "_Watch":
        watches.append(_Watch(memory, Policy(msgspec.json.decode(settings, type=Settings))))
        return watches[0]

    _, difference = journal.replay(path, ev.Event, fresh)
    if difference is not None:
        memory.differs = f"line {difference.line} of {path.name}"
    memory.stats = watches[0].policy.stats()
    return memory


class _Watch:
    """The policy object, and a look at its books after every event."""

    def __init__(self, memory: Memory, policy: Policy) -> None:
        self.memory, self.policy = memory, policy
        places = policy.residency.places
        memory.capacity_bytes = {place: policy.residency.ledger.capacity_bytes(place) for place in places}
        memory.hit_blocks = dict.fromkeys(places, 0)

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        self._before(event, now)
        commands = self.policy.handle(event, now)
        self._after(commands, now)
        return commands

    def _before(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.Leased(items=items):
                for item in items[: self.policy.lookup(items)]:
                    self.memory.hit_blocks[self._lies(item)] += 1
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

    def _lies(self, item: str) -> str:
        """The fastest tier that has a published copy."""
        residency = self.policy.residency
        return next(place for place in residency.places if residency.state(item, place) is At.HERE)

    def _after(self, commands: list[ev.Command], now: float) -> None:
        for command in commands:
            if isinstance(command, ev.Load | ev.Save):
                way = "disk->host" if isinstance(command, ev.Load) else "host->disk"
                for copy in command.copies:
                    self.memory.flights[copy.number] = Flight(copy.number, copy.item, way, copy.size_bytes, now)
        books = Sample(now, dict(self.policy.residency.ledger.used_bytes), dict(self.policy.tally.moved_bytes))
        last = self.memory.samples[-1] if self.memory.samples else None
        if last is None or (last.used_bytes, last.moved_bytes) != (books.used_bytes, books.moved_bytes):
            self.memory.samples.append(books)
