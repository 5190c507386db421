"""Whose turn it is: a transfer starts when its visit is over, a layer waits for what must have ended by then."""

import pytest

from outrider.errors import CallerError
from outrider.experts.turns import Batch, Turns


def batch(after: int, by: int) -> Batch:
    return Batch(after, by, 1, (), ())


def test_an_update_of_two_layers() -> None:
    turns = Turns(2)
    turns.begin()
    turns.begin_pass("update", 0)
    for one in (batch(-1, 0), batch(-1, 3), batch(0, 1), batch(2, 4)):
        turns.queue(one)
    first = list(turns.ready())
    assert [(b.after, b.by) for b in first] == [(-1, 0), (-1, 3)]
    for ticket, one in enumerate(first, start=1):
        turns.started(one, ticket)
    assert turns.enter(0, backward=False) == 1
    turns.leave(0, backward=False)
    (second,) = turns.ready()
    turns.started(second, 3)
    assert turns.enter(1, backward=False) == 3
    turns.leave(1, backward=False)
    assert turns.enter(1, backward=True) == 0, "waited twice"
    assert turns.enter(1, backward=True) == 0, "activations are computed again in the same turn"
    turns.leave(1, backward=True)
    assert [b.by for b in turns.ready()] == [4], "fetched ahead for the next pass"
    assert turns.enter(0, backward=True) == 2
    turns.leave(0, backward=True)
    turns.end_pass()
    turns.begin_pass("forward", 4)
    assert turns.enter(0, backward=False) == 0


def test_out_of_turn_is_said_and_not_waited_for() -> None:
    turns = Turns(2)
    turns.begin()
    turns.begin_pass("recompute", 0)
    turns.queue(batch(0, 1))
    assert not list(turns.ready())
    with pytest.raises(CallerError, match="layer 1 runs before its turn"):
        turns.enter(1, backward=False)
    turns.enter(0, backward=False)
    turns.leave(0, backward=False)
    with pytest.raises(CallerError, match="layer 0 ran twice in one pass"):
        turns.enter(0, backward=False)


def test_a_model_that_runs_several_times_ends_no_visit_before_the_pass() -> None:
    turns = Turns(2)
    turns.begin()
    turns.begin_pass("update", 0, several=True)
    turns.queue(batch(2, 4))
    for _ in range(2):
        for backward in (False, True):
            for layer in (0, 1):
                turns.enter(layer, backward)
                turns.leave(layer, backward)
    assert not list(turns.ready())
    turns.end_pass()
    assert len(list(turns.ready())) == 1


def test_at_the_end_everything_starts() -> None:
    turns = Turns(1)
    turns.queue(batch(7, 8))
    assert len(list(turns.ready(everything=True))) == 1
    turns.begin()


def test_what_came_for_another_pass_is_waited_for_at_once() -> None:
    turns = Turns(3)
    turns.begin()
    turns.begin_pass("forward", 0)
    turns.started(batch(0, 5), 7)  # fetched ahead for layer 2 of the next forward pass
    turns.end_pass()
    turns.begin_pass("backward", 3, expected=False)
    assert turns.enter(2, backward=True) == 7, "the backward pass has layer 2 first"
