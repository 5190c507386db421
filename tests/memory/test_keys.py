"""Law 1: a key binds the whole space and every token before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.memory.keys import KEY_BYTES, KeySpace

FIELDS = {
    "model": "m2", "dtype": "bfloat16", "layout": "HND", "block_tokens": 8, "salt": "tenant", "group": 1,
    "shard": "tp1of2", "adapter": "lora",
}  # fmt: skip
SPACE = KeySpace(model="m", dtype="float32", layout="NHD", block_tokens=4)
TOKENS = list(range(16))


def other(**changes: object) -> KeySpace:
    fields = {name: getattr(SPACE, name) for name in SPACE.__struct_fields__}
    return KeySpace(**(fields | changes))  # type: ignore[arg-type]


def test_fields_are_all_tried() -> None:
    assert set(FIELDS) == set(SPACE.__struct_fields__)


@pytest.mark.parametrize("name", FIELDS)
def test_changing_any_field_misses(name: str) -> None:
    changed = other(**{name: FIELDS[name]}).chain(TOKENS)
    assert changed and not {*SPACE.chain(TOKENS)} & {*changed}


def test_fields_do_not_run_into_each_other() -> None:
    assert other(model="ab", dtype="c").root() != other(model="a", dtype="bc").root()
    assert other(salt="x", adapter="").root() != other(salt="", adapter="x").root()


@given(st.lists(st.integers(0, 2**40), max_size=40), st.integers(1, 9), st.lists(st.integers(0, 99), max_size=20))
def test_chain_is_a_prefix_code(tokens: list[int], block_tokens: int, more: list[int]) -> None:
    space = other(block_tokens=block_tokens)
    keys = space.chain(tokens)
    assert len(keys) == len(tokens) // block_tokens
    assert all(len(key) == KEY_BYTES for key in keys) and len({*keys}) == len(keys)
    assert space.chain(tokens + more)[: len(keys)] == keys
    assert space.chain(tuple(tokens)) == keys


@given(st.lists(st.integers(0, 9), min_size=16, max_size=16), st.integers(0, 15), st.integers(10, 2**31))
def test_one_other_token_changes_its_block_and_all_after(tokens: list[int], position: int, token: int) -> None:
    changed = [*tokens]
    changed[position] = token
    same = [a == b for a, b in zip(SPACE.chain(tokens), SPACE.chain(changed), strict=True)]
    assert same == [True] * (position // 4) + [False] * (4 - position // 4)


def test_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(CallerError, match="block_tokens is 0"):
        other(block_tokens=0)


def test_adopted_keys_bind_the_space_and_the_engines_hash() -> None:
    """An engine's own hashes name no model: the space does."""
    hashes = [bytes([i]) * 32 for i in range(3)]
    keys = SPACE.adopt(hashes)
    assert len({*keys, *SPACE.chain(range(3 * SPACE.block_tokens))}) == 6
    assert SPACE.adopt(hashes[1:]) == keys[1:]
    for name, value in FIELDS.items():
        assert not {*keys} & {*other(**{name: value}).adopt(hashes)}, name
