"""Plots: what they tell is recounted, labels never cover each other, equal input gives equal bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from outrider.errors import CallerError
from outrider.experts import draw, front, picture, study
from outrider.experts.front import Front, Point
from outrider.experts.places import put_labels
from outrider.experts.schedule import StepPlan

pytestmark = pytest.mark.slow
ASKED = study.Study(ranks=4, ranks_per_node=2, slots=1, microbatch_tokens=96)
FIRST_BYTES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def load(experts: int, ranks: int, steps: int = 4, layers: int = 2, sigma: float = 0.8) -> Any:
    """counts_MLRE of log-normal popularity, drawn for each layer and micro-step; half of the experts get nothing."""
    rng = np.random.default_rng(5)
    heat = rng.lognormal(0, sigma, (steps, layers, 1, experts)) * (np.arange(experts) % 2)
    return np.broadcast_to(np.round(12 * heat), (steps, layers, ranks, experts)).astype(np.int64)


def planned(counts_MLRE: Any, asked: study.Study = ASKED) -> StepPlan:
    return study.plan(study.Counted(counts_MLRE, 0.0, ()), asked)[0]


@pytest.fixture(scope="module")
def counts_MLRE() -> Any:
    return load(experts=16, ranks=4)


@pytest.fixture(scope="module")
def found(counts_MLRE: Any) -> StepPlan:
    return planned(counts_MLRE)


@pytest.fixture(scope="module")
def others(counts_MLRE: Any, found: StepPlan) -> Front:
    return front.front(counts_MLRE, ASKED, found)


def over_mean(load_R: Sequence[int], open_ranks: int) -> list[float]:
    return [load * open_ranks / max(sum(load_R), 1) if sum(load_R) else 1.0 for load in load_R]


@pytest.mark.parametrize("excluded", [(), (1,)])
@pytest.mark.parametrize("ragged", [False, True])
def test_loads_are_a_plain_recount(ragged: bool, excluded: tuple[int, ...]) -> None:
    counts_MLRE = load(experts=16, ranks=4, steps=3)
    counts_MLRE[:, :, 0] *= 1 + 4 * ragged
    counts_MLRE[1, 0] = 0  # an idle layer counts as even
    asked = study.Study(ranks=4, ranks_per_node=4, slots=1, excluded=excluded)
    plan = planned(counts_MLRE, asked)
    assert (picture.counts_of(plan) == counts_MLRE).all()
    over = picture.loads(plan, counts_MLRE, excluded)
    open_ranks = [r for r in range(4) if r not in excluded]
    homes = sorted(open_ranks[e % len(open_ranks)] for e in range(16))
    for layer in range(2):
        for m in range(3):
            home, real = [0] * 4, [0] * 4
            for expert in range(16):
                home[homes[expert]] += int(counts_MLRE[m, layer, :, expert].sum())
            for at_layer, at_m, _, _, rank, tokens in plan.quota.tolist():
                real[rank] += tokens * ((at_layer, at_m) == (layer, m))
            for told, by_rank in ((over.home, home), (over.planned, real)):
                expected = over_mean(by_rank, len(open_ranks))
                assert told[layer, m, open_ranks] == pytest.approx([expected[r] for r in open_ranks])
                assert np.isnan(told[layer, m, list(excluded)]).all()
            total = sum(real)
            least = -(-total // len(open_ranks)) * len(open_ranks) / total if total else 1.0
            assert over.limit[layer, m] == pytest.approx(least)
    worst = over.worst_layer()
    assert np.nanmax(over.home[worst], axis=1).mean() >= np.nanmax(over.home[1 - worst], axis=1).mean()


points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_nobody_beats(some: list[tuple[int, int]]) -> None:
    every = tuple(Point("static", 0, "balance", 1 + y / 8, 1.0, x, x) for x, y in some)
    best = Front(every, ()).best()
    for point in every:
        assert any(b.bytes_moved <= point.bytes_moved and b.imbalance <= point.imbalance for b in best)
    for b in best:
        assert not any(
            p.bytes_moved <= b.bytes_moved
            and p.imbalance <= b.imbalance
            and (p.bytes_moved, p.imbalance) != (b.bytes_moved, b.imbalance)
            for p in every
        )
    assert [b.bytes_moved for b in best] == sorted({b.bytes_moved for b in best})


def test_every_point_is_what_the_study_of_that_planner_says(counts_MLRE: Any, others: Front, tmp_path: Path) -> None:
    """As `outrider experts plan --planner NAME --slots N` would: the same counts from a file of routes."""
    assert not others.missing
    named = [(point.planner, point.slots) for point in others.points]
    assert named[0] == ("foresight", 1) and others.points[0].asked
    assert sorted(named) == sorted([*(("foresight", n) for n in (0, 1, 2, 4)), *((name, 1) for name in front.RIVALS)])
    for point in others.points:
        asked = study.Study(ranks=4, ranks_per_node=2, slots=point.slots, planner=point.planner)
        plan = planned(counts_MLRE, asked)
        load_LMR = plan.load_of_ranks()
        assert point.imbalance == pytest.approx((load_LMR.max(axis=2) / load_LMR.mean(axis=2)).mean())
        assert point.bytes_moved == point.copies_moved * 3 * 2048 * 768 * 2
        held, copies = None, 0
        homes = np.arange(16) // 4
        for m in range(plan.shape[1]):
            now = [{(r, e) for r in range(4) for e in plan.hosts[layer, m, r].tolist() if e >= 0} for layer in (0, 1)]
            held = held or [{(int(r), e) for e, r in enumerate(homes)}] * 2
            copies += sum(len(new - old) for new, old in zip(now, held, strict=True))
            held = now
        assert point.copies_moved == copies, point.planner


def test_rivals_that_have_no_plan_are_told(counts_MLRE: Any) -> None:
    asked = study.Study(ranks=5, ranks_per_node=5, slots=0)
    counts = load(experts=16, ranks=5)
    some = front.front(counts, asked, planned(counts, asked))
    assert [name for name, _ in some.missing] == ["split", "eplb", "eplb-oracle"]
    assert all("EPLB" in why for _, why in some.missing)
    without = front.front(counts, study.Study(5, 5, slots=1, excluded=(2,)), planned(counts, asked))
    assert {point.planner for point in without.points} == {"foresight"}


@pytest.mark.parametrize("kind", draw.KINDS)
def test_equal_input_equal_bytes(kind: str, counts_MLRE: Any, found: StepPlan, others: Front, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["axes.facecolor"] = "red"  # a person's own style must not change the picture
    try:
        told = picture.picture("a$b$^.npz", ASKED, found, counts_MLRE)
        draw.draw(tmp_path / f"one.{kind}", told, others)
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    finally:
        matplotlib.rcParams["axes.facecolor"] = before["axes.facecolor"]
    draw.draw(tmp_path / f"two.{kind.upper()}", told, others)
    one, two = (tmp_path / name for name in (f"one.{kind}", f"two.{kind.upper()}"))
    assert one.read_bytes() == two.read_bytes() and one.read_bytes().startswith(FIRST_BYTES[kind])
    assert dict(matplotlib.rcParams) == before


def test_the_words_say_what_was_planned(counts_MLRE: Any, found: StepPlan, others: Front, tmp_path: Path) -> None:
    told = picture.picture("routing.npz", ASKED, found, counts_MLRE, layer=0)
    draw.draw(tmp_path / "plan.svg", told, others)
    text = (tmp_path / "plan.svg").read_text()
    for words in (
        "routing.npz",
        "foresight, objective balance, 1 spare slot a rank; EP 4 in 2 nodes; 2 layers, 4 micro-steps of 96 tokens",
        f"rank load / mean: {np.nanmin(told.loads.home[0]):.3f} to {np.nanmax(told.loads.home[0]):.3f}",
        "Layer 0 of 2, planned",
        "Bytes are modelled",
        "qwen3-30b-a3b, 9.44 MB",
        "bytes of copies moved in the step, modelled",
        *(name for name in front.RIVALS),
    ):
        assert f"<!-- {words}" in text or words in text, words


ODD = {
    "one": load(8, 2, steps=1, layers=1),
    "even": load(8, 4, sigma=0),
    "idle": np.zeros((2, 1, 2, 4), dtype=np.int64),
    "wide": load(8, 2, steps=90, layers=1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_are_drawn(name: str, tmp_path: Path) -> None:
    """Warnings are errors here: matplotlib's and numpy's too."""
    counts_MLRE = ODD[name]
    asked = study.Study(counts_MLRE.shape[2], counts_MLRE.shape[2], microbatch_seqs=2)
    plan = planned(counts_MLRE, asked)
    told = picture.picture(name, asked, plan, counts_MLRE)
    draw.draw(tmp_path / "plan.png", told, front.front(counts_MLRE, asked, plan))
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)), min_size=1, max_size=14))
def test_labels_cover_nothing(spots: list[tuple[float, float]]) -> None:
    figure = Figure(figsize=(6, 4), dpi=150)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    put_labels(figure, axes, [(x, y, f"planner {i}") for i, (x, y) in enumerate(spots)], [], 0.5)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    inside = axes.get_window_extent(renderer)
    assert boxes, "a label found no room among few marks"
    for i, box in enumerate(boxes):
        assert inside.containsx(box.x0) and inside.containsx(box.x1)
        assert inside.containsy(box.y0) and inside.containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        for spot in axes.transData.transform(spots):
            assert not box.contains(*spot)


def test_what_cannot_be_drawn_is_said_first(counts_MLRE: Any, found: StepPlan) -> None:
    for name in ("plan.jpg", "plan", "png"):
        with pytest.raises(CallerError, match=r"\.png, \.svg and \.pdf"):
            draw.ready(Path(name))
    with pytest.raises(CallerError, match="2 layers"):
        picture.picture("routing.npz", ASKED, found, counts_MLRE, layer=2)
