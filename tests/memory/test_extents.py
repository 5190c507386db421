"""Extents against the plainest oracle there is: a list of taken bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import LawBroken
from outrider.memory.extents import Extents

CAPACITY = 24


@given(st.lists(st.tuples(st.sampled_from("tag"), st.integers(0, 23), st.integers(1, 9)), max_size=60))
def test_extents_agree_with_a_byte_map(steps: list[tuple[str, int, int]]) -> None:
    extents, taken, live = Extents(CAPACITY), [False] * CAPACITY, dict[int, int]()
    for kind, at, size in steps:
        if kind == "t":
            fits = [a for a in range(CAPACITY - size + 1) if not any(taken[a : a + size])]
            start = extents.take(size)
            assert start == (fits[0] if fits else None)
        elif kind == "a":
            free = at + size <= CAPACITY and not any(taken[at : at + size])
            assert extents.take_at(at, size) is free
            start = at if free else None
        else:
            start = None
            if live:
                victim = sorted(live)[at % len(live)]
                extents.give(victim, live[victim])
                del live[victim]
                taken = [any(a <= i < a + s for a, s in live.items()) for i in range(CAPACITY)]
        if start is not None:
            live[start] = size
            taken[start : start + size] = [True] * size
        assert extents.free_bytes() == taken.count(False)


def test_giving_back_twice_breaks_law_2() -> None:
    extents = Extents(CAPACITY)
    start = extents.take(8)
    assert start == 0
    extents.give(start, 8)
    with pytest.raises(LawBroken, match="given back twice"):
        extents.give(start, 8)
