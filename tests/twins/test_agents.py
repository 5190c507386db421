"""One event order, two movers: the live gateway before real HTTP engines, and its twin, give the same journal.

The live run's journal says what happened and in which order; arrivals, probes and departures are given to the twin at
its door, and what engines did is done to the jobs that the twin has sent there. The events that follow must be the
twin's own work, and every line of its journal equal to the live one, commands included.
"""

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outrider import journal
from outrider.agents import events as ev
from outrider.agents.settings import GatewaySettings
from outrider.lab.twins.agents import AgentsTwin, Flight, Work
from outrider.lab.twins.job import Job

NO_CHAIN = np.zeros(0, np.int64)


class Stage:
    """An engine that does what the live one did, when it did it."""

    block_tokens = 1

    def __init__(self, too_long: set[str]) -> None:
        self.jobs: dict[str, Job] = {}
        self.aborted: list[str] = []
        self.too_long = too_long

    def fits(self, job: Job) -> bool:
        return job.id not in self.too_long

    def submit(self, job: Job) -> None:
        assert job.id not in self.jobs, "one attempt at a time"
        self.jobs[job.id] = job

    def abort(self, job: Job) -> None:
        assert self.jobs.pop(job.id) is job
        self.aborted.append(job.id)


class Replay:
    """Plays one live journal through a twin."""

    def __init__(self, live: Path, own: Path, clock: Any) -> None:
        header, lines = journal.read(live)
        settings = msgspec.json.decode(header.settings, type=GatewaySettings)
        decoder = msgspec.json.Decoder(ev.Event)
        self.lines = [(line.now, decoder.decode(line.event), bytes(line.event)) for line in lines]
        self.clock = clock
        self.usages = {
            (event.call, event.attempt): event.usage for _, event, _ in self.lines if isinstance(event, ev.Finished)
        }
        bad = {event.call for _, event, _ in self.lines if isinstance(event, ev.Finished) and event.status == 400}
        self.stages = {name: Stage(bad) for name in settings.engines}
        self.wants: list[Any] = []
        self.ends: list[ev.Terminal] = []
        self.journal = journal.Journal(own, "agents", settings)
        self.twin = AgentsTwin(settings, clock, self.stages, self.ended, self.wants.append, self.journal)

    def ended(self, end: ev.Terminal, flight: Flight) -> None:
        self.ends.append(end)

    def run(self) -> None:
        for now, event, raw in self.lines:
            self.clock.now = now
            match event:
                case ev.EngineUp() | ev.EngineDown():
                    self.twin.feed(event)  # the probe's, not the mover's
                case ev.Arrived(call):
                    usage = next((u for (name, _), u in self.usages.items() if name == call.id and u), ev.Usage())
                    self.twin.send(call, Work(usage.prompt_tokens, usage.output_tokens, NO_CHAIN))
                case ev.Gone(call_id):
                    self.twin.leave(call_id)
                case _:
                    self.happen(event)
                    self.clock.choose(raw)

    def happen(self, event: ev.Event) -> None:
        """Do to the twin's job what the live engine did; what the twin makes of it is its own."""
        match event:
            case ev.FirstByte(call_id, attempt) if call_id in self.open:
                job = self.open[call_id]
                if self.twin.flights[call_id].call.stream:
                    job.on_first()
                else:
                    self.finish(call_id, attempt)
            case ev.Finished(call_id, attempt) if call_id in self.open:
                self.finish(call_id, attempt)
            case ev.Failed(call_id, attempt, "timeout"):
                self.clock.late(call_id, attempt)
            case ev.Failed(call_id, _, kind, why) if call_id in self.open:
                self.close(call_id).on_failed(kind, why)
            case _:
                pass  # Woke, and what follows from what was done before

    @property
    def open(self) -> dict[str, Job]:
        return {name: job for stage in self.stages.values() for name, job in stage.jobs.items()}

    def close(self, call_id: str) -> Job:
        return next(stage.jobs.pop(call_id) for stage in self.stages.values() if call_id in stage.jobs)

    def finish(self, call_id: str, attempt: int) -> None:
        job, usage = self.close(call_id), self.usages[call_id, attempt]
        assert usage is not None
        job.own_blocks, job.external_blocks = usage.cached_tokens - usage.external_tokens, usage.external_tokens
        job.on_finished()


async def play_live(farm: Any, door: Any) -> Any:
    """A gateway of credit 1 before two engines, and all that can go wrong."""
    engines = await farm(2)
    limits = {"first_byte_s": 0.4, "no_engine_s": 0.3}
    gate = await door(engines, limits=limits, credit=1, memory_attached=True)

    async def ask(name: str, stream: bool = True, **body: Any) -> int:
        headers = {"Outrider-Workflow": name, "Outrider-Role": "coder", "Outrider-Stage": "code/0"}
        turns = [{"role": "user", "content": f"say {name} " * 50}]
        async with gate.post({"stream": stream, "messages": turns, **body}, headers=headers) as answer:
            await answer.read()
            status: int = answer.status
            return status

    assert await asyncio.gather(*(ask(f"w{n}", stream=n % 3 > 0) for n in range(9))) == [200] * 9
    assert await asyncio.gather(*(ask(f"w{n}") for n in range(4))) == [200] * 4  # contexts that return
    engines[0].behave = "die_before"
    assert await asyncio.gather(*(ask(f"x{n}") for n in range(4))) == [200] * 4
    engines[0].behave = engines[1].behave = "500"
    assert await ask("relayed") == 500
    engines[0].behave = "well"
    engines[1].behave = "die_middle"
    assert await asyncio.gather(*(ask(f"y{n}") for n in range(4))) == [200] * 4
    engines[0].behave = engines[1].behave = "hang"
    assert await ask("late") == 504
    leaving = asyncio.create_task(ask("leaving"))
    await gate.until(lambda: len(gate.policy.at) == 1)
    leaving.cancel()
    await gate.calm()
    for engine in engines:
        await engine.kill()
    assert await ask("nobody") == 503
    await gate.calm()
    return gate


async def test_the_twin_writes_the_live_journal_again(
    farm: Any, door: Any, imposed: Any, same_lines: Callable[[Path, Path], int], tmp_path: Path
) -> None:
    gate = await play_live(farm, door)
    live = tmp_path / "live.jsonl"
    live.write_bytes(gate.journal.read_bytes())  # whole up to here; the fixture's end adds nothing to it
    replay = Replay(live, tmp_path / "twin.jsonl", imposed())
    replay.run()
    assert same_lines(live, tmp_path / "twin.jsonl") > 60
    seen = {type(event).__name__ for _, event, _ in replay.lines}
    assert {"Arrived", "FirstByte", "Finished", "Failed", "Gone", "Woke", "EngineUp"} <= seen
    kinds = {event.kind for _, event, _ in replay.lines if isinstance(event, ev.Failed)}
    assert {"reset", "status", "timeout"} <= kinds
    assert {type(end).__name__ for end in replay.ends} == {"Settle", "Reject", "Relay", "Break", "Abort"}
    assert replay.wants == gate.wants, "what memory hears"
    aborted = [name for stage in replay.stages.values() for name in stage.aborted]
    assert len(aborted) >= 2, "a late answer and a client that leaves stop their engines"
    assert replay.clock.left() == [], "the twin has nothing in hand that live did not do"
    replay.twin.close()


async def test_a_twin_that_forgets_a_command_is_found_out(
    farm: Any, door: Any, imposed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without attempts there are no answers, without timers nobody wakes."""
    gate = await play_live(farm, door)
    carry_out = AgentsTwin._carry_out
    for lost in (ev.Dispatch, ev.Wake):
        monkeypatch.setattr(
            AgentsTwin, "_carry_out", lambda twin, c, lost=lost: None if isinstance(c, lost) else carry_out(twin, c)
        )
        replay = Replay(gate.journal, tmp_path / f"{lost.__name__}.jsonl", imposed())
        with closing(replay.journal), pytest.raises(AssertionError, match="the twin"):
            replay.run()
