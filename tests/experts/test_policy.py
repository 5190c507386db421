"""The policy as a machine: gradients go home once, nothing stale is ever used, equal events give equal plans."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import Policy, Settings
from outrider.experts.events import (
    Began,
    Fetch,
    Finished,
    Foreseen,
    Gated,
    Ran,
    Release,
    ReturnGradients,
    Tally,
    Use,
    UseLayer,
)
from outrider.journal import array_digest

SHAPE = Settings(layers=2, experts=8, ranks=3, slots=2)


class Shadow:
    """What lies in the slots and which slots owe a gradient, kept from the commands alone."""

    def __init__(self) -> None:
        self.slots = np.full((2, 3, 2), -1)
        self.owed: dict[tuple[int, int, int], int] = {}
        self.homes = np.sort(np.arange(8) % 3)
        self.returned = 0

    def apply(self, commands: list[Any], stage: str) -> None:
        order = [type(command) for command in commands]
        assert order == [kind for kind in (ReturnGradients, Fetch, Use, Release) if kind in order]
        for command in commands:
            match command:
                case ReturnGradients(rows):
                    for layer, expert, rank, slot, home in rows.tolist():
                        assert self.owed.pop((layer, rank, slot)) == expert
                        assert self.homes[expert] == home
                        self.returned += 1
                case Fetch(rows):
                    for layer, expert, src, dst, slot in rows.tolist():
                        assert src == self.homes[expert] != dst
                        assert (layer, dst, slot) not in self.owed, "overwritten before its gradient went home"
                        self.slots[layer, dst, slot] = expert
                case Use(replicas_LRS, quotas, _):
                    assert (replicas_LRS == self.slots).all(), "a copy is used that was never fetched"
                    for layer, expert, _, rank, _ in quotas.tolist():
                        if self.homes[expert] != rank and stage == "update":
                            (slot,) = np.flatnonzero(self.slots[layer, rank] == expert)
                            self.owed[layer, rank, int(slot)] = expert
                case Release():
                    assert not self.owed, "a gradient was left behind"
                    self.slots[:] = -1


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_gradients_go_home_once_and_nothing_stale_is_used(seed: int, steps: list[int]) -> None:
    rng = np.random.default_rng(seed)
    policy, shadow = Policy(SHAPE), Shadow()
    for batches in steps:  # several RL steps on one object
        counts = rng.poisson(rng.pareto(0.8, (batches, 2, 1, 8)).clip(max=50) * 4, (batches, 2, 3, 8)).astype(np.int64)
        assert policy.handle(Foreseen(counts), 0) == []
        now = 0
        for stage in ("recompute", "update"):
            for batch in range(batches):
                shadow.apply(policy.handle(Began(stage, batch), now), stage)
                assert policy.handle(Ran(batch, counts[batch], np.zeros((2, 3), int)), now) == []
                now += 1
        shadow.apply(policy.handle(Finished(), now), "update")
        assert not shadow.owed


def test_a_skewed_step_moves_uses_and_returns() -> None:
    counts = np.ones((1, 2, 3, 8), dtype=np.int64)
    counts[..., 0] = 100
    policy, shadow = Policy(SHAPE), Shadow()
    policy.handle(Foreseen(counts), 0)
    commands = policy.handle(Began("update", 0), 0)
    assert [type(command) for command in commands] == [Fetch, Use]
    shadow.apply(commands, "update")
    ending = policy.handle(Finished(), 1)
    assert [type(command) for command in ending] == [ReturnGradients, Release]
    shadow.apply(ending, "update")
    assert shadow.returned >= 2


def test_forward_only_owes_no_gradient() -> None:
    counts = np.ones((1, 2, 3, 8), dtype=np.int64)
    counts[..., 0] = 100
    policy = Policy(SHAPE)
    policy.handle(Foreseen(counts), 0)
    policy.handle(Began("recompute", 0), 0)
    assert [type(command) for command in policy.handle(Finished(), 1)] == [Release]


def test_what_nobody_foresaw_is_tallied() -> None:
    counts = np.full((1, 2, 3, 8), 5, dtype=np.int64)
    policy = Policy(SHAPE)
    policy.handle(Foreseen(counts), 0)
    policy.handle(Began("update", 0), 0)
    seen = counts[0].copy()
    seen[0, 0, 0] += 3
    seen[1, 2, 7] -= 2
    assert policy.handle(Ran(0, seen, np.zeros((2, 3), int)), 0) == [Tally(unforeseen=3, absent=2)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_without_foresight_each_layer_keeps_the_same_laws(seed: int, batches: int) -> None:
    rng = np.random.default_rng(seed)
    policy, shadow = Policy(SHAPE), Shadow()
    for now in range(batches):
        stage = "update" if rng.random() < 0.7 else "recompute"
        for layer in range(2):
            counts = rng.poisson(rng.pareto(0.8, (1, 8)).clip(max=50) * 4, (3, 8)).astype(np.int64)
            *before, use = policy.handle(Gated(stage, layer, counts), now)
            assert isinstance(use, UseLayer)
            assert all((command.rows[:, 0] == layer).all() for command in before), "another layer's slots were touched"
            assert (use.quotas[:, 0] == layer).all()
            sums = np.zeros((3, 8), dtype=np.int64)
            np.add.at(sums, (use.quotas[:, 2], use.quotas[:, 1]), use.quotas[:, 4])
            assert (sums == counts).all()
            whole = shadow.slots.copy()
            whole[layer] = use.replicas_RS
            shadow.apply([*before, Use(whole, use.quotas, np.array([use.most]))], stage)
    shadow.apply(policy.handle(Finished(), batches), "update")
    assert not shadow.owed


def test_equal_events_give_equal_commands_byte_for_byte() -> None:
    rng = np.random.default_rng(5)
    counts = rng.poisson(rng.pareto(0.8, (4, 2, 1, 8)).clip(max=50) * 4, (4, 2, 3, 8)).astype(np.int64)
    encoder = msgspec.json.Encoder(enc_hook=array_digest)

    def story() -> list[bytes]:
        policy = Policy(SHAPE)
        events = [Foreseen(counts), *(Began("update", m) for m in range(4)), Finished()]
        return [encoder.encode(policy.handle(event, now)) for now, event in enumerate(events)]

    assert story() == story()


def test_misuse_is_the_callers_fault() -> None:
    policy = Policy(SHAPE)
    with pytest.raises(CallerError, match="micro-batch 0: 0 were foreseen"):
        policy.handle(Began("update", 0), 0)
    with pytest.raises(CallerError, match="counts: shape"):
        policy.handle(Foreseen(np.zeros((1, 2, 3, 9), int)), 0)
    policy.handle(Foreseen(np.zeros((1, 2, 3, 8), int)), 0)
    with pytest.raises(CallerError, match="micro-batch 1: 1 were foreseen"):
        policy.handle(Began("update", 1), 0)
    for layer, shape in ((2, (3, 8)), (0, (3, 9))):
        with pytest.raises(CallerError, match="give a layer of the model"):
            policy.handle(Gated("update", layer, np.zeros(shape, int)), 0)
    policy.handle(Finished(), 0)
    with pytest.raises(CallerError, match="micro-batch 0"):  # a step's table ends with it
        policy.handle(Began("update", 0), 1)


@pytest.mark.parametrize("bad", [{"layers": 0}, {"experts": 0}, {"ranks": 0}, {"slots": -1}])
def test_settings_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(CallerError, match=next(iter(bad))):
        Settings(**{"layers": 1, "experts": 4, "ranks": 2, **bad})
