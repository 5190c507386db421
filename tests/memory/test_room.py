"""Eviction without a pass over all blocks: held to the pass, kept here as plain code, at every single victim.

The old scan: every evictable block of a place, least worth first, among equals the one touched first. The order that
the policy keeps must name that block, or, among wants that are worth about the same, one within a level of it.
"""

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant
from test_policy_laws import BOTH, DISK, HYBRID, Memory, machine

from outrider.memory import events as ev
from outrider.memory import foresee
from outrider.memory.foresee import told_worth
from outrider.memory.lifts import Entry, Lane, Lifts
from outrider.memory.order import LEVELS, LOOKED_AT, Order, level_of
from outrider.memory.policy import Policy
from outrider.memory.residency import Block
from outrider.memory.settings import Settings
from outrider.memory.told import source_of
from outrider.wants import Want

LEVEL = 2 ** (1 / LEVELS) + 1e-9  # one level of worth, and rounding


def scan(policy: Policy, place: str) -> list[tuple[float, int, str]]:
    """(worth, touched, block) of all that may leave, first to leave first: a pass over everything."""
    blocks = [block for block in policy.residency.blocks.values() if policy.residency.evictable(block, place)]
    return sorted((policy.room.worth(block, place), block.touched, block.item) for block in blocks)


def agrees(policy: Policy, place: str, victim: tuple[float, Block] | None, exact: bool) -> None:
    """The victim is the scan's, worth for worth; `exact`: block for block."""
    all_there = scan(policy, place)
    assert (victim is None) == (not all_there), f"{place}: {victim} of {all_there}"
    if victim is None:
        return
    worth, block = victim
    assert worth == policy.room.worth(block, place)
    if exact:
        assert (worth, block.touched, block.item) == all_there[0]
    told = block.item in policy.paths.told
    assert worth <= all_there[0][0] * (LEVEL if told else 1.0)


class Watched(Memory):
    """The state machine of the laws, in which every choice of a victim is compared; few wants, so exactly."""

    def __init__(self) -> None:
        super().__init__()
        room, choose = self.policy.room, self.policy.room.victim

        def compared(place: str) -> tuple[float, Block] | None:
            victim = choose(place)
            agrees(self.policy, place, victim, exact=True)
            return victim

        room.victim = compared  # type: ignore[method-assign]

    @invariant()
    def every_place_names_the_scans_victim(self) -> None:
        """Also where none is sought now: nothing that may leave is forgotten, nothing that may not is named."""
        for place in self.policy.residency.places:
            self.policy.room.victim(place)

    @invariant()
    def what_is_missing_is_what_a_pass_would_find_and_in_its_order(self) -> None:
        """Wanted, not in host nor on its way there, and readable below; the soonest first."""
        residency, paths, missing = self.policy.residency, self.policy.paths, self.policy.told.missing
        absent = [block for block in residency.blocks.values() if block.state["host"] == "absent"]
        wanted = [b.item for b in absent if b.item in paths.told and residency.source(b)]
        places = [(w.by_s, -w.saved_s, w.item, at, item) for item in wanted for w, at in paths.wants_of(item)]
        assert len(missing) == len(wanted)
        stand = sorted(entry for lane in missing.lanes() for entry in walk(missing, lane))
        assert stand == sorted(places)
        firsts = [entry[-1] for entry in stand if missing.first(entry)]
        assert firsts == list(dict.fromkeys(item for *_, item in sorted(places)))

    @invariant()
    def the_next_moment_is_the_soonest_of_all(self) -> None:
        """Of every want's patience, and of every missing block's latest start and deadline under every want."""
        told, paths = self.policy.told, self.policy.paths
        moments = [want.by_s + self.settings.patience_s for want in paths.wants.values()]
        for lane in told.missing.lanes():
            early_s = foresee.EARLY_FACTOR * len(told.missing) * lane[1] / self.settings.read_rate(source_of(lane))
            for by_s, *_ in walk(told.missing, lane):
                moments += [by_s, by_s - early_s] + [by_s - early_s - foresee.SLACK_S] * (lane[0] != "disk")
        later = [at_s for at_s in moments if at_s > self.now + 1e-6]
        kept = [at_s for at_s in told.moments(self.now) if at_s > self.now + 1e-6]
        assert math.isclose(min(later, default=0.0), min(kept, default=0.0), abs_tol=1e-6)


def walk(missing: Lifts, lane: Lane) -> Iterator[Entry]:
    """A lane from its head to its end."""
    cursor: tuple[float | str, ...] = ()
    while (entry := missing.after(lane, cursor)) is not None:
        yield entry
        cursor = entry


TestHostAndDisk = machine(DISK, 60, Watched)
TestHostAndHybrid = machine(HYBRID, 60, Watched)
TestHostHybridAndDisk = machine(BOTH, 60, Watched)

BLOCKS = 48
STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 11), st.integers(1, 6)),  # a session grows by so many blocks
    st.tuples(st.just("want"), st.integers(0, 11), st.sampled_from([-20.0, 0.0, 1.5, 30.0, 30.1, 300.0])),
    st.tuples(st.just("drop"), st.integers(0, 11), st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([0, 1, 7, 40]), st.just(0)),
)


@given(
    steps=st.lists(STEPS, min_size=20, max_size=90), saved_s=st.lists(st.sampled_from([1.0, 1.01, 4.0]), min_size=12)
)
@hypothesis_settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_many_wants_that_share_a_prefix_leave_within_a_level_of_the_scan(
    steps: list[tuple[str, int, float]], saved_s: list[float]
) -> None:
    """Twelve sessions over one system prompt; more wants about equal than are compared exactly."""
    policy = Policy(Settings(BLOCKS * 8, grain_bytes=8, recompute=8.0))
    prompt = tuple(f"{number:032x}" for number in range(4))
    sessions: list[tuple[str, ...]] = [prompt] * 12
    now, made = 10.0, 100
    choose = policy.room.victim

    def compared(place: str) -> tuple[float, Block] | None:
        victim = choose(place)
        agrees(policy, place, victim, exact=False)
        return victim

    policy.room.victim = compared  # type: ignore[method-assign]
    for step, who, much in steps:
        name = f"session {who}"
        now += 0.25
        if step == "write":
            new = tuple(f"{made + number:032x}" for number in range(int(much)))
            made += len(new)
            sessions[who] += new
            offer = policy.handle(ev.Prepared(1, made, sessions[who], 8), now)[0]
            assert isinstance(offer, ev.Offer)
            written = tuple(i for i, span in zip(sessions[who], offer.spans, strict=True) if span is not None)
            policy.handle(ev.Completed(1, made, written, (7,) * len(written), False), now)
            policy.handle(ev.Remembered(name, sessions[who]), now)
        elif step == "want":
            policy.handle(ev.Wanted(Want(name, "host", now + much, saved_s[who])), now)
        elif step == "drop":
            policy.handle(ev.Withdrawn(name), now)
            sessions[who] = prompt
        else:
            now += who
        policy.room.begin(now)
        policy.room.victim("host")


@given(
    wants=st.lists(st.tuples(st.floats(0.0, 200.0), st.floats(1e-3, 1e3)), min_size=1, max_size=40),
    moments=st.lists(st.floats(0.0, 400.0), min_size=1, max_size=12).map(sorted),
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_groups_level_is_never_above_the_one_it_stands_at(
    wants: list[tuple[float, float]], moments: list[float]
) -> None:
    """So that what is looked at first is the least, or found to have risen; whatever the time between two looks."""
    order = Order()
    named = {f"p{n}": Want(f"p{n}", "host", by_s, saved_s) for n, (by_s, saved_s) in enumerate(wants)}
    for touched, want in enumerate(named.values()):
        order.put_told(want.item, touched, 8, want, 80, 0.0)
    for now in moments:
        worths = {name: told_worth([(want, 80)], now) for name, want in named.items()}
        lowest = order.lowest(now)
        assert lowest is not None
        level, item = lowest
        assert level == level_of(worths[item]) and worths[item] <= min(worths.values()) * LEVEL
        if len(named) <= LOOKED_AT:
            assert worths[item] == min(worths.values())


def test_a_block_of_two_wants_stays_for_the_better_one_though_the_other_is_overdue() -> None:
    shared, alone, new = (f"{number:032x}" for number in range(3))
    policy = Policy(Settings(2 * 8, grain_bytes=8, recompute=8.0))
    policy.handle(ev.Prepared(1, 1, (shared, alone), 8), 10.0)
    policy.handle(ev.Completed(1, 2, (shared, alone), (7, 7), False), 10.0)
    for name, items, by_s in (("soon", (shared,), 11.0), ("late", (shared,), 100.0), ("later", (alone,), 150.0)):
        policy.handle(ev.Remembered(name, items), 10.0)
        policy.handle(ev.Wanted(Want(name, "host", by_s, 1.0)), 10.0)
    victim = policy.room.victim("host")
    agrees(policy, "host", victim, exact=True)
    policy.handle(
        ev.Prepared(1, 3, (new,), 8), 60.0
    )  # "soon" is 49 s late: expected in 197, "late" in 40, "later" in 90
    assert [policy.lookup((item,)) for item in (shared, alone)] == [1, 0]


@pytest.mark.parametrize("worth", [0.0, 5e-324, float("inf")])
def test_a_worth_without_measure_has_a_level(worth: float) -> None:
    assert level_of(0.0) <= level_of(worth) <= level_of(float("inf"))
