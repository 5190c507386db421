"""A copy's life: nothing is read that has not arrived, nothing overwritten that is in use or owes a gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import LawBroken
from outrider.experts.copies import Copies
from outrider.experts.frames import TABLE, Copy

SHAPES = (torch.Size((4, 3)), torch.Size((3, 2)))


def copies(frames: int = 2, dtype: torch.dtype = torch.float32) -> Copies:
    return Copies(frames, SHAPES, torch.empty(0, dtype=dtype))


def fetch(held: Copies, layer: int, expert: int, frame: int) -> None:
    copy = held.plan(layer, expert, frame)
    held.start(copy).fill_(expert)
    held.end(copy)


def test_weights_in_gradients_out() -> None:
    held = copies(dtype=torch.bfloat16)
    fetch(held, 1, 5, 0)
    up, down = held.enter(1, 5)
    assert (up.shape, down.shape) == SHAPES
    assert (up == 5).all()
    for _ in range(300):  # bf16 would stop counting at 256
        held.add_gradient(1, 5, torch.ones(SHAPES[0]), torch.ones(SHAPES[1]))
    held.leave(1)
    assert held.nbytes == 2 * 18 * 2 + 18 * 4
    gradient = held.take_gradient(1, 5)
    assert gradient.dtype == torch.float32
    assert (gradient == 300).all()
    with pytest.raises(LawBroken, match="does not hold it"):
        held.enter(1, 5)
    with pytest.raises(LawBroken, match="cannot evict"):
        fetch(held, 1, 6, 0)
    held.returned()
    fetch(held, 1, 6, 0)
    held.clear()


def test_no_gradient_is_lost_and_nothing_in_use_is_overwritten() -> None:
    held = copies()
    fetch(held, 0, 3, 1)
    held.enter(0, 3)
    with pytest.raises(LawBroken, match=r"cannot evict; its story: plan, start, end, enter"):
        held.start(held.plan(0, 4, 1))
    held.add_gradient(0, 3, torch.ones(SHAPES[0]), torch.ones(SHAPES[1]))
    held.leave(0)
    with pytest.raises(LawBroken, match="owes a gradient"):
        held.start(held.plan(0, 4, 1))
    with pytest.raises(LawBroken, match="owes a gradient"):
        held.clear()
    assert held.take_gradient(0, 3).sum() == 18
    held.returned()
    fetch(held, 0, 4, 1)
    assert held.take_gradient(0, 4).sum() == 0, "it computed nothing"


def test_what_is_under_way_cannot_be_read_nor_unsent() -> None:
    held = copies()
    copy = held.plan(0, 3, 1)
    held.start(copy)
    with pytest.raises(LawBroken, match="cannot enter"):
        held.enter(0, 3)
    held.turn(0, 3, "cancel")
    held.end(copy)
    assert copy.state == "spare"
    with pytest.raises(LawBroken, match="cannot enter"):
        held.enter(0, 3)
    held.turn(0, 3, "want")
    held.enter(0, 3)
    held.leave(0)
    other = held.plan(0, 6, 0)
    held.turn(0, 6, "cancel")
    held.turn(0, 6, "want")  # before it started
    held.start(other)
    held.end(other)
    held.enter(0, 6)


@given(st.lists(st.sampled_from(sorted({what for _, what in TABLE})), max_size=20))
@settings(max_examples=200, deadline=None)
def test_only_the_table_moves_a_copy(story: list[str]) -> None:
    copy = Copy(0, 1, 2)
    for what in story:
        before = copy.state
        if (before, what) in TABLE:
            copy.turn(what)
            assert copy.state == TABLE[before, what]
        else:
            with pytest.raises(LawBroken, match=f"cannot {what}"):
                copy.turn(what)
            assert copy.state == before
    assert set(TABLE.values()) - {"free"} <= {state for state, _ in TABLE}, "a state that never ends"
