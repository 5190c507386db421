"""The doctor says that balancing pays where it does, that it does not where it does not, and what would change that."""

import re
from typing import Any

import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts.cost import LINKS, SHAPES, Cost
from outrider.experts.doctor import LAYERS, SCALES, SLOTS, Advice, advise


def advice(heat: Any, tokens: int, links: str = "nvlink", layers: int = 2, per_node: int = 4) -> Advice:
    rng = np.random.default_rng(1)
    counted = rng.poisson(np.array(heat) * tokens, (4, layers, 4, 8)).astype(np.int64)
    return advise(counted, Cost(LINKS[links], SHAPES["qwen3-30b-a3b"]), per_node)


def test_it_pays_where_one_expert_is_hot() -> None:
    found = advice([10, 1, 1, 1, 1, 1, 1, 1], 1000)
    assert found.slots > 0 and found.saved > 0.3
    words = " ".join(found.words)
    assert "waiting for the fullest one" in words
    assert f"Balancing pays: {found.slots} spare slot(s)" in words
    assert "between nodes" not in words, "there is one"
    assert "so one placement serves most of the step" in words
    assert f"{found.static_s / found.seconds_by_slots[found.slots]:.2f}x" in words


def test_it_tells_what_crosses_between_nodes() -> None:
    """Two nodes of two ranks, every source alike: half of all tokens cross, until copies of the hot experts stand."""
    words = " ".join(advice([30, 1, 1, 1, 30, 1, 1, 1], 300, layers=1, per_node=2).words)
    kept, at_home = (int(some) for some in re.findall(r"(\d+)% of all token-slots cross.*instead of (\d+)%", words)[0])
    assert at_home == 50 and kept < 25


def test_it_does_not_pay_where_the_load_is_even() -> None:
    found = advice([4] * 8, 1000)
    assert found.saved <= 0.01 and found.slots == 0
    words = " ".join(found.words)
    assert "even already" in words and "does not pay" in words
    assert "Saved under other links" in words and "Saved with micro-batches of other sizes" in words


def test_it_does_not_pay_where_copies_cost_more_than_they_save() -> None:
    """A few tokens over slow links; the same skew with a hundred times the tokens is another matter."""
    small, large = advice([10, 1, 1, 1, 1, 1, 1, 1], 1, "pcie"), advice([10, 1, 1, 1, 1, 1, 1, 1], 3000, "pcie")
    assert small.saved < large.saved
    assert small.slots < large.slots


def test_waiting_is_told_from_padding() -> None:
    """One rank of four computes all, in whole tiles: three wait. Even loads of an eighth of a tile hardly wait."""
    hot, thin = advice([10, 0, 0, 0, 0, 0, 0, 0], 12800, layers=1), advice([1] * 8, 4, layers=1)
    assert 0.5 < hot.waiting < 0.75 and hot.padding < 0.01  # all are on their links for a while
    assert thin.waiting < 0.2 and thin.padding > 0.8
    assert "only fill up GEMM tiles" in thin.words[0] and "only fill up" not in hot.words[0]
    assert len(set(hot.saved_by_scale.values())) == len(SCALES), "micro-batches of four sizes save four shares"


def test_no_routes_at_all_are_the_callers_fault() -> None:
    with pytest.raises(CallerError, match="no token of these micro-batches has a route"):
        advice([0] * 8, 1)


def test_its_figures_belong_together() -> None:
    found = advice([10, 1, 1, 1, 1, 1, 1, 1], 300, layers=8)
    assert tuple(found.seconds_by_slots) == SLOTS
    assert list(found.saved_by_links) == list(LINKS) and len(found.saved_by_scale) == len(SCALES)
    assert found.saved == 1 - found.seconds_by_slots[found.slots] / found.static_s
    assert abs(found.saved - found.saved_by_links["nvlink"]) < 1e-9
    assert min(found.seconds_by_slots.values()) <= found.static_s
    assert found.slot_bytes == 8 * SHAPES["qwen3-30b-a3b"].expert_bytes
    assert LAYERS < 8, "a sample of layers stands for all"
