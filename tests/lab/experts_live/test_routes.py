"""Routes of a live run: whole, as skewed or even as they say, and recorded ones are read as they lie."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts import contiguous_homes
from outrider.lab.experts_live.routes import Case, counted, even, routed

CASE = Case(layers=3, experts=8, top_k=2, hidden=8, inner=8, tokens=64, batches=4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("make", [routed, even])
def test_a_token_goes_to_different_experts(make: type, ranks: int) -> None:
    routes = make(CASE, ranks)
    assert routes.shape == (4, ranks, 64, 3, 2) and routes.dtype == np.int64
    assert routes.min() >= 0 and routes.max() < 8 and (routes[..., 0] != routes[..., 1]).all()
    assert (make(CASE, ranks) == routes).all(), "seeded"
    counts = counted(routes, 8)
    assert counts.shape == (4, 3, ranks, 8) and (counts.sum(axis=3) == 128).all()
    m, layer, rank, expert = 2, 1, ranks - 1, int(routes[2, -1, 0, 1, 0])
    assert counts[m, layer, rank, expert] == (routes[m, rank, :, layer] == expert).sum()


def test_an_even_gate_is_even_and_a_hot_rank_rotates() -> None:
    load = counted(even(CASE, 2), 8).sum(axis=2)
    assert (load == load[0, 0, 0]).all()
    load = counted(routed(CASE, 2), 8).sum(axis=2)
    on_ranks = np.stack([load[:, :, contiguous_homes(8, 2) == rank].sum(axis=2) for rank in (0, 1)])
    batch, layer = np.indices(on_ranks.shape[1:])
    assert (on_ranks.argmax(axis=0) == (batch + layer) % 2).all()
    assert (on_ranks.max(axis=0) > 1.2 * on_ranks.mean(axis=0)).all()


def test_recorded_routes_are_read_as_they_lie(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (7, 600, 1)), axis=2)[..., :2]
    np.savez(tmp_path / "routes.npz", intent_ids=ids)
    case = msgspec.structs.replace(CASE, routes=str(tmp_path / "routes.npz"))
    routes = routed(case, 2)
    for m, rank, layer in ((0, 0, 0), (1, 1, 1), (3, 1, 2)):
        begin = (m * 2 + rank) * 64
        assert (routes[m, rank, :, layer] == ids[(0, 3, 6)[layer], begin : begin + 64]).all(), "layers 0, 3, 6 of 7"
    for wrong in ({"tokens": 256}, {"layers": 9}, {"top_k": 3}, {"experts": 7}):
        with pytest.raises(CallerError, match=r"routes.npz, intent: 7 layers, 600 tokens, top-2.* This run takes"):
            routed(msgspec.structs.replace(case, **wrong), 2)
