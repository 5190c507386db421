"""`outrider experts bench`: its load is what it says, its sections are whole, its links are read, no child stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from outrider.errors import CallerError, WorldError
from outrider.experts import benchmark, loopback, study
from outrider.experts.adapters import plans
from outrider.experts.adapters.members import write
from outrider.experts.benchmark import Asked, made_up
from outrider.experts.foresee import counts
from outrider.experts.score import score

pytestmark = pytest.mark.slow
SMALL = Asked(ranks=4, slots=1, tokens=256, experts=16, top_k=2, layers=2, model="512x256", enough_s=0.0)


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return benchmark.run(SMALL)


def test_made_up_routes_are_seeded_whole_and_as_skewed_as_they_say() -> None:
    asked = msgspec.structs.replace(SMALL, tokens=1024, experts=64, top_k=4)
    step_LE, wander = {}, {}
    for regime in benchmark.REGIMES:
        routing = made_up(msgspec.structs.replace(asked, regime=regime))
        assert routing.same(made_up(msgspec.structs.replace(asked, regime=regime)))
        assert (routing.tokens, routing.layers, routing.top_k, routing.experts) == (8192, 2, 4, 64)
        assert routing.sequences == 64 and routing.known_T is None
        assert (np.diff(np.sort(routing.routes_TLK, axis=2), axis=2) > 0).all(), "an id twice in a row"
        load_MLE = counts(routing, 4, 1024).sum(axis=2)
        shares = load_MLE / load_MLE.sum(axis=2, keepdims=True)
        step_LE[regime] = float(load_MLE.sum(axis=0).max() / load_MLE.sum(axis=0).mean())
        wander[regime] = float(np.abs(np.diff(shares, axis=0)).sum(axis=2).mean())
    assert step_LE["mild"] * 1.5 < step_LE["skewed"]
    assert wander["specialised"] > 3 * max(wander["mild"], wander["skewed"])


def test_every_section_is_there_and_json_can_hold_it(result: dict[str, object]) -> None:
    assert set(result) == {"machine", "load", *benchmark.SECTIONS}
    assert json.loads(json.dumps(result)) == result
    load = result["load"]
    assert isinstance(load, dict) and load["synthetic"] and load["micro_steps"] == benchmark.MICRO_STEPS
    for name, keys in (
        ("counting", ("us_per_layer", "ns_per_token_slot")),
        ("copies", ("memcpy_bytes_s", "host_to_slot_bytes_s")),
        ("compute", ("bfloat16_flop_s", "float32_flop_s")),
        ("links", ("near_bytes_s", "far_bytes_s", "latency_s")),
    ):
        section = result[name]
        assert isinstance(section, dict) and all(section[key] > 0 for key in keys), section


def test_the_quality_is_that_of_a_study(result: dict[str, object]) -> None:
    counts_MLRE = counts(made_up(SMALL), SMALL.ranks, SMALL.tokens)
    planning = result["planning"]
    assert isinstance(planning, dict) and set(planning["planners"]) == set(benchmark.PLANNERS)
    for name, found in planning["planners"].items():
        plan, _ = study.plan(study.Counted(counts_MLRE, 0.0, ()), study.Study(4, 4, slots=1, planner=name))
        figures = score(plan, counts_MLRE)
        assert found["measured"] and found["us_per_layer"] > 0 and found["step_s"] > 0
        for key in ("imbalance", "over_bound", "copies_per_layer_microstep"):
            assert found[key] == figures[key]


def test_the_links_file_is_what_plan_reads(result: dict[str, object], tmp_path: Path) -> None:
    links = result["links"]
    assert isinstance(links, dict)
    (tmp_path / "links.toml").write_text(benchmark.links_toml(result))
    read = plans.links_of(str(tmp_path / "links.toml"))
    for name in ("near_bytes_s", "far_bytes_s", "latency_s"):
        assert getattr(read, name) == pytest.approx(links[name], rel=1e-2)
    with pytest.raises(WorldError, match="lo is down"):
        benchmark.links_toml({**result, "links": {"measured": False, "why": "lo is down"}})


def test_a_file_of_routes_takes_the_place_of_made_up_ones(tmp_path: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((2, 100, 8)), axis=2)[:, :, :3]
    write(tmp_path / "routing.npz", {"all_ids": ids.astype(np.uint8), "all_seq_offsets": np.array([0, 100])})
    asked = msgspec.structs.replace(SMALL, routing=tmp_path / "routing.npz", tokens=30, ranks_live=0)
    result = benchmark.run(asked)
    load = result["load"]
    assert not load["synthetic"] and (load["layers"], load["top_k"], load["experts"]) == (2, 3, 8)
    assert load["micro_steps"] == 3
    assert not result["links"]["measured"] and "--ranks-live 0" in result["links"]["why"]


def test_a_rival_without_a_plan_is_told_and_the_rest_goes_on() -> None:
    asked = msgspec.structs.replace(SMALL, ranks=5, slots=0, ranks_live=0)
    planning = benchmark.run(asked)["planning"]
    assert not planning["planners"]["eplb-oracle"]["measured"] and "EPLB" in planning["planners"]["eplb-oracle"]["why"]
    assert planning["planners"]["foresight"]["measured"] and planning["eplb_placement_us_per_layer"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regime": "wild"}, "wild"),
        ({"top_k": 17}, "--top-k"),
        ({"ranks_live": 1}, "--ranks-live"),
        ({"model": "x"}, "x"),
    ],
)
def test_what_does_not_fit_is_said_first(change: dict[str, object], words: str) -> None:
    begun: list[str] = []
    with pytest.raises(CallerError, match=words):
        benchmark.run(msgspec.structs.replace(SMALL, **change), begun.append)
    assert not begun


def test_a_rank_that_dies_or_is_late_is_told_and_no_child_stays() -> None:
    with pytest.raises(WorldError, match=r"rank \d ended with code 1 .*--ranks-live 0"):
        loopback.measure(2, (-1,))  # no tensor has so many bytes
    with pytest.raises(WorldError, match="no end in 0 s"):
        loopback.measure(2, (1,), within_s=0.1)
    assert not psutil.Process().children(recursive=True)


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = "from outrider.experts.loopback import measure; measure(2, (1 << 20,) * 100_000)"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    by_s = time.monotonic() + 60
    children: list[psutil.Process] = []
    try:
        while len(children) < 2 and time.monotonic() < by_s:
            children = psutil.Process(parent.pid).children(recursive=True)
            time.sleep(0.02)
        assert len(children) == 2
        time.sleep(0.3)  # they load torch, or send already
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
