"""Synthetic expert load: seeded, whole, and the regimes are what they are called."""

from typing import Any

import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts import contiguous_homes
from outrider.lab.experts_load import REGIMES, synthetic

SMALL: dict[str, Any] = {"micro_steps": 3, "sequences": 4, "tokens": 128, "experts": 32, "top_k": 4}


@pytest.mark.parametrize("regime", REGIMES)
def test_every_token_goes_to_top_k_different_experts(regime: str) -> None:
    counts = synthetic(regime, 6, 1, layers=2, **SMALL)
    assert counts.shape == (3, 2, 6, 32) and counts.dtype == np.int64
    runs = np.array([86, 86, 85, 85, 85, 85])  # 512 tokens on 6 ranks
    assert (counts.sum(axis=3) == runs * 4).all()
    assert (counts <= runs[:, None]).all(), "an expert twice in a row"


def test_seed_and_layer_are_all_that_matters() -> None:
    two, three = (synthetic("specialised", 4, 7, layers=n, **SMALL) for n in (2, 3))
    assert (three[:, :2] == two).all()
    assert (synthetic("specialised", 4, 8, layers=2, **SMALL) != two).any()
    assert (two[:, 0] != two[:, 1]).any()


def test_regimes_are_what_they_are_called() -> None:
    """Static imbalance grows with skew; neighbouring micro-steps are alike unless sequences specialise."""
    homes = contiguous_homes(32, 8)
    imbalance, drift = {}, {}
    for regime in REGIMES:
        load = synthetic(regime, 8, 0, layers=6, **SMALL).sum(axis=2)
        on_ranks = np.stack([load[:, :, homes == rank].sum(axis=2) for rank in range(8)], axis=2)
        imbalance[regime] = float((on_ranks.max(axis=2) / on_ranks.mean(axis=2)).mean())
        share = load / load.sum(axis=2, keepdims=True)
        drift[regime] = float(np.abs(np.diff(share, axis=0)).sum(axis=2).mean() / 2)
    assert 1 < imbalance["mild"] < imbalance["skewed"]
    assert drift["specialised"] > 1.5 * max(drift["mild"], drift["skewed"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CallerError, match="regimes are"):
        synthetic("wild", 4, 0)
    with pytest.raises(CallerError, match="top_k"):
        synthetic("mild", 4, 0, experts=4, top_k=5)
