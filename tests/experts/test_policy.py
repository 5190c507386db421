"""The policy as a machine: what is needed is there in time, gradients go home once, equal events, equal commands."""

from itertools import cycle
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import Policy, Settings
from outrider.experts.events import (
    CANCEL,
    DIRECT,
    HOST,
    RETURN,
    WANT,
    Began,
    Carry,
    Finished,
    Foreseen,
    Gated,
    Planned,
    Ran,
    Release,
    Relocate,
    Share,
    Tally,
    Use,
    UseLayer,
)
from outrider.experts.frames import Copy, carry
from outrider.experts.schedule import assemble
from outrider.journal import array_digest

LAYERS, EXPERTS, RANKS, SLOTS = 3, 8, 3, 2
SHAPE = Settings(layers=LAYERS, experts=EXPERTS, ranks=RANKS, slots=SLOTS)


WHOLE = ["update", "recompute"]  # passes that are no half of one
EARLIEST, LATEST = [10**9], [0]  # paces of a lane


class Transfer:
    """A row of a Carry, and the copy that it brings."""

    def __init__(self, row: list[int]) -> None:
        self.after, self.by, self.kind, self.layer, self.expert, self.src, self.dst, self.frame = row
        self.copy = Copy(self.layer, self.expert, self.frame)


class Shadow:
    """Frames of all ranks, kept from Carry rows alone, with a lane as fast or slow as it may be.

    pace: how many transfers the lane gets done at each of its chances, over and over. What a visit waits for is done
    when the visit begins, however slow the lane is.
    """

    def __init__(self, shape: Settings, pace: list[int]) -> None:
        self.shape, self.pace = shape, cycle(pace)
        self.homes = np.tile(np.sort(np.arange(EXPERTS) % RANKS), (LAYERS, 1))
        self.frames: dict[tuple[int, int], Copy] = {}  # (rank, frame): what is there
        self.newest: dict[tuple[int, int, int], Copy] = {}  # rank, layer, expert: planned last
        self.owed: set[tuple[int, int, int]] = set()  # rank, layer, expert
        self.used: set[tuple[int, int]] = set()  # (rank, frame) in the visit under way
        self.last_use: dict[tuple[int, int], int] = {}  # (rank, frame): visit
        self.pending: list[Transfer] = []  # they may not start yet
        self.lane: list[Transfer] = []  # they may, and are not carried yet
        self.over, self.returned, self.fetched, self.cancelled, self.wanted = -1, 0, 0, 0, 0
        self.shared: set[tuple[int, int, int]] = set()  # node, layer, expert

    def take(self, rows: Any) -> None:
        assert rows.tolist() == sorted(rows.tolist()), "the order of rows is not that of their columns"
        for one in map(Transfer, rows.tolist()):
            assert one.after < one.by, "compute would wait for what starts only after it"
            page = one.dst, one.layer, one.expert
            if one.kind in (CANCEL, WANT):
                self.newest[page].turn("cancel" if one.kind == CANCEL else "want")
                self.cancelled += one.kind == CANCEL
                self.wanted += one.kind == WANT
                continue
            if one.kind != RETURN:
                self.newest[page] = one.copy
            self.pending.append(one)
        self.start()

    def start(self) -> None:
        """Put on the lane what may start by now."""
        assert self.pending == sorted(self.pending, key=lambda one: one.after), "what comes later may start earlier"
        while self.pending and self.pending[0].after <= self.over:
            self.lane.append(self.pending.pop(0))

    def carry(self, some: int) -> None:
        """The lane does so many transfers, in order; each is judged at the time at which it happens."""
        for _ in range(min(some, len(self.lane))):
            one = self.lane.pop(0)
            if one.kind == RETURN:
                self.bring_home(one)
            else:
                self.fetch(one)

    def bring_home(self, one: Transfer) -> None:
        place, page = (one.src, one.frame), (one.src, one.layer, one.expert)
        assert one.dst == self.homes[one.layer, one.expert]
        assert place not in self.used, "its gradient went home while it gathers"
        assert self.page_in(place) == page
        self.owed.remove(page)
        copy = self.frames.pop(place)
        copy.turn("return")
        copy.turn("end")
        self.returned += 1

    def fetch(self, one: Transfer) -> None:
        place, page = (one.dst, one.frame), (one.dst, one.layer, one.expert)
        assert one.src == self.homes[one.layer, one.expert] != one.dst
        assert one.frame < self.shape.frames
        assert self.last_use.get(place, -1) <= one.after, "it may start before the last use is over"
        assert place not in self.used, "overwritten while it is in use"
        assert self.page_in(place) not in self.owed, "overwritten before its gradient went home"
        if place in self.frames:
            self.frames.pop(place).turn("evict")
        assert page not in map(self.page_in, self.frames), "a copy twice"
        if one.kind == HOST:
            assert (self.shape.nodes[one.dst], *page[1:]) in self.shared, "pulled, but nobody put it there"
        self.frames[place] = one.copy
        one.copy.turn("start")
        one.copy.turn("end")
        self.fetched += 1

    def page_in(self, place: tuple[int, int]) -> tuple[int, int, int] | None:
        """Rank, layer, expert of what is in this (rank, frame)."""
        copy = self.frames.get(place)
        return None if copy is None else (place[0], copy.layer, copy.expert)

    def visit(self, number: int, layer: int, quotas: Any, backward: bool) -> None:
        """The layer's turn: it waits for what must be there, and then it is, however fast or slow the lane is."""
        assert all(one.by > number for one in self.pending), "it must be there by now, and may not even start"
        self.carry(max((i + 1 for i, one in enumerate(self.lane) if one.by <= number), default=0))
        held = {self.page_in(place): place for place in self.frames}
        for at, expert, _, rank, _ in quotas.tolist():
            if at == layer and self.homes[layer, expert] != rank:
                self.use(held[rank, layer, expert], number, backward)  # KeyError: a copy is used that is not there
        self.carry(next(self.pace))  # beside compute
        for place in self.used:
            self.frames[place].turn("leave")
        self.used.clear()
        self.over = number
        self.start()
        self.carry(next(self.pace))  # before the next layer

    def use(self, place: tuple[int, int], number: int, backward: bool) -> None:
        copy = self.frames[place]
        copy.turn("enter")
        self.used.add(place)
        self.last_use[place] = number
        if backward:
            copy.owes = True
            self.owed.add((place[0], copy.layer, copy.expert))

    def run(self, policy: Policy, stage: Any, batch: int) -> None:
        """One pass."""
        *carried, use = policy.handle(Began(stage, batch), 0)
        assert isinstance(use, Use)
        self.over = max(self.over, use.visit - 1)
        self.start()
        assert not self.pending, "it waits for visits that are no part of its pass"
        if not use.expected:  # what is under way has come for other turns: the first layer waits for all of it
            for one in self.lane:
                one.by = use.visit
        for command in carried:
            if isinstance(command, Carry):
                self.take(command.rows)
            else:
                self.begin([command])
        self.carry(next(self.pace))
        number = use.visit
        if stage != "backward":
            for layer in range(LAYERS):
                self.visit(number, layer, use.quotas, False)
                number += 1
        if stage in ("update", "backward"):
            for layer in reversed(range(LAYERS)):
                self.visit(number, layer, use.quotas, True)
                number += 1

    def begin(self, commands: list[Any]) -> None:
        for command in commands:
            match command:
                case Share(rows):
                    for layer, expert, home, node, rank in rows.tolist():
                        assert self.homes[layer, expert] == home
                        assert self.shape.nodes[rank] == node
                        assert (rank == home) == (self.shape.nodes[home] == node)
                        assert (node, layer, expert) not in self.shared, "put there twice"
                        self.shared.add((node, layer, expert))
                case Relocate(rows, homes_LE):
                    for layer, expert, old, new in rows.tolist():
                        assert self.homes[layer, expert] == old != new
                        self.homes[layer, expert] = new
                    assert (self.homes == homes_LE).all()
                case _:
                    raise AssertionError(command)

    def finish(self, policy: Policy) -> None:
        *carried, release = policy.handle(Finished(), 0)
        assert isinstance(release, Release)
        for command in carried:
            assert (command.rows[:, 2] == RETURN).all()
            self.pending += map(Transfer, command.rows.tolist())
        self.lane, self.pending = self.lane + self.pending, []
        self.carry(len(self.lane))
        assert not self.owed, "a gradient was left behind"
        for copy in self.frames.values():
            copy.turn("evict")
        self.frames.clear()
        self.newest.clear()
        self.shared.clear()
        self.last_use.clear()
        self.over = -1


def load(rng: Any, batches: int) -> Any:
    heat = rng.pareto(0.8, (batches, LAYERS, 1, EXPERTS)).clip(max=50) * 4
    return rng.poisson(heat, (batches, LAYERS, RANKS, EXPERTS)).astype(np.int64)


def shapes() -> st.SearchStrategy[Settings]:
    paths = st.sampled_from(["direct", "host"])
    return st.builds(
        lambda ring, recompute, update, node: Settings(
            LAYERS, EXPERTS, RANKS, SLOTS, ring, node, recompute=recompute, update=update
        ),
        st.integers(0, LAYERS + 1), paths, paths, st.sampled_from([0, 1]),
    )  # fmt: skip


def paces() -> st.SearchStrategy[list[int]]:
    """How far the lane gets at each of its chances: as late as it may, as early as it may, or anything."""
    mixed = st.lists(st.integers(0, 6), min_size=1, max_size=9)
    return st.one_of(st.just(LATEST), st.just(EARLIEST), mixed)


def one_f_one_b(rng: Any, batches: int) -> list[Any]:
    """Some order in which up to three micro-batches are in flight."""
    passes: list[Any] = []
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


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=2), shapes(), st.booleans(), paces())
@settings(max_examples=120, deadline=None)
def test_everything_is_there_in_time_and_gradients_go_home_once(
    seed: int, steps: list[int], shape: Settings, told: bool, pace: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    policy, shadow = Policy(shape), Shadow(shape, pace)
    for batches in steps:  # several RL steps on one object
        passes = [("recompute", m) for m in range(batches)] + [("update", m) for m in range(batches)]
        if rng.random() < 0.4:
            passes = [("recompute", m) for m in range(batches)] + one_f_one_b(rng, batches)
        shadow.begin(policy.handle(Foreseen(load(rng, batches), tuple(passes) if told else ()), 0))
        for stage, batch in passes:
            shadow.run(policy, stage, batch)
        shadow.finish(policy)


@given(st.integers(0, 2**32 - 1), shapes(), paces())
@settings(max_examples=120, deadline=None)
def test_passes_may_come_in_another_order_than_told_and_stop_early(seed: int, shape: Settings, pace: list[int]) -> None:
    rng = np.random.default_rng(seed)
    policy, shadow = Policy(shape), Shadow(shape, pace)
    for _ in range(2):
        told, ran = [("update", m) for m in range(5)], [(str(rng.choice(WHOLE)), int(m)) for m in rng.permutation(5)]
        if rng.random() < 0.5:  # a layer's turn in a backward pass is not where it is in a forward pass
            told, ran = one_f_one_b(rng, 5), one_f_one_b(rng, 5)
        shadow.begin(policy.handle(Foreseen(load(rng, 5), tuple(told)), 0))
        for stage, batch in ran[: rng.integers(1, 1 + len(ran))]:
            shadow.run(policy, stage, batch)
        shadow.finish(policy)


def hot(*experts: int) -> Any:
    """Each micro-batch has one hot expert."""
    counts = np.ones((len(experts), LAYERS, RANKS, EXPERTS), dtype=np.int64)
    for m, expert in enumerate(experts):
        counts[m, ..., expert] = 300
    return counts


@pytest.mark.parametrize("pace", [EARLIEST, LATEST])
def test_what_is_under_way_is_cancelled_and_wanted_again_but_not_sent_twice(pace: list[int]) -> None:
    """A copy for the next pass is fetched ahead, another pass comes, then the one that needs it."""
    policy, shadow = Policy(SHAPE), Shadow(SHAPE, pace)
    passes = (("update", 0), ("update", 1), ("update", 2), ("update", 3))
    shadow.begin(policy.handle(Foreseen(hot(0, 3, 0, 6), passes), 0))
    shadow.run(policy, "update", 0)
    shadow.run(policy, "update", 2)  # out of turn; it needs what the first one needed
    assert shadow.cancelled > 0
    shadow.run(policy, "update", 1)
    assert shadow.wanted > 0
    shadow.finish(policy)


def test_a_pass_out_of_turn_says_so() -> None:
    """What was fetched ahead has come for another turn: the mover must wait for all of it."""
    policy = Policy(SHAPE)
    policy.handle(Foreseen(hot(0, 3, 0, 6), tuple(("update", m) for m in range(4))), 0)
    said = [policy.handle(Began("update", m), 0)[-1].expected for m in (0, 1, 3, 2)]
    assert said == [True, True, False, False]


def test_with_frames_for_all_layers_a_kept_copy_is_carried_once() -> None:
    policy, shadow = Policy(SHAPE), Shadow(SHAPE, LATEST)
    shadow.begin(policy.handle(Foreseen(hot(0, 0, 0)), 0))
    for stage in ("recompute", "update"):
        for m in range(3):
            shadow.run(policy, stage, m)
    held = shadow.fetched
    shadow.finish(policy)
    assert held == shadow.returned == 2 * LAYERS  # the hot expert on both other ranks, in every layer
    ring = msgspec.structs.replace(SHAPE, ring=1)
    policy, shadow = Policy(ring), Shadow(ring, LATEST)
    shadow.begin(policy.handle(Foreseen(hot(0, 0, 0)), 0))
    shadow.run(policy, "update", 0)
    assert shadow.fetched > held / 1.01, "one layer's frames must refill"
    assert ring.frames == SLOTS < SHAPE.frames


def test_the_next_pass_is_fetched_during_this_one() -> None:
    """Copies that the second micro-step needs may start before the first is over."""
    policy = Policy(SHAPE)
    policy.handle(Foreseen(hot(0, 5), (("update", 0), ("update", 1))), 0)
    carried, use = policy.handle(Began("update", 0), 0)
    ahead = carried.rows[(carried.rows[:, 1] >= use.visit + 2 * LAYERS) & (carried.rows[:, 2] == DIRECT)]
    assert len(ahead)
    assert (ahead[:, 0] < use.visit + 2 * LAYERS - 1).all()
    second = policy.handle(Began("update", 1), 1)
    assert all((command.rows[:, 2] == RETURN).all() or not command.fetches for command in second[:-1]), second


@pytest.mark.parametrize("told", [True, False])
def test_what_is_not_needed_again_goes_home_behind_compute(told: bool) -> None:
    """Of copies for one micro-step alone, gradients start home after their last visit: nothing is left at the end.

    Where they are needed to the end, none goes home before the last micro-step.
    """
    for counts, early in ((hot(0, 5, 3), True), (hot(0, 0, 0), False)):
        policy, shadow = Policy(SHAPE), Shadow(SHAPE, LATEST)
        passes = tuple(("update", m) for m in range(3))
        shadow.begin(policy.handle(Foreseen(counts, passes if told else ()), 0))
        shadow.run(policy, "update", 0)
        shadow.run(policy, "update", 1)
        shadow.carry(10**9)
        assert (shadow.returned > 0) == early
        shadow.run(policy, "update", 2)
        held = shadow.fetched
        assert not policy.owes_RF.any(), "gradients wait for the end of the step"
        shadow.finish(policy)
        assert shadow.returned == held


def test_nothing_is_shared_before_a_pass_that_pulls_it() -> None:
    """A step of updates alone, whose weights go rank to rank, stages nothing; a recompute pass finds what it pulls."""
    policy = Policy(Settings(LAYERS, EXPERTS, RANKS, 2, recompute="host", update="direct"))
    counts = load(np.random.default_rng(3), 3)
    for stages in (["update"], ["update", "recompute"]):
        shadow = Shadow(policy.settings, LATEST)
        shadow.begin(policy.handle(Foreseen(counts), 0))
        assert not shadow.shared
        for stage in stages:
            assert not shadow.shared
            for batch in range(3):
                shadow.run(policy, stage, batch)
        assert bool(shadow.shared) == ("recompute" in stages)
        policy.handle(Finished(), 0)


def test_fewest_fetches_for_what_is_known() -> None:
    """One rank, one pass, any number of frames: as few as Belady's rule, written plainly and on demand."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        visits, pages, frames = 12, 7, int(rng.integers(2, 5))
        needed = [sorted(rng.choice(pages, rng.integers(0, frames + 1), replace=False).tolist()) for _ in range(visits)]
        needs = np.array([(v, page, DIRECT) for v, some in enumerate(needed) for page in some]).reshape(-1, 3)
        empty = [np.full((1, frames), value) for value in (-1, 0, 0, 0)]
        none = np.zeros(visits, dtype=np.int64)
        rows = carry(
            *empty,
            np.array([0, len(needs)]),
            needs,
            np.ones(pages, int),
            none,
            0,
            visits,
            np.zeros((1, pages), int),
            -1,
        )
        held: set[int] = set()
        fewest = 0
        for v, some in enumerate(needed):
            for page in some:
                if page in held:
                    continue
                fewest += 1
                if len(held) == frames:
                    held.remove(max((p for p in held if p not in some), key=lambda p: _next(needed, v, p)))
                held.add(page)
        assert len(rows) == fewest


def _next(needed: list[list[int]], visit: int, page: int) -> int:
    return next((v for v in range(visit, len(needed)) if page in needed[v]), len(needed))


def test_a_given_plan_brings_masters_to_their_new_homes() -> None:
    homes = np.tile(np.arange(EXPERTS) % RANKS, (LAYERS, 1))
    hosts = np.full((LAYERS, RANKS, 3), -1)
    for expert in range(EXPERTS):
        hosts[:, expert % RANKS, expert // RANKS] = expert
    rows = np.array([[la, e, q, homes[la, e], 5] for la in range(LAYERS) for e in range(EXPERTS) for q in range(RANKS)])
    plan = assemble("foresight", homes, [hosts], [rows], ranks_per_node=RANKS)
    policy, shadow = Policy(SHAPE), Shadow(SHAPE, LATEST)
    event = Planned(plan.homes.astype(np.int64), plan.quota.astype(np.int64), plan.most)
    shadow.begin(policy.handle(event, 0))
    assert (shadow.homes == homes).all()
    shadow.run(policy, "update", 0)
    shadow.finish(policy)
    assert policy.handle(event, 0) == [], "they are there already"
    with pytest.raises(CallerError, match="Give a plan of 3 layers"):
        policy.handle(Planned(plan.homes[:1].astype(np.int64), plan.quota.astype(np.int64), plan.most), 0)


def test_forward_only_owes_no_gradient() -> None:
    policy = Policy(SHAPE)
    policy.handle(Foreseen(hot(0)), 0)
    policy.handle(Began("recompute", 0), 0)
    assert [type(command) for command in policy.handle(Finished(), 1)] == [Release]


def test_what_nobody_foresaw_is_tallied() -> None:
    counts = np.full((1, LAYERS, RANKS, EXPERTS), 5, dtype=np.int64)
    policy = Policy(SHAPE)
    policy.handle(Foreseen(counts), 0)
    policy.handle(Began("update", 0), 0)
    seen = counts[0].copy()
    seen[0, 0, 0] += 3
    seen[1, 2, 7] -= 2
    assert policy.handle(Ran(0, seen, np.zeros((LAYERS, RANKS), int)), 0) == [Tally(unforeseen=3, absent=2)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), paces())
@settings(max_examples=40, deadline=None)
def test_without_foresight_each_layer_keeps_the_same_laws(seed: int, batches: int, pace: list[int]) -> None:
    rng = np.random.default_rng(seed)
    policy, shadow = Policy(SHAPE), Shadow(SHAPE, pace)
    for now in range(batches):
        stage = "update" if rng.random() < 0.7 else "recompute"
        for layer in range(LAYERS):
            counts = load(rng, 1)[0, layer]
            *carried, use = policy.handle(Gated(stage, layer, counts), now)
            assert isinstance(use, UseLayer)
            assert (use.quotas[:, 0] == layer).all()
            sums = np.zeros((RANKS, EXPERTS), dtype=np.int64)
            np.add.at(sums, (use.quotas[:, 2], use.quotas[:, 1]), use.quotas[:, 4])
            assert (sums == counts).all()
            for command in carried:
                assert (command.rows[:, 3] == layer).all(), "another layer's frames were touched"
                shadow.take(command.rows)
            shadow.carry(len(shadow.lane))  # the layer waits for all of it
            shadow.visit(-1, layer, use.quotas, stage == "update")
    shadow.finish(policy)


def test_equal_events_give_equal_commands_byte_for_byte() -> None:
    counts = load(np.random.default_rng(5), 4)
    encoder = msgspec.json.Encoder(enc_hook=array_digest)

    def story() -> list[bytes]:
        policy = Policy(SHAPE)
        events = [Foreseen(counts), *(Began("update", m) for m in range(4)), Finished()]
        return [encoder.encode(policy.handle(event, now)) for now, event in enumerate(events)]

    assert story() == story()


def test_misuse_is_the_callers_fault() -> None:
    policy = Policy(SHAPE)
    nothing = np.zeros((1, LAYERS, RANKS, EXPERTS), dtype=np.int64)
    with pytest.raises(CallerError, match="micro-batch 0: 0 were foreseen"):
        policy.handle(Began("update", 0), 0)
    with pytest.raises(CallerError, match="counts: shape"):
        policy.handle(Foreseen(nothing[..., 1:]), 0)
    with pytest.raises(CallerError, match="micro-batch 1: 1 were foreseen"):
        policy.handle(Foreseen(nothing, (("update", 1),)), 0)
    with pytest.raises(CallerError, match="no forward before it"):
        policy.handle(Foreseen(nothing, (("backward", 0),)), 0)
    policy.handle(Foreseen(nothing), 0)
    with pytest.raises(CallerError, match="micro-batch 1: 1 were foreseen"):
        policy.handle(Began("update", 1), 0)
    for layer, shape in ((LAYERS, (RANKS, EXPERTS)), (0, (RANKS, EXPERTS + 1))):
        with pytest.raises(CallerError, match="give a layer of the model"):
            policy.handle(Gated("update", layer, np.zeros(shape, int)), 0)
    policy.handle(Finished(), 0)
    with pytest.raises(CallerError, match="micro-batch 0"):  # a step's table ends with it
        policy.handle(Began("update", 0), 1)
    with pytest.raises(CallerError, match="all layers' copies"):
        Policy(msgspec.structs.replace(SHAPE, ring=1)).handle(Gated("update", 0, nothing[0, 0]), 0)
    quota = np.array([[0, 0, 0, e, 1, 9] for e in (0, 1, 2, 6, 7)])
    policy = Policy(msgspec.structs.replace(SHAPE, ring=2))
    with pytest.raises(CallerError, match="5 copies of one layer on a rank that has 4 frames"):
        policy.handle(Planned(policy.homes_LE, quota, np.full((LAYERS, 1), 45)), 0)


@pytest.mark.parametrize(
    "bad",
    [{"layers": 0}, {"experts": 0}, {"ranks": 0}, {"slots": -1}, {"ring": 3}, {"ranks_per_node": 4}, {"update": "usb"}],
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(CallerError, match=next(iter(bad))):
        Settings(**{"layers": 1, "experts": 4, "ranks": 2, **bad})
