"""The modelled engine against the embedded one's own scheduler: the same steps, token by token; its pool's books."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import LawBroken
from outrider.lab.clock import Clock
from outrider.lab.engine.blocks import Blocks
from outrider.lab.engine.request import Params, Request
from outrider.lab.engine.scheduler import Scheduler
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.job import Job
from outrider.lab.twins.pool import Pool
from outrider.lab.twins.speed import Speed

BLOCK, BATCH, SEATS = 4, 16, 3


@dataclass(frozen=True)
class Asked:
    """A request of the test: when, what, how long an answer."""

    at_s: float
    prompt: tuple[int, ...]
    outputs: int


@dataclass
class Came:
    """What an engine made of a load: per request the seconds of its first and last token; tokens found in the cache."""

    first_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    own_blocks: list[int] = field(default_factory=list)
    preemptions: int = 0


def answer(number: int, outputs: int) -> list[int]:
    """Tokens that nobody else generates."""
    return [1000 * (number + 1) + at for at in range(outputs)]


def embedded(load: Sequence[Asked], capacity: int) -> Came:
    """The real scheduler; each step takes a second, as `engine.py` runs it."""
    blocks = Blocks(capacity, BLOCK)

    def chain(tokens: Sequence[int]) -> list[bytes]:
        return [repr(tokens[: (at + 1) * BLOCK]).encode() for at in range(len(tokens) // BLOCK)]

    scheduler = Scheduler(blocks, chain, BATCH, SEATS)
    requests = [
        Request(str(number), list(asked.prompt), Params(max_tokens=asked.outputs), lambda out: None)
        for number, asked in enumerate(load)
    ]
    came = Came([0.0] * len(load), [0.0] * len(load), [0] * len(load))
    now, arrived = 0.0, 0
    while True:
        while arrived < len(load) and load[arrived].at_s <= now:
            requests[arrived].arrival = arrived
            scheduler.add(requests[arrived])
            arrived += 1
        plan = scheduler.schedule()
        came.preemptions += len(plan.preempted)
        if not plan.chunks:
            if arrived == len(load):
                break
            now = load[arrived].at_s
            continue
        now += 1.0
        for chunk in plan.chunks:
            request, number = chunk.request, int(chunk.request.id)
            scheduler.advance(request, chunk.count)
            if not chunk.last:
                continue
            if not request.generated:
                came.first_s[number] = now
            request.tokens.append(answer(number, load[number].outputs)[len(request.generated)])
            if len(request.generated) == load[number].outputs:
                came.ended_s[number], came.own_blocks[number] = now, request.own_blocks
                scheduler.remove(request)
        blocks.check()
    assert not scheduler.waiting and not scheduler.running
    return came


def modelled(load: Sequence[Asked], capacity: int) -> Came:
    """The same load through the model, a second a step."""
    names: dict[tuple[int, ...], int] = {}
    chains = []
    for number, asked in enumerate(load):
        tokens = (*asked.prompt, *answer(number, asked.outputs))
        heads = [tokens[: (at + 1) * BLOCK] for at in range(len(tokens) // BLOCK)]
        chains.append(np.array([names.setdefault(head, len(names)) for head in heads], np.int64))
    clock, came = Clock(), Came([0.0] * len(load), [0.0] * len(load), [0] * len(load))
    engine = Engine(clock, Speed(1.0, 0.0, 0.0), Pool(capacity, len(names)), BLOCK, BATCH, SEATS)

    def ask(number: int) -> None:
        def first() -> None:
            came.first_s[number] = clock.now

        def finished() -> None:
            came.ended_s[number], came.own_blocks[number] = clock.now, job.own_blocks
            engine.check()

        job = Job(
            str(number), len(load[number].prompt), load[number].outputs, chains[number], first, finished, cannot_fail
        )
        engine.submit(job)

    for number, asked in enumerate(load):
        clock.at(asked.at_s, lambda number=number: ask(number))
    clock.run()
    engine.check()
    assert engine.pool.held == engine.pool.private == 0
    came.preemptions = engine.preemptions
    return came


def cannot_fail(kind: str, why: str) -> None:
    raise AssertionError(f"{kind}: {why}")


prompts = st.builds(
    lambda stem, length, tail: (*range(stem, stem + length), *tail),
    st.sampled_from((0, 0, 100)),  # two beginnings that requests share
    st.integers(0, 20),
    st.lists(st.integers(500, 503), min_size=1, max_size=8),
)
loads = st.lists(st.tuples(st.integers(0, 6), prompts, st.integers(1, 14)), min_size=1, max_size=7).map(
    lambda drawn: tuple(
        Asked(sum(d[0] for d in drawn[: at + 1]) + 0.01 * at + 0.3, one[1], one[2]) for at, one in enumerate(drawn)
    )
)


@settings(max_examples=300, deadline=None)
@given(load=loads, spare=st.integers(0, 12))
def test_the_model_takes_the_embedded_engines_steps(load: tuple[Asked, ...], spare: int) -> None:
    """First and last token of every request in the same step, the same blocks reused, the same preemptions."""
    largest = max(-(-(len(asked.prompt) + asked.outputs) // BLOCK) for asked in load)
    capacity = largest + spare
    assert modelled(load, capacity) == embedded(load, capacity)


def test_preemptions_do_occur_in_both() -> None:
    """The law above says something about them."""
    load = tuple(Asked(0.1 * (at + 1), tuple(range(50 * at, 50 * at + 12)), 12) for at in range(3))
    ours, theirs = modelled(load, 12), embedded(load, 12)
    assert ours == theirs
    assert ours.preemptions > 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_pool_keeps_the_books_of_blocks(data: st.DataObject) -> None:
    """Chains held, released, taken and named in any order: the same blocks are here as in the real books (law 2)."""
    capacity = 8
    real, pool = Blocks(capacity, BLOCK), Pool(capacity, 40)
    held: list[tuple[list[int], np.ndarray]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        chain = np.arange(start := 10 * data.draw(st.integers(0, 3)), start + data.draw(st.integers(1, 5)))
        keys = [str(block).encode() for block in chain.tolist()]
        if held and data.draw(st.booleans()):
            blocks, ids = held.pop(data.draw(st.integers(0, len(held) - 1)))
            real.release(blocks)
            pool.release(ids)
        else:
            here = real.match(keys)
            assert len(here) == pool.match(chain)
            real.hold(here)
            pool.hold(chain[: len(here)])
            missing = len(chain) - len(here)
            if missing > len(real.free):
                assert missing > pool.available
                real.release(here)
                pool.release(chain[: len(here)])
                continue
            fresh = real.take(missing)
            pool.take(missing)
            named = [real.name(block, key) for block, key in zip(fresh, keys[len(here) :], strict=True)]
            pool.name(chain[len(here) :])
            held.append((here + named, chain))
        pool.check()
        real.check()
        assert pool.available == len(real.free)
        for number in range(40):
            assert pool.match(np.array([number])) == len(real.match([str(number).encode()]))


def test_more_than_the_pool_holds_is_a_broken_law() -> None:
    with pytest.raises(LawBroken, match="LawBroken 2: 1 KV blocks more were taken than 4 hold"):
        Pool(4, 0).take(5)


def test_lost_tokens_are_a_broken_law_with_the_requests_story() -> None:
    clock = Clock()
    engine = Engine(clock, Speed(1.0, 0.0, 0.0), Pool(8, 0), BLOCK, BATCH, SEATS)
    job = Job("odd", 9, 3, np.zeros(0, np.int64), lambda: None, lambda: None, cannot_fail)
    engine.submit(job)
    clock.run(until_s=1.5)
    job.passed -= 1
    with pytest.raises(LawBroken, match=r"request odd: tokens do not add up .* Story: prompt 9"):
        clock.run()


def test_a_killed_engine_breaks_what_is_open_and_refuses_what_comes() -> None:
    clock, ends = Clock(), list[str]()
    engine = Engine(clock, Speed(1.0, 0.0, 0.0), Pool(8, 0), BLOCK, BATCH, SEATS)
    for name in ("a", "b"):
        job = Job(name, 9, 30, np.zeros(0, np.int64), lambda: None, lambda: None, lambda kind, why: ends.append(kind))
        clock.at(1.0 if name == "a" else 4.0, lambda job=job: engine.submit(job))
    clock.at(3.5, engine.kill)
    clock.run()
    assert ends == ["reset", "refused"]
    assert engine.pool.private == engine.pool.held == 0
