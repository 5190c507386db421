"""What a call waited for, from times alone: against the definition, and on drawn pictures."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.lab.traces.order import Frontier, gap_s

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=14).map(sorted)


def derive(spans: list[tuple[int, int]], slack: float = 0.0) -> list[list[int]]:
    frontier, parents = Frontier(slack), list[list[int]]()
    for number, (start, lasted) in enumerate(spans):
        parents.append([int(answer.call) for answer in frontier.before(start)])
        frontier.enter(str(number), start + lasted, map(str, parents[-1]))
    return parents


@given(SPANS, st.integers(0, 3))
def test_parents_are_the_answered_calls_that_no_answered_call_followed(spans: list, slack: int) -> None:
    parents = derive(spans, slack)
    ends = [start + lasted for start, lasted in spans]
    for call, (start, _) in enumerate(spans):
        over = [p for p in range(call) if ends[p] <= start + slack]
        followed = {p for child in over for p in parents[child]}
        assert parents[call] == [p for p in over if p not in followed]


def test_a_fan_out_and_a_join_are_seen() -> None:
    """plan 0-2; three reviews from 2 on, one of them with a second turn in its own lane; fix after all of them."""
    assert derive([(0, 2), (2, 3), (2, 9), (3, 1), (12, 1)]) == [[], [0], [0], [0], [1, 2, 3]]


def test_overlapping_calls_are_branches_however_they_are_listed() -> None:
    assert derive([(0, 10), (4, 3), (9, 4), (14, 1)]) == [[], [], [1], [0, 2]]


def test_slack_forgives_a_coarse_clock() -> None:
    assert derive([(0, 5), (4, 2)]) == [[], []]
    assert derive([(0, 5), (4, 2)], slack=1.0) == [[], [0]]


def test_a_gap_counts_from_the_last_answer_and_is_never_negative() -> None:
    frontier = Frontier(1.0)
    frontier.enter("a", 3.0, ())
    frontier.enter("b", 5.5, ())
    assert gap_s(7.0, frontier.before(7.0), 0.0) == 1.5
    assert gap_s(5.0, frontier.before(5.0), 0.0) == 0.0
    assert gap_s(7.0, (), 4.0) == 3.0


@given(SPANS)
def test_last_are_those_that_no_call_followed(spans: list) -> None:
    frontier, followed = Frontier(), set[str]()
    for number, (start, lasted) in enumerate(spans):
        parents = [answer.call for answer in frontier.before(start)]
        frontier.enter(str(number), start + lasted, parents)
        followed.update(parents)
    assert {answer.call for answer in frontier.last()} == {str(n) for n in range(len(spans))} - followed
