"""The demo's Outrider arm on two real vLLM servers: every call answered once, memory used, journals that replay."""

import dataclasses
import sys
from pathlib import Path

from outrider import stack
from outrider.lab.demo import arms, workload
from outrider.lab.demo.run import QUICK


def test_the_outrider_arm_runs_on_vllm(tiny_moe: Path, tmp_path: Path) -> None:
    fleet = dataclasses.replace(QUICK, vllm=arms.Vllm(Path(sys.executable), tiny_moe))
    workflows = workload.build(workload.default_repo(), workload.QUICK)
    answers = []
    with arms.running("outrider", fleet, tmp_path) as arm:
        figures = arms.play(arm, fleet.model, workflows, answers.append)
    calls = sum(workflow.calls for workflow in workflows)
    assert len(answers) == figures["answered"] == figures["calls"] == figures["arrivals"] == calls
    assert figures["duplicates"] == figures["unended"] == figures["failed_attempts"] == 0
    assert 0 < figures["prompt_tokens_from_memory"] <= figures["prompt_tokens_reused"] < figures["prompt_tokens"]
    assert sum(figures["prompt_tokens_from"].values()) == figures["prompt_tokens"]
    assert figures["memory"]["wants_met"] > 0, "the gateway's wants found the contexts by their call ids"
    for journal in ("agents.jsonl", "memory.jsonl"):
        agreed, difference = stack.replay(tmp_path / "outrider" / journal)
        assert agreed > 0 and difference is None
