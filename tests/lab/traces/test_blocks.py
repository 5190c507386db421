"""Prompts share blocks exactly as far as their pieces are equal, and a conversation's next prompt goes on from it."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.lab.traces.blocks import Ids, PrefixTree, answered, moved
from outrider.lab.traces.runs import Runs, collect, expand, head, join, length, shared

PIECES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=5)
PROMPTS = st.lists(st.tuples(PIECES, st.integers(0, 200)), min_size=1, max_size=12)


def test_fresh_ids_are_nobody_elses() -> None:
    ids = Ids()
    assert [ids.take(2), ids.take(0), ids.take(-3), ids.take(3)] == [((0, 2),), (), (), ((2, 3),)]


@given(PROMPTS, st.integers(1, 16))
def test_a_prompt_has_its_whole_blocks_and_equal_fronts_only(prompts: list[tuple[list, int]], size: int) -> None:
    """Laws of `lay` against the definition, for every pair of prompts."""
    tree = PrefixTree(size, Ids())
    laid = [tree.lay(pieces, tokens) for pieces, tokens in prompts]
    for (_, tokens), runs in zip(prompts, laid, strict=True):
        assert length(runs) == tokens // size
        assert len(set(expand(runs))) == length(runs)
    for (one, _), a in zip(prompts, laid, strict=True):
        for (other, _), b in zip(prompts, laid, strict=True):
            same = shared(a, b)
            assert not set(expand(a)) & set(expand(b)) - set(expand(head(a, same)))  # equal only in front
            if one[:1] and other[:1] and one[0][0] != other[0][0]:
                assert same == 0 or a is b


@given(PIECES, st.integers(0, 300), PIECES, st.integers(0, 300), st.integers(1, 16))
def test_what_goes_on_from_a_prompt_begins_with_it(first: list, tokens: int, more: list, new: int, size: int) -> None:
    tree = PrefixTree(size, Ids())
    before = tree.lay(first, tokens)
    after = tree.lay([*first, *more], tokens + new)
    if first:
        assert shared(before, after) == length(before) == tokens // size


def test_new_tokens_are_spread_by_weight_once_and_for_all() -> None:
    tree = PrefixTree(10, Ids())
    assert tree.lay([("system", 30), ("one", 70)], 100) == ((0, 10),)  # system: 30 tokens, 3 blocks
    assert tree.lay([("system", 30), ("two", 10)], 55) == ((0, 3), (10, 2))
    assert tree.lay([("system", 30)], 25) == ((0, 2),)  # fewer than it was given
    assert tree.lay([("system", 30)], 60) == ((0, 3), (12, 3))  # more: fresh ones


@given(st.lists(st.integers(0, 6), max_size=8), st.lists(st.integers(0, 6), max_size=12), st.integers(0, 20))
def test_an_outputs_blocks_are_the_next_prompts_where_it_goes_on(prompt: list[int], next_: list[int], out: int) -> None:
    ids = Ids()
    ids.take(100)
    blocks = len(prompt) + out
    chain = list(expand(answered(collect(prompt), collect(next_), blocks, ids)))
    assert len(chain) == blocks and chain[: len(prompt)] == prompt
    goes_on = next_[: len(prompt)] == prompt
    known = next_[:blocks] if goes_on else prompt
    assert chain[: len(known)] == known
    assert all(block >= 100 for block in chain[len(known) :])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=5).map(tuple), st.integers(0, 50))
def test_moved_ids_are_the_same_further_up(runs: Runs, by: int) -> None:
    assert list(expand(moved(runs, by))) == [block + by for block in expand(runs)]
    assert moved(moved(runs, by), 0) == join(moved(runs, by))
