"""One simulated arm: the twins, modelled engines and links put together, and a workload played against them.

Conservation is checked while it runs: the twins raise LawBroken as soon as a call ends twice or a token, block or byte
is lost; `play` closes with what can only be known at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outrider.agents import events as ev
from outrider.agents.settings import GatewaySettings
from outrider.errors import CallerError
from outrider.journal import Journal
from outrider.lab.clock import Clock
from outrider.lab.simulate.callers import Callers
from outrider.lab.simulate.figures import figures
from outrider.lab.traces.workload import Workload
from outrider.lab.twins.agents import AgentsTwin, Flight
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.hook import MemoryHook
from outrider.lab.twins.links import Lane
from outrider.lab.twins.memory import MemoryTwin
from outrider.lab.twins.pool import Pool
from outrider.lab.twins.speed import Profile
from outrider.memory.settings import Settings as MemorySettings
from outrider.topology import Link
from outrider.wants import Want

CHECK_EVERY = 500  # calls between two passes over every block of every engine
PAGES_MOST = 1 << 20  # of host: what memory keeps of each block takes room too, about 3 GB for so many


@dataclass(frozen=True)
class Fleet:
    """What an arm runs on. `kv_tokens` is the cache of each engine; `memory` None: no memory server."""

    profile: Profile
    engines: int
    kv_tokens: int
    credit: int
    policy: Literal["fcfs", "srtf"]
    routing: Literal["sticky", "residency"]
    memory: MemorySettings | None = None


def play(workload: Workload, fleet: Fleet, directory: Path | None, on_call: Callable[[], object]) -> dict[str, Any]:
    """Play the workload; its figures. Journals go to `directory`, where there is one.

    Raises CallerError where the fleet cannot hold a block, LawBroken where something was lost.
    """
    clock = Clock()
    engines = _engines(clock, workload, fleet)
    hooks: list[MemoryHook] = []
    lanes: list[Lane] = []
    busy_s: list[float] = []  # of each lane when the last call ended: memory may go on after that
    memory = None
    if fleet.memory is not None:
        journal = Journal(directory / "memory.jsonl", "memory", fleet.memory) if directory else None
        memory = MemoryTwin(fleet.memory, clock, journal=journal, notes=directory is not None)
        hooks = _attach(engines, memory, workload, fleet)
        lanes += [lane for hook in hooks for lane in (hook.to_engine, hook.to_host)]
        lanes += memory.lanes.values()
    settings = GatewaySettings(
        engines=tuple(engines),
        policy=fleet.policy,
        routing=fleet.routing,
        credit=fleet.credit,
        memory_attached=memory is not None,
    )
    journal = Journal(directory / "agents.jsonl", "agents", settings) if directory else None

    def on_want(want: Want) -> None:
        if memory is not None:
            clock.at(clock.now + fleet.profile.hop_s, lambda: memory.want(want))

    def on_end(end: ev.Terminal, flight: Flight) -> None:
        if gateway.ended % CHECK_EVERY == 0:
            _check(engines, gateway)
        busy_s[:] = [lane.busy_s() for lane in lanes]
        callers.on_end(end, flight)

    gateway = AgentsTwin(settings, clock, engines, on_end, on_want, journal, fleet.profile.hop_s)
    for name in engines:
        gateway.feed(ev.EngineUp(name, (), fleet.kv_tokens))
    callers = Callers(clock, workload, gateway.send, on_call)
    clock.run()
    _check(engines, gateway)
    gateway.close()
    callers.close()
    if memory is not None:
        memory.close()
        memory.counted("engine->host", sum(hook.to_host.moved_bytes for hook in hooks))
        memory.counted("host->engine", sum(hook.to_engine.moved_bytes + hook.unread_bytes for hook in hooks))
        if memory.levels is not None and directory is not None:
            memory.levels.write(directory / "memory.jsonl")
    record = callers.record
    wall_s = max((answer.sent_s + answer.total_s for answer in record.answers), default=0.0)
    return figures(record, workload, gateway, engines, memory, dict(zip(lanes, busy_s, strict=True)), wall_s)


def page_blocks(workload: Workload, profile: Profile, memory: MemorySettings) -> int:
    """Blocks of the engine that make one of memory's: a power of two, 1 unless host would hold too many."""
    pages = memory.host_bytes // (workload.block_tokens * profile.kv_bytes_per_token)
    blocks = 1
    while pages // blocks > PAGES_MOST:
        blocks *= 2
    return blocks


def _engines(clock: Clock, workload: Workload, fleet: Fleet) -> dict[str, Engine]:
    profile, block_tokens = fleet.profile, workload.block_tokens
    if fleet.kv_tokens < 2 * block_tokens:
        why = f"this trace has blocks of {block_tokens} tokens, and a cache needs two"
        raise CallerError(f"--kv-tokens {fleet.kv_tokens}: {why}. Raise it.")
    ids = 1 + max((first + count for call in workload.calls for first, count in call.chain), default=0)
    return {
        f"http://engine-{number}": Engine(
            clock,
            profile.speed,
            Pool(fleet.kv_tokens // block_tokens, ids),
            block_tokens,
            profile.max_batch_tokens,
            profile.max_num_seqs,
        )
        for number in range(fleet.engines)
    }


def _attach(engines: dict[str, Engine], memory: MemoryTwin, workload: Workload, fleet: Fleet) -> list[MemoryHook]:
    """Give every engine its client of memory, with links of its own to host and back."""
    profile, hooks = fleet.profile, []
    assert fleet.memory is not None
    blocks = page_blocks(workload, profile, fleet.memory)
    for number, (name, engine) in enumerate(engines.items()):
        short = name.removeprefix("http://")
        inward = Lane(Link("host", short, profile.copy_bytes_per_s), engine.clock)
        outward = Lane(Link(short, "host", profile.copy_bytes_per_s), engine.clock)
        page_bytes = blocks * workload.block_tokens * profile.kv_bytes_per_token
        engine.hook = hook = MemoryHook(engine, memory, number + 1, blocks, page_bytes, inward, outward)
        hooks.append(hook)
    return hooks


def _check(engines: dict[str, Engine], gateway: AgentsTwin) -> None:
    """Laws 2 and 8 over everything."""
    gateway.policy.check()
    for engine in engines.values():
        engine.check()
