"""The twin of experts: by hand where that can be done, by laws, and line by line against the live mover. Simulated."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from started import run_ranks

from outrider import journal, stack
from outrider.errors import LawBroken
from outrider.experts import Policy, Settings, contiguous_homes
from outrider.experts.cost import PASSES, Cost, Links, Shape, modelled
from outrider.experts.events import (
    DIRECT,
    HOST,
    RETURN,
    Began,
    Carry,
    Command,
    Event,
    Finished,
    Foreseen,
    Gated,
    Planned,
    Ran,
)
from outrider.experts.exchange import HOST_ROUND_BYTES
from outrider.experts.schedule import StepPlan, assemble, with_homes
from outrider.lab.clock import Clock
from outrider.lab.twins.experts import ExpertsTwin
from outrider.lab.twins.ranks import Host, Lanes, Link, Outcome, Timed, divided, work

# A token-slot computes 1 s and an expert is 12 bytes: 3 s near, 6 s far, and 0.5 s latency.
COST = Cost(Links(4.0, 2.0, 0.5), Shape(2, 1), 12.0, tile_rows=1, launch_s=0.0, shared_links=False)
UPDATES = [("update", 0), ("update", 1)]


def plan_of(rows_M: Any, homes: Any, ranks: int) -> StepPlan:
    """rows (layer, expert, source, rank, tokens) of each micro-step; homes [layers, experts]."""
    homes_LE = np.array(homes)
    hosts = []
    for rows in rows_M:
        copies = np.full((len(homes_LE), ranks, homes_LE.shape[1]), -1)
        for layer, expert, _, rank, _ in rows:
            if homes_LE[layer, expert] != rank:
                copies[layer, rank, expert] = expert
        hosts.append(with_homes(homes_LE, copies))
    rows_of = [np.array(sorted(rows), dtype=np.int64).reshape(-1, 5) for rows in rows_M]
    return assemble("by hand", homes_LE, hosts, rows_of, ranks_per_node=ranks)


def one_layer(rows_M: Any, passes: Any, cost: Cost = COST, **more: Any) -> Outcome:
    """Two ranks of one slot; `more` goes to the twin, or to the settings."""
    own = {name: more.pop(name) for name in ("host", "overlap") if name in more}
    experts = 2 * len(rows_M)
    twin = ExpertsTwin(Policy(Settings(1, experts, 2, 1, **more)), cost, Clock(), **own)
    twin.run(twin.step(plan_of(rows_M, [contiguous_homes(experts, 2)], 2), passes))
    assert twin.outcome.compute_s + twin.outcome.exposed_s == twin.outcome.seconds
    return twin.outcome


# -- by hand: two ranks, all tokens are rank 0's and stay there; some are for an expert of rank 1, so that it is copied

ONE = [[(0, 0, 0, 0, 10), (0, 1, 0, 0, 4)]]
TWO = [[(0, 0, 0, 0, 10), (0, 2, 0, 0, 4)], [(0, 0, 0, 0, 10), (0, 3, 0, 0, 4)]]  # expert 2, then 3


def test_a_copy_is_waited_for_and_its_gradient_brought_home() -> None:
    """Nothing hides the first copy: 0.5 + 12 / 4. Forward 14, backward 28. The gradient in fp32: 0.5 + 24 / 4."""
    found = one_layer(ONE, [("update", 0)])
    assert found.passes == [Timed("update", 0, 3.5 + 42, 42.0, [3.5, 0.0])]
    assert (found.before_s, found.after_s, found.seconds) == (0.0, 6.5, 3.5 + 42 + 6.5)
    assert found.by_path == {"weights, rank to rank": 12, "gradients": 24}
    assert found.sent_bytes == [24, 12]
    assert found.lane_s == [10.0, 10.0]
    assert (found.frames, found.gradients, found.copies, found.batches) == (1, 1, 1, 2)


def test_between_nodes_the_far_link_counts() -> None:
    found = one_layer(ONE, [("update", 0)], ranks_per_node=1)
    assert (found.passes[0].exposed_s, found.after_s) == ([0.5 + 12 / 2, 0.0], 0.5 + 24 / 2)


def test_out_of_host_memory() -> None:
    """Put there at 3 bytes/s, then pulled."""
    found = one_layer(ONE, [("recompute", 0)], host=Host(3.0), recompute="host")
    assert (found.before_s, found.passes[0].exposed_s, found.after_s) == (4.0, [0.5 + 4], 0.0)
    assert found.lane_s == [0.5 + 4, 4.0], "a pull needs no sender"
    across = one_layer(ONE, [("recompute", 0)], host=Host(3.0), recompute="host", ranks_per_node=1)
    assert across.before_s == 0.5 + 12 / 2 + 4, "first to the node that pulls it"


def test_ranks_of_a_node_share_its_memory() -> None:
    """12 and 24 bytes at 6 bytes/s: 3 each until the first has its 12, then 6; the third is alone in its node."""
    host = Host(5.0, 6.0)
    assert host.pulls_s(np.array([12, 24, 24]), np.array([0, 0, 1])).tolist() == [4.0, 6.0, 24 / 5]
    assert Host(5.0).pulls_s(np.array([12, 24, 24]), np.array([0, 0, 1])).tolist() == [2.4, 4.8, 4.8]


def test_the_next_micro_step_is_fetched_ahead_where_there_is_a_frame() -> None:
    """Two frames: both copies come at once, one after the other; the first gradient goes home behind the second."""
    found = one_layer(TWO, UPDATES)
    assert [one.exposed_s for one in found.passes] == [[3.5, 0.0], [0.0, 0.0]]
    assert found.after_s == 0.5 + 24 / 4
    assert (found.frames, found.gradients, found.batches) == (2, 1, 4)


def test_one_frame_is_emptied_before_it_is_filled() -> None:
    found = one_layer(TWO, UPDATES, ring=1)
    assert [one.exposed_s for one in found.passes] == [[3.5, 0.0], [6.5 + 3.5, 0.0]]
    assert found.after_s == 6.5
    assert (found.frames, found.gradients) == (1, 1)


def test_large_exchanges_go_in_rounds() -> None:
    """Both gradients in one exchange, 48 MB each: a round for each, and so a latency for each."""
    shape = Shape(2, 2_000_000)
    cost = msgspec.structs.replace(COST, shape=shape, flop_s=12.0 * 2_000_000)
    both = [(0, 0, 0, 0, 10), (0, 2, 0, 0, 4), (0, 3, 0, 0, 4)]
    found = one_layer([both, []], [("update", 0)], cost, host=Host(round_bytes=HOST_ROUND_BYTES))
    assert 2 * shape.expert_bytes > HOST_ROUND_BYTES
    assert found.after_s == 2 * (0.5 + 2 * shape.expert_bytes / 4)


def test_without_overlap_a_turn_waits_for_all_that_is_under_way() -> None:
    found = one_layer(TWO, UPDATES, overlap=False)
    assert [one.exposed_s for one in found.passes] == [[7.0, 0.0], [6.5, 0.0]]


def test_masters_that_change_homes_take_their_state_along() -> None:
    twin = ExpertsTwin(Policy(Settings(1, 2, 2, 0)), COST, Clock())
    twin.run(twin.step(plan_of([[(0, 0, 1, 1, 10), (0, 1, 0, 0, 4)]], [[1, 0]], 2), [("update", 0)]))
    assert twin.outcome.before_s == 0.5 + 3 * 12 / 4
    assert twin.outcome.seconds == twin.outcome.before_s + 30


@pytest.mark.parametrize(("shared", "exposed_s"), [(True, 6.0), (False, 0.0)])
def test_tokens_go_first_where_links_are_shared(shared: bool, exposed_s: float) -> None:
    """Layer 0: 6 token-slots on rank 0, one of them rank 1's, 8 s on both ranks' links, 4 before and 4 after the 6 s.

    The copy for layer 1 takes 12 s of the links from 0.5 on: on rank 0 from 4 to 10 and again from 14, on rank 1,
    which computes nothing, from 8: it ends at 20, where the turn did at 14. Alone on its links it ends at 12.5.
    """
    cost = msgspec.structs.replace(COST, links=Links(1.0, 0.5, 0.5), shared_links=shared)
    rows = [(0, 0, 0, 0, 5), (0, 0, 1, 0, 1), (1, 1, 0, 0, 4)]
    twin = ExpertsTwin(Policy(Settings(2, 2, 2, 1)), cost, Clock())
    twin.run(twin.step(plan_of([rows], [[0, 1], [0, 1]], 2), [("recompute", 0)]))
    assert twin.outcome.passes == [Timed("recompute", 0, 18 + exposed_s, 18.0, [0.0, exposed_s])]


def test_nobody_foresaw_it() -> None:
    """Each layer asks when its gate has decided, and waits: 12 token-slots of expert 0 are split, half go to rank 1."""
    cost = msgspec.structs.replace(COST, links=Links(1e9, 1e9, 0.5))
    twin = ExpertsTwin(Policy(Settings(1, 2, 2, 1)), cost, Clock())
    twin.begin()
    twin.run(twin.react("update", np.array([[[6, 0], [6, 0]]])))
    twin.run(twin.finish())
    assert twin.outcome.passes[0].seconds == pytest.approx(0.5 + 6 + 12)
    assert twin.clock.now == pytest.approx(0.5 + 6 + 12 + 0.5)


# -- laws, on any load, ring, paths and order of passes

LAYERS, EXPERTS, RANKS, SLOTS = 3, 8, 3, 2


def loads(rng: np.random.Generator, batches: int) -> Any:
    heat = rng.pareto(0.8, (batches, LAYERS, 1, EXPERTS)).clip(max=50) * 4
    return rng.poisson(heat, (batches, LAYERS, RANKS, EXPERTS)).astype(np.int64)


def orders(rng: np.random.Generator, batches: int) -> list[Any]:
    """Recompute, then updates, or up to three micro-batches in flight."""
    passes: list[Any] = [("recompute", m) for m in range(batches)]
    if rng.random() < 0.5:
        return passes + [("update", m) for m in range(batches)]
    flying: list[int] = []
    ahead = 0
    while ahead < batches or flying:
        if ahead < batches and (not flying or (len(flying) < 3 and rng.random() < 0.6)):
            passes.append(("forward", ahead))
            flying.append(ahead)
            ahead += 1
        else:
            passes.append(("backward", flying.pop(0)))
    return passes


class Told(Policy):
    """Keeps the batches that it commands: (kind, rows [layer, expert, src, dst, frame])."""

    def __init__(self, shape: Settings) -> None:
        super().__init__(shape)
        self.batches: list[tuple[int, Any]] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        commands = super().handle(event, now)
        for rows in (command.rows.tolist() for command in commands if isinstance(command, Carry)):
            self.batches += [
                (kind, [row[3:] for row in some])
                for (_, _, kind), some in groupby(rows, key=lambda row: row[:3])
                if kind in (RETURN, DIRECT, HOST)
            ]
        return commands


@st.composite
def shapes(draw: st.DrawFn) -> Settings:
    recompute, update = (draw(st.sampled_from(["direct", "host"])) for _ in range(2))
    ring, node = draw(st.integers(0, LAYERS + 1)), draw(st.sampled_from([0, 1]))
    return Settings(LAYERS, EXPERTS, RANKS, SLOTS, ring, node, recompute, update)


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    """From links that are nothing beside compute to links beside which compute is nothing."""
    near, far = (10.0 ** draw(st.floats(0, 3)) for _ in range(2))
    return msgspec.structs.replace(COST, links=Links(near, far, draw(st.floats(0, 5))), launch_s=0.25, tile_rows=4)


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    return Host(10.0 ** draw(st.floats(0, 3)), draw(st.sampled_from([0.0, 10.0, 100.0])))


seeds = st.integers(0, 2**32 - 1)


def simulated(seed: int, shape: Settings, cost: Cost, host: Host, **more: Any) -> ExpertsTwin:
    """Two RL steps; the second's micro-batches turn out to send something else than was foreseen."""
    rng = np.random.default_rng(seed)
    twin = ExpertsTwin(Told(shape), cost, Clock(), host, timeline=True, **more)
    for step in range(2):
        batches = int(rng.integers(1, 4))
        passes, counts = orders(rng, batches), loads(rng, batches)
        told = passes if rng.random() < 0.8 else passes[::-1] if rng.random() < 0.5 else ()
        if told and told[0][0] == "backward":
            told = ()
        twin.run(foreseen(twin, counts, told, passes, loads(rng, batches) if step else None))
    return twin


def foreseen(twin: ExpertsTwin, counts: Any, told: Any, passes: Any, seen: Any) -> Any:
    """As `step`, but what is told of the order of passes need not be so."""
    began_s = twin.clock.now
    yield from twin.foresee(counts, told)
    twin.seen_MLRE, twin.outcome.before_s = seen, twin.clock.now - began_s
    for stage, batch in passes:
        yield from twin.micro_step(stage, batch)
    yield from twin.finish()
    twin.outcome.seconds = twin.clock.now - began_s


@given(seeds, shapes(), costs(), hosts(), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_no_rank_waits_for_ever_and_every_gradient_comes_home(
    seed: int, shape: Settings, cost: Cost, host: Host, shared: bool, overlap: bool
) -> None:
    """Weights, gradients and deadlock are checked by the twin itself; bytes are those of the commands; law 10."""
    cost = msgspec.structs.replace(cost, shared_links=shared)
    twin, again = (simulated(seed, shape, cost, host, overlap=overlap) for _ in range(2))
    assert msgspec.json.encode((twin.outcome, twin.spans)) == msgspec.json.encode((again.outcome, again.spans))
    assert all(one.compute_s + sum(one.exposed_s) <= one.seconds * (1 + 1e-9) for one in twin.outcome.passes)
    assert twin.spans is not None and isinstance(twin.policy, Told)
    carried = [
        sum(what == span.what for span in spans)
        for what in ("gradients", "weights, rank to rank")
        for spans in twin.spans
    ]
    exchanges = [sum(one == kind for one, _ in twin.policy.batches) for kind in (RETURN, DIRECT) for _ in range(RANKS)]
    assert carried == exchanges, "each exchange, once, on every rank"


@given(seeds, shapes(), costs(), hosts())
@settings(max_examples=25, deadline=None)
def test_never_faster_than_compute_nor_slower_than_one_after_another(
    seed: int, shape: Settings, cost: Cost, host: Host
) -> None:
    rng = np.random.default_rng(seed)
    policy = Told(shape)
    twin = ExpertsTwin(policy, cost, Clock(), host)
    twin.run(twin.step(loads(rng, 3), orders(rng, 3)))
    found, size = twin.outcome, cost.shape.expert_bytes
    serial_s = found.before_s
    for kind, rows in policy.batches:
        if kind == HOST:
            pulled = size * np.bincount([row[3] for row in rows], minlength=RANKS)
            serial_s += cost.links.latency_s + float(host.pulls_s(pulled, shape.nodes).max())
        else:
            hops = [(src, dst, layer, expert) for layer, expert, src, dst, _ in rows]
            parts = twin.lanes.parts(hops, size * (2 if kind == RETURN else 1))
            serial_s += cost.links.latency_s + max(seconds for _, seconds in parts)
    assert found.compute_s <= found.seconds * (1 + 1e-9)
    assert found.seconds <= (found.compute_s + serial_s) * (1 + 1e-9)
    carried = sum(len(rows) * (2 if kind == RETURN else 1) for kind, rows in policy.batches) * size
    assert carried == sum(n for what, n in found.by_path.items() if what != "weights into shared memory")


@given(seeds, shapes(), costs(), hosts(), st.lists(st.floats(1, 4), min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_faster_links_never_make_the_same_plan_slower(
    seed: int, shape: Settings, cost: Cost, host: Host, times: list[float]
) -> None:
    """Every lane keeps its order, so that what ends earlier delays nothing: no anomaly of scheduling (Graham's).

    Not claimed where tokens share the links: a turn that begins earlier may bring its tokens between a copy.
    """
    near, far, latency, own, node = times
    links = Links(cost.links.near_bytes_s * near, cost.links.far_bytes_s * far, cost.links.latency_s / latency)
    faster = msgspec.structs.replace(cost, links=links)
    quick = Host(host.bytes_s * own, host.node_bytes_s * node)
    slow_s, fast_s = (simulated(seed, shape, one, beside).clock.now for one, beside in ((cost, host), (faster, quick)))
    assert fast_s <= slow_s * (1 + 1e-9)


@given(seeds, st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_turn_takes_what_the_cost_model_says(seed: int, node: int, tiles: bool) -> None:
    rng = np.random.default_rng(seed)
    counts = loads(rng, 2)
    cost = Cost(Links(7.0, 3.0, 0.5), Shape(2, 1), 12.0, tile_rows=4 if tiles else 1, launch_s=0.25, row_scale=3)
    shape = Settings(LAYERS, EXPERTS, RANKS, SLOTS, ranks_per_node=node)
    policy = Policy(shape)
    policy.handle(Foreseen(counts), 0)
    quotas = [policy.handle(Began("update", m), 0)[-1].quotas for m in range(2)]
    plan = plan_of([rows.tolist() for rows in quotas], policy.homes_LE, RANKS)
    plan = msgspec.structs.replace(plan, ranks_per_node=node)
    for m, rows in enumerate(quotas):
        assert divided(rows, counts[m], policy.homes_LE).tolist() == rows.tolist(), "all came as foreseen"
        mine = work(rows, counts[m], policy.homes_LE, shape.nodes, cost)
        assert mine.forward_s == pytest.approx(modelled(plan, cost).rank_s[:, m])
        assert (mine.load_LE == counts[m].sum(axis=1)).all()
    bare = ExpertsTwin(Policy(msgspec.structs.replace(shape, slots=0)), cost, Clock())
    passes = [("recompute", m) for m in range(2)] + UPDATES
    bare.run(bare.step(counts, passes))
    at_home = plan_of(
        [np.column_stack(some).tolist() for some in at_homes(counts, policy.homes_LE)], policy.homes_LE, RANKS
    )
    at_home = msgspec.structs.replace(at_home, ranks_per_node=node)
    assert bare.outcome.seconds == pytest.approx(modelled(at_home, cost).total_s), "without copies the two are one"
    assert PASSES == 4


def at_homes(counts: Any, homes_LE: Any) -> Any:
    for counts_LRE in counts:
        layer, source, expert = np.nonzero(counts_LRE)
        yield layer, expert, source, homes_LE[layer, expert], counts_LRE[layer, source, expert]


@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 3)), max_size=6), st.floats(0, 9), st.floats(0.01, 9))
@settings(max_examples=50, deadline=None)
def test_what_a_link_carries_stands_still_under_tokens(
    spans: list[tuple[float, float]], start_s: float, seconds: float
) -> None:
    """Tokens are named as their turns begin; it ends when so many seconds without tokens have passed."""
    clock = Clock()
    link, ended = Link(clock), []
    clock.at(start_s, lambda: link.carry(seconds, lambda: ended.append(clock.now)))
    at_s, taken = 0.0, []
    for gap_s, long_s in spans:
        at_s += gap_s
        taken.append((at_s, at_s + long_s))
        clock.at(at_s - gap_s / 2, lambda span=taken[-1]: link.take([span]))
        at_s += long_s
    clock.run()
    free_s = (ended[0] - start_s) - sum(max(0.0, min(e, ended[0]) - max(b, start_s)) for b, e in taken)
    assert free_s == pytest.approx(seconds, abs=1e-9)


def test_what_goes_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws above can fail: a gradient that is not carried, a copy that comes late, a rank that stays away."""
    rng = np.random.default_rng(5)
    counts, passes = loads(rng, 2), [("update", 0), ("update", 1)]
    shape = Settings(LAYERS, EXPERTS, RANKS, SLOTS, ring=2)

    def run() -> None:
        twin = ExpertsTwin(Policy(shape), COST, Clock())
        twin.run(twin.step(counts, passes))

    run()
    queue = ExpertsTwin._queue
    for lost in (RETURN, DIRECT):
        monkeypatch.setattr(ExpertsTwin, "_queue", lambda t, rows, k=lost: queue(t, rows[rows[:, 2] != k]))
        with pytest.raises(LawBroken) as broken:
            run()
        assert broken.value.law == 6
    monkeypatch.setattr(ExpertsTwin, "_queue", queue)
    exchange = Lanes.exchange
    monkeypatch.setattr(Lanes, "exchange", lambda lanes, rank, *rest: rank == 1 or exchange(lanes, rank, *rest))
    with pytest.raises(LawBroken, match="wait for what never comes"):
        run()
    monkeypatch.setattr(Lanes, "exchange", exchange)
    monkeypatch.setattr(Lanes, "wait", lambda lanes, rank, ticket, layer, do: do())
    with pytest.raises(LawBroken) as broken:
        run()
    assert broken.value.law in (4, 6)


# -- against the live mover

CASES = (
    "all layers, direct",
    "ring of 2, host",
    "ring of 1, mixed",
    "out of order",
    "wrong",
    "planned",
    "not foreseen",
)


def replayed(live: Path, own: Path) -> ExpertsTwin:
    """What live was told, told to a twin. What micro-batches turned out to send is the world's; the rest is its own."""
    shape = journal.settings(live, Settings)
    twin = ExpertsTwin(Policy(shape), Cost(Links(4.0, 2.0, 0.5), Shape(4, 3, width=8)), Clock(), timeline=True,
                       journal=journal.Journal(own, "experts", shape, int(own.stem[-1])))  # fmt: skip
    lines = [event for _, event, _ in journal.told(live, Event, Command)]
    ends = [n for n, event in enumerate(lines) if isinstance(event, Finished)]
    totals = Outcome([], [0] * len(twin.ranks))
    for begin, end in zip([0, *(n + 1 for n in ends)], ends, strict=False):
        twin.run(flow_of(twin, lines[begin : end + 1]))
        for name in ("copies", "unforeseen", "absent"):
            setattr(totals, name, getattr(totals, name) + getattr(twin.outcome, name))
        totals.sent_bytes = [a + b for a, b in zip(totals.sent_bytes, twin.outcome.sent_bytes, strict=True)]
    twin.close()
    assert len(ends) == 2
    twin.lanes.outcome = totals
    return twin


def flow_of(twin: ExpertsTwin, events: list[Event]) -> Any:
    first = events[0]
    seen = {event.batch: event.seen_LRE for event in events if isinstance(event, Ran)}
    if isinstance(first, Foreseen):
        yield from twin.foresee(first.counts_MLRE, first.passes)
        twin.seen_MLRE = np.stack([seen[m] for m in range(len(first.counts_MLRE))])
    elif isinstance(first, Planned):
        rows = [first.quota[first.quota[:, 1] == m][:, [0, 3, 2, 4, 5]] for m in range(first.most_LM.shape[1])]
        yield from twin.foresee(
            plan_of([some.tolist() for some in rows], first.homes_LE, len(twin.ranks)), first.passes
        )
        twin.seen_MLRE = np.stack([seen[m] for m in range(len(rows))])
    else:
        twin.begin()
    gates = [event for event in events if isinstance(event, Gated)]
    layers = len(twin.layers)
    for n in range(0, len(gates), layers):
        yield from twin.react(gates[n].stage, np.stack([gate.counts_RE for gate in gates[n : n + layers]]))
    for event in events:
        if isinstance(event, Began):
            yield from twin.micro_step(event.stage, event.batch)
    yield from twin.finish()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Journals of two gloo ranks, see experts_ranks.py."""
    directory = tmp_path_factory.mktemp("live")
    run_ranks(directory, Path(__file__).with_name("experts_ranks.py"), 2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_twin_writes_the_live_journals_again(
    case: str, live: Path, same_lines: Callable[[Path, Path], int], tmp_path: Path
) -> None:
    """Every line, for both ranks; and copies, bytes, and the order of turns and transfers are the live mover's."""
    for rank in range(2):
        own = tmp_path / f"twin-{rank}.jsonl"
        twin = replayed(live / f"{case}-{rank}.jsonl", own)
        assert same_lines(live / f"{case}-{rank}.jsonl", own) >= 16
        assert stack.replay(own)[1] is None
        told = json.loads((live / f"{case}-{rank}.json").read_text())
        found = twin.outcome
        assert (found.copies, found.unforeseen, found.absent) == (told["copies"], told["unforeseen"], told["absent"])
        assert found.copies > 0, "nothing moved, nothing proven"
        assert found.sent_bytes[rank] == told["sent_bytes"]
        assert twin.spans is not None
        lane = [
            [span.what, span.layer] for span in twin.spans[rank] if span.what not in ("wait", "forward", "backward")
        ]
        compute = [[span.what, span.layer] for span in twin.spans[rank] if span.what in ("wait", "forward", "backward")]
        assert lane == told["lane"]
        assert compute == told["compute"]
