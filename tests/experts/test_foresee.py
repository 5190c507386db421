"""Foresight counts what was recorded, and nothing else."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import foresee


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    tokens, layers, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    dtype = draw(st.sampled_from([np.int16, np.int32, np.int64]))
    return {
        "routes": rng.integers(-1, 5, (tokens, layers, top_k)).astype(dtype),
        "batch": rng.integers(-1, 3, tokens),
        "source": rng.integers(0, 2, tokens),
    }


@given(tables())
@settings(max_examples=80, deadline=None)
def test_counts_equal_a_plain_count(table: dict[str, Any]) -> None:
    counts = foresee(**table, experts=5, ranks=2, batches=3)
    expected: Counter[tuple[int, int, int, int]] = Counter()
    for row, batch, source in zip(table["routes"], table["batch"], table["source"], strict=True):
        for layer, ids in enumerate(row.tolist()):
            if batch >= 0 and min(ids) >= 0:  # masked, or not recorded: the live gate will route it
                expected.update((int(batch), layer, int(source), e) for e in ids)
    assert {tuple(at): int(counts[tuple(at)]) for at in np.argwhere(counts)} == dict(expected)
    assert counts.dtype == np.int64


def test_unsigned_ids_and_duplicates() -> None:
    routes = np.array([[[255, 255]]], dtype=np.uint8)
    counts = foresee(routes, np.zeros(1, int), np.zeros(1, int), experts=256, ranks=1)
    assert counts.shape == (1, 1, 1, 256)
    assert counts[0, 0, 0, 255] == 2  # computed twice, so counted twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routes": np.zeros((4, 2), int)}, "top_k"),
        ({"batch": np.zeros(3, int)}, "one batch and source per token"),
        ({"routes": np.full((4, 1, 2), 9)}, "another model"),
        ({"source": np.full(4, 2)}, "source: holds 2"),
        ({"source": np.full(4, -1)}, "negative rank"),
        ({"batches": 0}, "batch: holds 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"routes": np.zeros((4, 1, 2), int), "batch": np.zeros(4, int), "source": np.zeros(4, int)}
    with pytest.raises(CallerError, match=message):
        foresee(**{**good, "experts": 8, "ranks": 2, **change})
