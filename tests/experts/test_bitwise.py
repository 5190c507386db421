"""Bitwise mode: trained balanced on 1, 2 and 4 ranks, the layer has the bits that it gets alone, balancing off."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from started import run_ranks

from outrider.errors import LawBroken
from outrider.experts.canonical import Sums, product, tree_sum

SCRIPT = Path(__file__).with_name("bitwise_ranks.py")


def test_training_has_the_same_bits_as_alone(tmp_path: Path) -> None:
    """Parameters, their gradients and input gradients; fp32 and float64; foreseen rightly, wrongly and not at all."""
    run_ranks(tmp_path, SCRIPT, 4)


@given(st.integers(0, 2**31), st.integers(1, 40), st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_tree_has_the_same_bits_wherever_its_parts_were_added(seed: int, leaves: int, cuts: list[int]) -> None:
    values = torch.randn(leaves, 3, generator=torch.Generator().manual_seed(seed))
    alone = Sums()
    alone.begin([leaves])
    for i, value in enumerate(values):
        alone.add(0, 0, 0, i, value)
    home, ends = Sums(), sorted({min(cut, leaves) for cut in cuts} | {0, leaves})
    home.begin([leaves])
    pieces = list(pairwise(ends))
    for begin, end in reversed(pieces):
        away = Sums()
        away.add_run(0, 0, begin, values[begin:end])
        parts = away.nodes.pop(0)
        assert len(parts) <= 2 * (end - begin).bit_length(), "more parts than a run of leaves needs"
        for key, value in parts.items():
            home.add(0, *key, value)
    expected, got = alone.settle(0), home.settle(0)
    assert expected is not None
    assert got is not None
    assert torch.equal(expected, got)
    assert torch.allclose(got, values.sum(0), atol=1e-4)


def test_a_part_that_is_missing_late_or_doubled_is_found_out() -> None:
    one = torch.ones(2)
    sums = Sums()
    sums.begin([3])
    sums.add(0, 0, 0, 0, one)
    sums.add(0, 0, 0, 2, one)
    with pytest.raises(LawBroken, match="lacks parts"):
        sums.settle(0)
    sums = Sums()
    sums.add(4, 0, 0, 1, one)
    with pytest.raises(LawBroken, match="came twice"):
        sums.add(4, 0, 0, 1, one)
    with pytest.raises(LawBroken, match="after they had gone home"):
        sums.clear()


@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 9), st.integers(1, 33))
@settings(max_examples=40, deadline=None)
def test_a_row_of_the_product_is_its_own(seed: int, rows: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    whole = product(a, b)
    assert torch.allclose(whole, a @ b.T, atol=1e-4)
    for i in range(0, rows, 7):
        assert torch.equal(product(a[i : i + 1], b)[0], whole[i])
    assert torch.equal(tree_sum(a[:, None] * b[None]), whole)
