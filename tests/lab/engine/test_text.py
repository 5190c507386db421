"""Streamed text is the whole text: no broken character, no piece of a stop string."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from outrider.lab.engine.text import Text


@pytest.fixture(scope="module")
def tokenizer(tiny_moe: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tiny_moe)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_pieces_make_the_whole(tokenizer: AutoTokenizer, words: str) -> None:
    text = Text(tokenizer.decode, [])
    pieces = [text.add([token]) for token in tokenizer.encode(words)] + [text.end()]
    assert "".join(pieces) == words
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_stop_strings_never_show(words: str, stop: list[str], step: int) -> None:
    text, shown = Text(lambda ids: "".join(chr(i) for i in ids), stop), ""
    for i in range(0, len(words), step):
        shown += text.add([ord(c) for c in words[i : i + step]])
        if text.stopped:
            break
        assert not any(end in shown for end in stop)
    else:
        shown += text.end()
    first = min((at for end in stop if (at := words.find(end)) >= 0), default=None)
    seen = words if not text.stopped else shown
    assert text.stopped == (first is not None)
    assert words.startswith(shown)
    assert seen == words or len(shown) <= len(words)
    if step == 1:
        assert not any(end in shown for end in stop)


def test_a_character_in_four_tokens_comes_at_once() -> None:
    data = "a😀b".encode()
    text = Text(lambda ids: bytes(ids).decode(errors="replace"), [])
    assert [text.add([byte]) for byte in data] == ["a", "", "", "", "😀", "b"]


def test_what_was_held_for_a_stop_string_comes_at_the_end() -> None:
    text = Text(lambda ids: "".join(chr(i) for i in ids), ["STOP"])
    assert text.add([ord(c) for c in "so ST"]) == "so "
    assert text.end() == "ST"
