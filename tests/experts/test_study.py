"""One study from file to figures: everything that was promised is in it, and the file recounts to the same."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts import study
from outrider.experts.adapters import plans
from outrider.experts.peers import PEERS

PROMISED = {
    "imbalance": ("mean", "p50", "p95", "max"),
    "over_bound": ("mean", "p50", "p95", "max"),
    "copies_moved": (),
    "bytes_moved": (),
    "modelled_s": (),
    "force_balanced_s": (),
    "exposed_s": (),
    "plan_us_per_layer": (),
    "count_us_per_layer": (),
    "tiers": ("nothing", "split", "replicas", "relocation"),
    "digest": (),
}
ASKED = study.Study(ranks=4, ranks_per_node=2, slots=1, microbatch_tokens=64)


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, 2 layers, top-2 of 8: 200 and 100 tokens, skewed."""
    rng = np.random.default_rng(2)
    arrays: dict[str, Any] = {}
    for name, tokens in (("maths", 200), ("code", 100)):
        heat = rng.lognormal(0, 1, 8)
        waits = rng.exponential(1, (2, tokens, 8)) / heat
        arrays[f"{name}_ids"] = np.argsort(waits, axis=2)[:, :, :2].astype(np.int16)
        arrays[f"{name}_seq_offsets"] = np.array([0, tokens // 4, tokens // 2, tokens])
    path = tmp_path_factory.mktemp("routes") / "routing.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("planner", [study.OURS, *PEERS])
def test_every_figure_is_there(routes: Path, planner: str) -> None:
    plan, result = study.run(routes, msgspec.structs.replace(ASKED, planner=planner))
    for key, parts in PROMISED.items():
        for part in parts:
            assert isinstance(result[key][part], int | float), (key, part)
    assert result["planner"] == plan.planner == planner
    assert result["digest"] == plan.digest()
    assert (result["layers"], result["micro_steps"], result["ranks"], result["experts"]) == (2, 4, 4, 8)
    assert result["plan_us_per_layer"] > 0 and result["count_us_per_layer"] > 0
    assert min(result["over_bound"].values()) >= 1
    assert result["search_us_per_layer"] > result["plan_us_per_layer"]
    moved, tiers = result["copies_moved"], result["tiers"]
    assert (moved > 0) == (tiers["replicas"] + tiers["relocation"] > 0) and sum(tiers.values()) == 2 * 4
    assert result["modelled_s"] > 0 and result["force_balanced_s"] > 0
    assert msgspec.json.decode(msgspec.json.encode(result)) == result


def test_runs_are_contiguous_and_the_last_part_is_dropped(routes: Path) -> None:
    """300 tokens in 64s: 4 micro-batches of 16 tokens a rank; the last 44 are left out."""
    file = np.load(routes)
    ids = np.concatenate([file["maths_ids"], file["code_ids"]], axis=1)
    expected = np.zeros((4, 2, 4, 8), dtype=int)
    for token in range(256):
        for layer in range(2):
            expected[token // 64, layer, token % 64 // 16, ids[layer, token]] += 1
    assert (study.count(routes, ASKED).counts_MLRE == expected).all()
    whole = study.count(routes, msgspec.structs.replace(ASKED, microbatch_tokens=None, microbatch_seqs=2))
    assert whole.counts_MLRE.sum(axis=(1, 2, 3)).tolist() == [400, 500, 300]
    code = study.count(routes, msgspec.structs.replace(ASKED, domain="code"))
    assert code.counts_MLRE.shape[0] == 1


def test_the_file_recounts_to_the_same(routes: Path, tmp_path: Path) -> None:
    plan, result = study.run(routes, ASKED)
    plans.save(plan, tmp_path / "plan.npz")
    file = np.load(tmp_path / "plan.npz")
    load = np.zeros((2, 4, 4), dtype=int)
    for layer, m, _, _, rank, tokens in file["quota"].tolist():
        load[layer, m, rank] += tokens
    assert result["over_bound"]["mean"] == pytest.approx((load.max(axis=2) / (256 * 2 / 4 / 4)).mean())
    assert file["homes"].shape == (2, 8)
    assert file["hosts"].shape[:3] == (2, 4, 4)


def test_objective_time_and_excluded_ranks(routes: Path) -> None:
    slow = msgspec.structs.replace(ASKED, objective="time", links="ib", row_scale=64)
    plan, result = study.run(routes, slow)
    assert result["objective"] == "time" and result["modelled_s"] < study.run(routes, ASKED)[1]["modelled_s"] * 64
    less, figures = study.run(routes, msgspec.structs.replace(ASKED, excluded=(3,)))
    assert not (less.quota[:, 4] == 3).any()
    assert figures["over_bound"]["mean"] >= 1
    assert plan.shape == less.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"planner": "magic"}, "none of foresight"),
        ({"planner": "eplb", "excluded": (1,)}, "no --exclude"),
        ({"planner": "eplb", "objective": "time"}, "no --objective"),
        ({"objective": "beauty"}, "beauty"),
        ({"links": "string"}, "links string"),
        ({"model": "tiny"}, "HIDDENxINNER"),
        ({"domain": "poetry"}, "poetry"),
        ({"experts": 4}, "another model"),
        ({"microbatch_tokens": 1000}, "no whole one"),
        ({"microbatch_seqs": 2}, "more than one size"),
        ({"ranks": 4, "ranks_per_node": 3}, "divide"),
        ({"excluded": (9,)}, "excluded"),
        ({"format": "stone"}, "stone"),
    ],
)
def test_what_does_not_fit_is_one_sentence(routes: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CallerError, match=words) as raised:
        study.run(routes, msgspec.structs.replace(ASKED, **change))
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "routes.npz").write_bytes(b"hello")
    for path in (tmp_path / "routes.npz", tmp_path / "nowhere.npz"):
        with pytest.raises(CallerError, match=r"\.npz"):
            study.run(path, ASKED)
