"""The same run as a trace in the Trace Event Format, for ui.perfetto.dev and chrome://tracing. Pure. Called by `write`.

    process                 tracks                             slices                        counters
    ARM: workflows          a workflow, more where calls       a call; inside it: in line,   calls in line
                            of it overlap                      first byte, stream
    ARM: engines            an engine, as many as it had       an attempt                    running, KV tokens of each
                            calls at once
    ARM: memory             a way between tiers                a batch of copies             bytes held, bytes moved

A flow goes from the end of a call, where its workflow's return was foretold (Tell), to the batch that lifted its blocks
(Load). Times are microseconds since the arm's first arrival, so arms lie upon each other as in the page. Experts have
no clock but micro-steps, and stay out.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from outrider.lab.report import calls as read
from outrider.lab.report.calls import Calls
from outrider.lab.report.run import Journals, Run
from outrider.lab.report.tiers import Flight, Memory
from outrider.lab.report.timeline import laid_out, pieces, told

Event = dict[str, Any]
Slice = tuple[int, int, str, Event]  # begin, end [us], name, args
Place = tuple[int, int]  # track, moment [us]: inside a slice
PIECES = MappingProxyType({"queue": "in line", "first": "to the first byte", "stream": "stream"})


class Process:
    """Events of one process; tracks are made as they are needed."""

    def __init__(self, pid: int, name: str, zero_s: float) -> None:
        self.pid = pid
        self.events: list[Event] = [self._meta(0, "process_name", name), self._meta(0, "process_sort_index", pid)]
        self._zero_s = zero_s
        self._tracks = 0

    def us(self, now_s: float) -> int:
        """Whole microseconds since zero; what began before it begins there."""
        return max(0, round((now_s - self._zero_s) * 1e6))

    def track(self, name: str) -> int:
        self._tracks += 1
        self.events += [
            self._meta(self._tracks, "thread_name", name),
            self._meta(self._tracks, "thread_sort_index", self._tracks),
        ]
        return self._tracks

    def slice(self, tid: int, one: Slice) -> None:
        begin, end, name, args = one
        shape = {"ph": "X", "ts": begin, "dur": end - begin, "name": name, "args": args}
        self.events.append({"pid": self.pid, "tid": tid, **shape})

    def counter(self, name: str, unit: str, levels: Iterable[tuple[float, float]]) -> None:
        for now, value in levels:
            args = {unit: value}
            self.events.append({"pid": self.pid, "tid": 0, "ph": "C", "ts": self.us(now), "name": name, "args": args})

    def flow(self, phase: str, tid: int, at: int, number: int) -> None:
        """s: starts in the slice that encloses `at`; f: ends in the one that encloses it."""
        end = {"bp": "e"} if phase == "f" else {}
        shape = {"ph": phase, "ts": at, "id": number, "name": "wanted", "cat": "want"}
        self.events.append({"pid": self.pid, "tid": tid, **shape, **end})

    def _meta(self, tid: int, name: str, value: str | int) -> Event:
        key = "sort_index" if name.endswith("sort_index") else "name"
        return {"pid": self.pid, "tid": tid, "ph": "M", "ts": 0, "name": name, "args": {key: value}}


def trace(run: Run, journals: Journals) -> bytes:
    """The whole trace as JSON, events by time."""
    events: list[Event] = []
    flows = itertools.count(1)
    for number, arm in enumerate(run.arms):
        calls, pid = journals.calls[arm.name], 10 * number
        flow = Process(pid + 1, f"{arm.name}: workflows", calls.began_s)
        ends = _workflows(flow, calls)
        processes = [flow, _engines(Process(pid + 2, f"{arm.name}: engines", calls.began_s), calls)]
        if (memory := journals.memory.get(arm.name)) is not None:
            processes.append(Process(pid + 3, f"{arm.name}: memory", calls.began_s))
            lifts = _memory(processes[-1], memory)
            _flows(flow, ends, processes[-1], lifts, memory, calls, flows)
        events += [event for process in processes for event in process.events]
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"], -event.get("dur", 0)))
    other = {"title": run.title, "simulated": run.simulated, "plainly": run.plainly}
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other})


def _workflows(process: Process, calls: Calls) -> dict[str, Place]:
    """Every call with what it was doing; where each call ended."""
    ends: dict[str, Place] = {}
    for name, flow in calls.by_workflow().items():
        until_s = [story.until_s(calls.ended_s) for story in flow]
        lanes = laid_out([(story.arrived_s, end_s) for story, end_s in zip(flow, until_s, strict=True)])
        tracks = [process.track(name if lane == 0 else f"{name} ({lane + 1})") for lane in range(max(lanes) + 1)]
        for story, lane, end_s in zip(flow, lanes, until_s, strict=True):
            tid, begin, end = tracks[lane], process.us(story.arrived_s), process.us(end_s)
            label = story.stage or story.role or story.id
            process.slice(
                tid, (begin, end, label, {k: v for k, v in told(story, calls).items() if v not in (None, "", [])})
            )
            for kind, begin_s, over_s in pieces(story, calls.ended_s):
                process.slice(tid, (process.us(begin_s), process.us(over_s), PIECES[kind], {}))
            ends[story.id] = (tid, max(begin, end - 1))
    process.counter("calls in line", "calls", read.waiting(calls))
    return ends


def _engines(process: Process, calls: Calls) -> Process:
    attempts = [(attempt, story) for story in calls.stories.values() for attempt in story.attempts]
    for engine in calls.engines:
        here = sorted(
            (
                (a.began_s, calls.last_s if a.ended_s is None else a.ended_s, a, s)
                for a, s in attempts
                if a.engine == engine
            ),
            key=lambda one: (one[0], one[3].id),
        )
        lanes = laid_out([(begin_s, end_s) for begin_s, end_s, _, _ in here])
        name = read.short(calls, engine)
        tracks = [process.track(f"{name} / {lane}") for lane in range(max(lanes, default=0) + 1)]
        for (begin_s, end_s, attempt, story), lane in zip(here, lanes, strict=True):
            args = {"call": story.id} | ({"failed": attempt.failed} if attempt.failed else {})
            label = " ".join(filter(None, (story.workflow, story.stage or story.role)))
            process.slice(tracks[lane], (process.us(begin_s), process.us(end_s), label or story.id, args))
        process.counter(f"running at {name}", "calls", read.running(calls, engine))
        probes = [(probe.now, round(probe.kv_used)) for probe in calls.probes if probe.engine == engine]
        process.counter(f"KV tokens of {name}", "tokens", probes)
    return process


def _memory(process: Process, memory: Memory) -> list[tuple[Place, float, frozenset[str]]]:
    """Copies, those that one command asked for as one slice. Returns the lifts: where, when, and their blocks."""
    batches: dict[tuple[str, float], list[Flight]] = {}
    for flight in memory.flights.values():
        batches.setdefault((flight.way, flight.began_s), []).append(flight)
    lifts: list[tuple[Place, float, frozenset[str]]] = []
    for way in dict.fromkeys(way for way, _ in batches):
        mine = [(began_s, flights) for (one, began_s), flights in batches.items() if one == way]
        spans = [(began_s, max(f.ended_s or memory.last_s for f in flights)) for began_s, flights in mine]
        lanes = laid_out(spans)
        tracks = [process.track(way if lane == 0 else f"{way} ({lane + 1})") for lane in range(max(lanes) + 1)]
        for (began_s, flights), (_, end_s), lane in zip(mine, spans, lanes, strict=True):
            size_bytes = sum(flight.size_bytes for flight in flights)
            args = {"blocks": len(flights), "bytes": size_bytes, "failed": [f.failed for f in flights if f.failed]}
            begin = process.us(began_s)
            process.slice(tracks[lane], (begin, process.us(end_s), f"{len(flights)} blocks", args))
            if way.endswith("->host"):
                lifts.append(((tracks[lane], begin), began_s, frozenset(flight.item for flight in flights)))
    for place in memory.capacity_bytes:
        process.counter(f"{place} holds", "bytes", ((one.now, one.used_bytes[place]) for one in memory.levels))
    for way, moved in memory.moved.items():
        process.counter(f"moved {way}", "bytes", moved)
    return lifts


def _flows(
    calls_in: Process,
    ends: Mapping[str, Place],
    memory_in: Process,
    lifts: Sequence[tuple[Place, float, frozenset[str]]],
    memory: Memory,
    calls: Calls,
    numbers: Iterator[int],
) -> None:
    """From each call whose return was foretold to the first lift of its blocks after that."""
    for now, want in calls.wants:
        items = set(memory.paths.get(want.item, ()))
        lift = next(
            (place for place, began_s, blocks in lifts if began_s >= now and not items.isdisjoint(blocks)), None
        )
        if want.saved_s > 0 and want.item in ends and lift is not None:
            number = next(numbers)
            calls_in.flow("s", *ends[want.item], number)
            memory_in.flow("f", *lift, number)
