"""Runs behave as the lists of ids that they stand for."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.lab.traces.runs import Runs, collect, expand, head, join, length, shared, tail

RUNS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=6).map(tuple)


def ids(runs: Runs) -> list[int]:
    return [first + i for first, count in runs for i in range(count)]


@given(RUNS)
def test_length_expand_and_collect_agree_with_the_list(runs: Runs) -> None:
    assert length(runs) == len(ids(runs))
    assert list(expand(runs)) == ids(runs)
    assert ids(collect(ids(runs))) == ids(runs)


@given(RUNS, RUNS, RUNS)
def test_join_is_concatenation_and_one_form_a_sequence(a: Runs, b: Runs, c: Runs) -> None:
    assert ids(join(a, b, c)) == ids(a) + ids(b) + ids(c)
    assert join(a, b) == collect(ids(a) + ids(b))
    assert join(join(a, b), c) == join(a, join(b, c))
    assert all(first + count != after for (first, count), (after, _) in zip(join(a, b), join(a, b)[1:], strict=False))


@given(RUNS, st.integers(-1, 30))
def test_head_and_tail_cut_the_list(runs: Runs, blocks: int) -> None:
    at = max(blocks, 0)
    assert ids(head(runs, blocks)) == ids(runs)[:at]
    assert ids(tail(runs, blocks)) == ids(runs)[at:]


@given(RUNS, RUNS, st.integers(0, 12))
def test_shared_counts_equal_leading_ids(left: Runs, right: Runs, at: int) -> None:
    right = join(head(left, at), right)
    same = 0
    for a, b in zip(ids(left), ids(right), strict=False):
        if a != b:
            break
        same += 1
    assert shared(left, right) == shared(right, left) == same
    assert same >= min(at, length(left))


def test_a_long_prompt_costs_as_many_steps_as_it_has_runs() -> None:
    long: Runs = ((0, 10**12), (5, 10**12))
    assert shared(long, join(long, ((7, 1),))) == length(long) == 2 * 10**12
    assert head(long, 10**12 + 1) == ((0, 10**12), (5, 1))
    assert tail(long, 10**12 + 1) == ((6, 10**12 - 1),)
