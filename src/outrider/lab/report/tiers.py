"""Reads memory's journal, live or simulated: what each tier held, when, and what moved between them.

What moved, and where the blocks lay that were found, is told by the events and commands themselves, and equals what the
server's `stats` say; what a tier held is not, since an eviction from host is nobody else's business: `levels.py` finds
that. Pure but for reading files. Called by `run.py` and `trace.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from outrider import journal
from outrider.lab import levels
from outrider.lab.levels import Level
from outrider.memory import events as ev
from outrider.memory.settings import Settings

Moved = list[tuple[float, int]]  # (moment, bytes moved since the start)


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
    """A whole journal.

    levels      bytes in use by place; `stops` says why they end before the journal does, "" where they do not
    moved       by way, in the order in which each was first taken
    paths       request id -> its blocks
    hit_blocks  blocks that leases were given, by where they lay when they were asked for
    """

    capacity_bytes: dict[str, int] = field(default_factory=dict)  # fastest first
    levels: list[Level] = field(default_factory=list)
    stops: str = ""
    moved: dict[str, Moved] = field(default_factory=dict)
    flights: dict[int, Flight] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hit_blocks: dict[str, int] = field(default_factory=dict)
    last_s: float = 0.0

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Sums by way, as `stats` has them."""
        return {way: moved[-1][1] for way, moved in self.moved.items()}


def read(path: Path) -> Memory:
    """All of a journal named memory.jsonl. CallerError where it is none, or its events are of another version."""
    topology = journal.settings(path, Settings).topology()
    memory = Memory({place.name: place.capacity_bytes for place in topology.places})
    size_bytes: dict[str, int] = {}
    for now, event, commands in journal.told(path, ev.Event, ev.Command):
        _saw(memory, size_bytes, event, now)
        for command in commands:
            _said(memory, command, now)
        memory.last_s = now
    memory.levels, memory.stops = levels.read(path)
    return memory


def _saw(memory: Memory, size_bytes: dict[str, int], event: ev.Event, now: float) -> None:
    match event:
        case ev.Prepared(items=items, size_bytes=each):
            size_bytes.update(dict.fromkeys(items, each))
        case ev.Completed(items=items):
            _move(memory, "engine->host", now, sum(size_bytes[item] for item in items))
        case ev.Remembered(path, items):
            memory.paths[path] = items
        case ev.Copied(copies):
            for number in copies:
                flight = memory.flights[number]
                flight.ended_s = now
                _move(memory, flight.way, now, flight.size_bytes)
        case ev.CopyFailed(copy, reason):
            memory.flights[copy].ended_s, memory.flights[copy].failed = now, reason
        case _:
            pass  # the commands say the rest


def _said(memory: Memory, command: ev.Command, now: float) -> None:
    match command:
        case ev.Grant(spans=spans, lay=lay):
            _move(memory, "host->engine", now, sum(span.size_bytes for span in spans if span))
            for place, count in lay.items():
                memory.hit_blocks[place] = memory.hit_blocks.get(place, 0) + count
        case ev.Load(copies, src):
            _fly(memory, copies, f"{src}->host", now)
        case ev.Save(copies, src, dst):
            _fly(memory, copies, f"{src}->{dst}", now)
        case ev.Prefetch(copies):
            _fly(memory, copies, "hybrid->cache", now)
        case _:
            pass


def _fly(memory: Memory, copies: Iterable[ev.Copy], way: str, now: float) -> None:
    for copy in copies:
        memory.flights[copy.number] = Flight(copy.number, copy.item, way, copy.size_bytes, now)


def _move(memory: Memory, way: str, now: float, size_bytes: int) -> None:
    moved = memory.moved.setdefault(way, [])
    moved.append((now, size_bytes + (moved[-1][1] if moved else 0)))
