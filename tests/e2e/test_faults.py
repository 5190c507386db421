"""Law 8, live: an engine killed loses no workflow and duplicates no answer; a dead memory server costs time only."""

from pathlib import Path

import pytest

from outrider.lab.demo import arms, caller, workload
from outrider.lab.demo.run import QUICK

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workflows() -> list[workload.Workflow]:
    return workload.build(workload.default_repo(), workload.QUICK)


@pytest.fixture(scope="module")
def undisturbed(workflows: list[workload.Workflow], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The answers of a run in which nothing dies."""
    with arms.running("outrider", QUICK, tmp_path_factory.mktemp("calm")) as arm:
        figures = arms.play(arm, QUICK.model, workflows, lambda answer: None)
    answers: dict[str, str] = figures["answers"]
    return answers


@pytest.mark.parametrize("victim", ["engine", "memory"])
def test_a_killed_process_costs_time_never_an_answer(
    workflows: list[workload.Workflow], undisturbed: dict[str, str], victim: str, tmp_path: Path
) -> None:
    seen: list[caller.Answer] = []
    with arms.running("outrider", QUICK, tmp_path) as arm:
        assert arm.memory is not None
        target = arm.engines[0] if victim == "engine" else arm.memory

        def strike(answer: caller.Answer) -> None:
            """Kill it in the middle of the run; an engine while it has a call in flight."""
            seen.append(answer)
            if len(seen) >= 4 and target.running:
                busy = arms.gateway_stats(arm)["engines"][arm.engine_urls[0]]["running"] > 0
                if busy or victim == "memory":
                    target.kill()

        figures = arms.play(arm, QUICK.model, workflows, strike)
        assert not target.running
    if victim == "engine":
        assert figures["failed_attempts"] >= 1, "a call was in flight on the engine that was killed"
    assert figures["answered"] == figures["calls"]
    assert figures["workflows"] == len(workflows)
    assert figures["arrivals"] == figures["sends"] >= figures["calls"], "the gateway's journal and the client agree"
    assert figures["duplicates"] == figures["unended"] == 0, "every call that arrived ended exactly once (law 8)"
    assert figures["answers"] == undisturbed, "the same words as if nothing had died"
