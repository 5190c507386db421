"""The journal of a simulated run, read as a trace, is the load that was simulated."""

from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.lab.simulate import arm, profiles
from outrider.lab.traces import read
from outrider.lab.traces.blocks import Ids, PrefixTree, answered
from outrider.lab.traces.runs import length, shared
from outrider.lab.traces.workload import Call, Workflow, Workload


def workload(reviewers: int, turns: int, pauses: list[float]) -> Workload:
    """plan -> reviews beside each other -> a conversation of some turns that knows them all."""
    ids = Ids()
    tree = PrefixTree(16, ids)

    def call(name: str, parents: tuple[str, ...], pieces: list[str], after_s: float, next_: list[str]) -> Call:
        tokens = 160 * len(pieces) + 5
        prompt = tree.lay([(piece, 1) for piece in pieces], tokens)
        following = tree.lay([(piece, 1) for piece in next_], 160 * len(next_) + 5)
        chain = answered(prompt, following, (tokens + 50) // 16, ids)
        return Call(name, name.rstrip("0123456789"), name, parents, after_s, tokens, 50, prompt, chain, 64)

    calls = [call("plan", (), ["system", "plan"], 0.0, [])]
    reviews = [f"review{n}" for n in range(reviewers)]
    calls += [call(name, ("plan",), ["system", name], 0.0, []) for name in reviews]
    before, said = tuple(reviews), ["system", "fix"]
    for turn in range(turns):
        longer = [*said, f"answer {turn}", f"tool {turn}"]
        calls.append(call(f"fix{turn}", before, said, pauses[turn] if turn else 0.0, longer))
        before, said = (f"fix{turn}",), longer
    return Workload("ours", "made here", 16, (Workflow("w", 0.0, tuple(calls)),), ()).check()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(0.1, 20.0), min_size=4, max_size=4))
def test_a_simulated_journal_is_the_load_that_was_simulated(
    tmp_path_factory: Any, reviewers: int, turns: int, pauses: list[float]
) -> None:
    asked = workload(reviewers, turns, pauses)
    directory: Path = tmp_path_factory.mktemp("run")
    fleet = arm.Fleet(profiles.named(profiles.DEFAULT), 2, 65536, 8, "srtf", "residency")
    arm.play(asked, fleet, directory, lambda: None)
    found = read(directory / "agents.jsonl")
    stage = {call.id: call.stage for call in found.calls}
    for call, again in zip(
        sorted(asked.calls, key=lambda call: call.stage), sorted(found.calls, key=lambda call: call.stage), strict=True
    ):
        assert (again.role, again.stage, again.max_tokens) == (call.role, call.stage, call.max_tokens)
        assert (again.prompt_tokens, again.output_tokens) == (call.prompt_tokens, call.output_tokens)
        assert length(again.prompt) == length(call.prompt)
        assert Counter(stage[parent] for parent in again.parents) == Counter(call.parents)
        assert -1e-6 < again.after_s - call.after_s < 0.1  # and the way to the gateway
    asked_by, found_by = ({call.stage: call for call in load.calls} for load in (asked, found))
    for a in asked_by:
        for b in asked_by:
            assert shared(asked_by[a].prompt, asked_by[b].prompt) == shared(found_by[a].prompt, found_by[b].prompt)
