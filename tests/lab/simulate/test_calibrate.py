"""Calibration recovers the constants of engines that it does not know, and what it fits predicts another arm."""

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.lab.simulate import arm, calibrate, profiles
from outrider.lab.simulate.arm import Fleet
from outrider.lab.traces.workload import Workload
from outrider.lab.twins.speed import Profile, Speed
from outrider.memory.settings import Settings

RUNS = Path(__file__).parents[4] / "shared" / "data" / "vllm-real-runs"
TRUTH = Speed(per_step_s=0.03, per_prompt_token_s=0.002, per_decode_s=0.01, per_position_s=1e-6)
HIDDEN = Profile("hidden", TRUTH, "made up", 1024, 4096, 256, 4, hop_s=0.001)
GUESS = msgspec.structs.replace(HIDDEN, name="guess", speed=Speed(0.01, 0.0005, 0.03, 1e-7))
LIVE = Fleet(HIDDEN, 2, 1024, 4, "fcfs", "sticky")
OTHER = replace(LIVE, policy="srtf", routing="residency", memory=Settings(8 << 20, 64 << 20))


@pytest.mark.slow
def test_constants_are_recovered_and_predict_the_other_arm(
    make_reviews: Callable[..., Workload], tmp_path: Path
) -> None:
    """Fitted on one arm's journal, judged on the other: the shape of the claim about live runs, without their noise."""
    workload = make_reviews(workflows=6)
    arm.play(workload, LIVE, tmp_path, lambda: None)
    fit = calibrate.calibrate(tmp_path / "agents.jsonl", GUESS)
    assert fit.calls == len(list(workload.calls))
    assert fit.error_s < 0.05 * fit.typical_s
    found = fit.profile.speed
    for prompt, decodes, positions in ((256, 0, 30_000), (100, 2, 10_000), (0, 4, 1_200), (0, 1, 300)):
        assert found.step_s(prompt, decodes, positions) == pytest.approx(
            TRUTH.step_s(prompt, decodes, positions), rel=0.05
        )
    actual = arm.play(workload, OTHER, None, lambda: None)
    predicted = arm.play(workload, replace(OTHER, profile=fit.profile), None, lambda: None)
    assert predicted["workflow_completion_mean_s"] == pytest.approx(actual["workflow_completion_mean_s"], rel=0.03)
    guessed = arm.play(workload, replace(OTHER, profile=GUESS), None, lambda: None)
    assert guessed["workflow_completion_mean_s"] != pytest.approx(actual["workflow_completion_mean_s"], rel=0.1)


def test_too_few_answers_and_other_journals_are_refused(workload: Workload, tmp_path: Path) -> None:
    few = replace(workload, workflows=(replace(workload.workflows[0], calls=workload.workflows[0].calls[:3]),))
    arm.play(few, OTHER, tmp_path, lambda: None)
    with pytest.raises(CallerError, match="3 streamed answers with token counts, at least 8 are needed"):
        calibrate.calibrate(tmp_path / "agents.jsonl", GUESS)
    with pytest.raises(CallerError, match=r"the journal of 'memory'\. Name an agents\.jsonl"):
        calibrate.calibrate(tmp_path / "memory.jsonl", GUESS)


@pytest.mark.skipif(not RUNS.exists(), reason="needs ../shared/data/vllm-real-runs")
@pytest.mark.parametrize(
    ("folder", "name", "ranks"),
    [
        ("RTXPRO6000_Llama-3.1-8B", "rtxpro6000-llama-3.1-8b", 1),
        ("RTXPRO6000_Qwen3-30B-A3B-Instruct-2507", "rtxpro6000-qwen3-30b-a3b", 2),
    ],
)
def test_the_profiles_retrace_the_real_vllm_runs_they_were_fitted_to(folder: str, name: str, ranks: int) -> None:
    """300 real requests each: mean time to first token and to the last within 2 %, single ones within a few percent."""
    with lzma.open(RUNS / folder / "requests.jsonl.xz", "rt") as file:
        rows = sorted((json.loads(line) for line in file), key=lambda row: row["queued_ts"])
    seen = [
        calibrate.Observed(
            f"rank-{number % ranks}",
            row["queued_ts"],
            row["first_token_ts"],
            row["last_token_ts"],
            row["input_toks"],
            0,
            row["output_toks"],
        )
        for number, row in enumerate(rows)
    ]
    profile = msgspec.structs.replace(profiles.named(name), hop_s=0.0)  # the log is the engine's own
    came = np.array(calibrate.rerun(seen, calibrate.KV_TOKENS, profile, profile.speed))
    real = np.array([(one.first_s, one.ended_s) for one in seen])
    sent = np.array([one.dispatched_s for one in seen])[:, None]
    np.testing.assert_allclose((came - sent).mean(axis=0), (real - sent).mean(axis=0), rtol=0.02)
    total_s = (real - sent)[:, 1]
    off_s = np.abs(came - real)[:, 1]
    assert np.median(off_s / total_s) < 0.03
    assert np.sqrt(np.mean(off_s**2)) < 0.04 * np.sqrt(np.mean(total_s**2))
