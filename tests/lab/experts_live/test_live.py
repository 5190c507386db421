"""A small live run on two ranks, experts EMULATED slow: laws of exactness, order and overlap, and never a speed."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from outrider.experts.lane import Span
from outrider.lab.experts_live.rank import ARMS, Seen, Step
from outrider.lab.experts_live.routes import Case, counted, routed
from outrider.lab.experts_live.run import panels, run, summed
from outrider.lab.experts_live.timeline import ABOVE

RANKS, LAYERS, BATCHES = 2, 3, 3
CASE = Case(
    layers=LAYERS, experts=8, top_k=2, hidden=256, inner=512, tokens=64, length=32, batches=BATCHES, slots=1,
    row_s=5e-5, job_s=6e-3, rounds=1,
)  # fmt: skip
BALANCED = [arm for arm, way in ARMS.items() if way.balanced]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return run(CASE, RANKS, tmp_path_factory.mktemp("live"))


def steps(seen: list[Seen], arm: str) -> list[Step]:
    return [step for one in seen for step in one.steps if step.arm == arm]


def carried(step: Step) -> list[Span]:
    """What the lane did, in order: as many jobs as it had tickets."""
    return [span for span in step.spans if span.what not in ABOVE]


def test_all_arms_train_the_same(seen: list[Seen]) -> None:
    """Law 6: equal losses and gradients, whatever was moved and when; only the even gate sends tokens elsewhere."""
    for one in seen:
        for arm in ("static", *BALANCED):
            assert one.losses[arm] == pytest.approx(one.losses["static"], rel=1e-6)
            assert one.apart[arm] < 2e-5, arm
        assert one.apart["even gate"] > 1e-3, "comparing gradients notices nothing"


def test_every_token_is_computed_once_and_balanced(seen: list[Seen]) -> None:
    counts = counted(routed(CASE, RANKS), CASE.experts)
    everything = np.tile(counts.sum(axis=(2, 3)), (2, 1))  # recompute, then update
    for arm in ARMS:
        load = np.array(seen[0].loads[arm])
        assert (load.sum(axis=2) == everything).all(), arm
        assert load.shape == (2 * BATCHES, LAYERS, RANKS)
    static, ours = (np.array(seen[0].loads[arm]).max(axis=2).sum() for arm in ("static", "outrider"))
    assert ours < static and all(step.copies for arm in BALANCED for step in steps(seen, arm))


def test_spans_are_complete(seen: list[Seen]) -> None:
    """Every layer's experts ran in every pass, after a wait each; nothing overlaps on one lane, or in one's compute."""
    for one in (step for other in seen for step in other.steps):
        ran = Counter((span.what, span.layer) for span in one.spans if span.what in ("forward", "backward"))
        assert ran == {("forward", layer): 2 * BATCHES for layer in range(LAYERS)} | {
            ("backward", layer): BATCHES for layer in range(LAYERS)
        }
        waits = Counter(span.layer for span in one.spans if span.what == "wait" and span.layer >= 0)
        assert ARMS[one.arm].at_once or waits == dict.fromkeys(range(LAYERS), 3 * BATCHES)
        for kinds in (("forward", "backward"), {span.what for span in carried(one)}):
            mine = sorted((span.begin_s, span.end_s) for span in one.spans if span.what in kinds)
            assert all(a[1] <= b[0] for a, b in pairwise(mine))
        assert bool(carried(one)) == ARMS[one.arm].balanced


def test_a_wait_ends_after_what_it_waits_for(seen: list[Seen]) -> None:
    checked = 0
    for one in (step for arm in BALANCED for step in steps(seen, arm)):
        jobs, first = carried(one), one.first_ticket
        for ticket, begin_s, end_s in one.tickets:
            if ticket >= first:
                job = jobs[ticket - first]
                assert end_s >= job.end_s and begin_s <= end_s
                checked += 1
    assert checked > BATCHES


def test_transfers_run_beside_the_experts_of_others(seen: list[Seen]) -> None:
    """In a ring of two layers copies come while others compute; at once, and from the live gate, none does."""
    beside = {arm: sum(step.figures.under_s for step in steps(seen, arm)) for arm in BALANCED}
    assert beside["ring"] > 0
    assert beside["ring, at once"] == beside["reactive"] == 0


def test_what_is_summed_up(seen: list[Seen]) -> None:
    table = summed(seen, CASE)
    assert set(table) == set(ARMS)
    for arm, row in table.items():
        assert row["seconds"] == pytest.approx(max(step.seconds for step in steps(seen, arm)), abs=1e-3)
        assert row["times_static"] == pytest.approx(table["static"]["seconds"] / row["seconds"], abs=2e-3)
    assert table["outrider"]["fetched_bytes"] == table["outrider"]["copies"] * 3 * 256 * 512 * 4
    names = [panel.name for panel in panels(seen, CASE, ARMS)]
    assert names == list(ARMS)
