"""The main job, end to end, on real processes: every call answered once, exact gradients, journals that replay."""

import os
from pathlib import Path

import pytest

from outrider import stack

pytestmark = pytest.mark.slow

ARM_KEYS = {
    "calls",
    "answered",
    "prompt_tokens",
    "output_tokens",
    "prompt_tokens_computed",
    "prompt_tokens_reused",
    "ttft_p50_s",
    "returning_ttft_p50_s",
    "workflow_completion_mean_s",
}
EXPERT_KEYS = {"loss_difference", "gradient_difference", "max_over_mean_static", "max_over_mean_balanced"}


def test_the_json_has_what_it_promises(quick_demo) -> None:  # type: ignore[no-untyped-def]
    figures = quick_demo.figures
    assert {"baseline", "outrider", "experts", "machine"} <= set(figures)
    assert set(figures["baseline"]) >= ARM_KEYS <= set(figures["outrider"])
    assert set(figures["experts"]) >= EXPERT_KEYS


@pytest.mark.parametrize("arm", ["baseline", "outrider"])
def test_every_call_is_answered_once(quick_demo, arm: str) -> None:  # type: ignore[no-untyped-def]
    figures = quick_demo.figures[arm]
    assert figures["answered"] == figures["calls"] > 0
    assert figures["arrivals"] == figures["sends"] == figures["calls"], "the gateway's journal and the client agree"
    assert figures["duplicates"] == figures["unended"] == 0
    assert figures["workflows"] == 2


def test_both_arms_did_the_same_work(quick_demo) -> None:  # type: ignore[no-untyped-def]
    before, after = quick_demo.figures["baseline"], quick_demo.figures["outrider"]
    assert after["prompt_tokens"] == pytest.approx(before["prompt_tokens"], rel=0.05)
    assert after["output_tokens"] == pytest.approx(before["output_tokens"], rel=0.05)
    assert after["same_answers"] == after["calls"], "greedy fp32 decoding from reused blocks is exact"


def test_outrider_computes_less_and_memory_is_why(quick_demo) -> None:  # type: ignore[no-untyped-def]
    before, after = quick_demo.figures["baseline"], quick_demo.figures["outrider"]
    assert after["prompt_tokens_computed"] < before["prompt_tokens_computed"]
    assert after["prompt_tokens_from_memory"] > 0 == before["prompt_tokens_from_memory"]
    assert sum(after["bytes_moved"].values()) > 0


def test_the_rl_step_is_exact_and_balanced(quick_demo) -> None:  # type: ignore[no-untyped-def]
    experts = quick_demo.figures["experts"]
    assert experts["gradient_difference"] <= 1e-4
    assert experts["loss_difference"] <= 1e-4
    assert 1.0 <= experts["max_over_mean_balanced"] < experts["max_over_mean_static"]


def test_every_journal_of_the_run_replays_byte_for_byte(quick_demo) -> None:  # type: ignore[no-untyped-def]
    journals = sorted(quick_demo.directory.rglob("*.jsonl"))
    names = {path.name.split(".")[0] for path in journals}
    assert names == {"agents", "memory", "experts"}, journals
    for path in journals:
        agreed, difference = stack.replay(path)
        assert difference is None, f"{path} line {difference}"
        assert agreed > 0, path


def test_the_table_says_plainly_what_it_is(quick_demo) -> None:  # type: ignore[no-untyped-def]
    printed = quick_demo.printed
    for words in ("embedded", "emulated", "random weights", "TTFT p50, returning turns", "What the agents wrote"):
        assert words in printed, words


def test_nothing_is_left_behind(quick_demo) -> None:  # type: ignore[no-untyped-def]
    """No process, socket, block file or shared-memory segment of the run."""
    mine = str(quick_demo.directory)
    running = [pid for pid in os.listdir("/proc") if pid.isdigit() and mine in _command_line(pid)]
    assert not running
    assert not [path for path in quick_demo.directory.rglob("*") if path.is_socket()]
    assert not list(quick_demo.directory.rglob("blocks"))
    assert not [name for name in os.listdir("/dev/shm") if "outrider" in name]


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
