"""The scheduler against random traffic: budget and seats kept, order kept, everybody finishes, nothing is left held."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.lab.engine.blocks import Blocks
from outrider.lab.engine.request import Params, Request
from outrider.lab.engine.scheduler import Scheduler
from outrider.memory.keys import KeySpace

BLOCK_TOKENS = 4
CHAIN = KeySpace(model="m", dtype="float32", layout="l", block_tokens=BLOCK_TOKENS).chain


def a_request(prompt: Sequence[int], count: int, priority: int = 0, arrival: int = 0) -> Request:
    request = Request(f"r{arrival}", list(prompt), Params(count), lambda out: None, priority)
    request.arrival = arrival
    return request


CALLS = st.lists(
    st.tuples(
        st.integers(1, 30).flatmap(lambda n: st.sampled_from([[1] * n, [2] * n, [1] * (n // 2) + [3] * (n - n // 2)])),
        st.integers(1, 12),  # tokens to generate
        st.integers(-1, 1),  # priority
        st.integers(0, 20),  # step of arrival
        st.integers(0, 3),  # blocks that memory offers
        st.integers(0, 3),  # how many of them arrive
        st.one_of(st.none(), st.integers(0, 30)),  # step of abort
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.integers(3, 12), st.integers(1, 3), st.integers(11, 16))
def test_random_traffic(calls: list[tuple], budget: int, seats: int, capacity: int) -> None:
    blocks = Blocks(capacity, BLOCK_TOKENS)
    scheduler = Scheduler(blocks, CHAIN, budget, seats)
    requests = [a_request(prompt, count, priority, i) for i, (prompt, count, priority, *_) in enumerate(calls)]
    done: dict[Request, int] = {}
    loads: list[tuple[int, Request, int]] = []  # (step at which it ends, request, blocks asked)
    work = sum(len(prompt) + count for prompt, count, *_ in calls)
    for step in range(60 + 12 * work):
        for request, (_, _, _, arrives, offered, _, aborts) in zip(requests, calls, strict=True):
            if arrives == step:
                request.external = offered
                scheduler.add(request)
            here = request in scheduler.waiting or request in scheduler.running
            if aborts is not None and step >= aborts and here:
                scheduler.remove(request)
                done[request] = step
        for load in [load for load in loads if load[0] <= step]:
            loads.remove(load)
            _, request, asked = load
            scheduler.loaded(request, min(asked, calls[request.arrival][5]))
        head = scheduler.running[:1]
        plan = scheduler.schedule()
        for request in plan.loads:
            start = request.computed // BLOCK_TOKENS
            loads.append((step + 3, request, min(request.external or 0, scheduler.reusable(request)) - start))
        assert sum(chunk.count for chunk in plan.chunks) <= budget
        assert len(scheduler.running) + len(scheduler.loading) <= seats
        assert len({chunk.request for chunk in plan.chunks}) == len(plan.chunks)
        assert scheduler.running == sorted(scheduler.running, key=lambda r: r.order)
        assert not head or loads or head[0] in [chunk.request for chunk in plan.chunks], "the first always moves on"
        for chunk in plan.chunks:
            assert chunk.start == chunk.request.computed
            assert len(chunk.request.blocks) * BLOCK_TOKENS >= chunk.start + chunk.count
            scheduler.advance(chunk.request, chunk.count)
            if chunk.last:
                chunk.request.tokens.append(7)
                if len(chunk.request.generated) == chunk.request.params.max_tokens:
                    scheduler.remove(chunk.request)
                    done[chunk.request] = step
        blocks.check()
        if len(done) == len(requests) and not loads:
            break
    assert len(done) == len(requests), f"starved: {[r.id for r in requests if r not in done]}"
    assert len(blocks.free) == capacity
    assert not scheduler.loading


def test_decodes_go_before_prompts() -> None:
    scheduler = Scheduler(Blocks(64, BLOCK_TOKENS), CHAIN, 8, 4)
    first, second = a_request([1] * 4, 9, arrival=1), a_request([2] * 40, 9, priority=-1, arrival=2)
    scheduler.add(first)
    for chunk in scheduler.schedule().chunks:
        scheduler.advance(chunk.request, chunk.count)
        chunk.request.tokens.append(7)
    scheduler.add(second)
    counts = [(chunk.request, chunk.count) for chunk in scheduler.schedule().chunks]
    assert counts == [(first, 1), (second, 7)]


def test_priority_orders_and_arrival_breaks_ties() -> None:
    scheduler = Scheduler(Blocks(64, BLOCK_TOKENS), CHAIN, 100, 8)
    late, soon, sooner = a_request([1], 1, 5, 0), a_request([2], 1, 0, 2), a_request([3], 1, 0, 1)
    for request in (late, soon, sooner):
        scheduler.add(request)
    assert [chunk.request for chunk in scheduler.schedule().chunks] == [sooner, soon, late]


def test_shortage_takes_from_the_last_in_order() -> None:
    scheduler = Scheduler(Blocks(4, BLOCK_TOKENS), CHAIN, 100, 4)
    urgent, patient = a_request([1] * 7, 8, -1, 1), a_request([2] * 4, 4, 0, 0)
    for request in (patient, urgent):
        scheduler.add(request)
    preempted = []
    for _ in range(6):
        plan = scheduler.schedule()
        preempted += plan.preempted
        for chunk in plan.chunks:
            scheduler.advance(chunk.request, chunk.count)
            chunk.request.tokens += [7] * chunk.last
    assert preempted == [patient]
    assert len(urgent.generated) > len(patient.generated)


def test_the_same_prefix_is_computed_once() -> None:
    scheduler = Scheduler(Blocks(64, BLOCK_TOKENS), CHAIN, 8, 4)
    first, second = a_request([1] * 21, 2, arrival=0), a_request([1] * 20 + [5], 2, arrival=1)
    for request in (first, second):
        scheduler.add(request)
    computed = {first: 0, second: 0}
    while not second.generated:
        for chunk in scheduler.schedule().chunks:
            computed[chunk.request] += chunk.count
            scheduler.advance(chunk.request, chunk.count)
            chunk.request.tokens += [7] * chunk.last
    assert computed[second] == 1
    assert second.own_blocks == 5


def test_one_token_is_always_left_to_compute() -> None:
    scheduler = Scheduler(Blocks(64, BLOCK_TOKENS), CHAIN, 100, 4)
    for arrival in range(2):
        request = a_request([1] * 8, 1, arrival=arrival)
        scheduler.add(request)
        (chunk,) = scheduler.schedule().chunks
        assert chunk.count == (8, 4)[arrival]
        scheduler.advance(request, chunk.count)
        scheduler.remove(request)
