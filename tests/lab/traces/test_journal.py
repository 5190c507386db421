"""A journal of ours becomes the load that it served: the same one, however the run went."""

import json
import random
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.agents.prompt import PIECE
from outrider.errors import CallerError
from outrider.lab.traces import Workflow, Workload, read
from outrider.lab.traces.runs import length, shared

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
HEADER = {"policy": "agents", "rank": 0, "settings": {}, "outrider": "0.1.0", "journal": 1}
TOKENS_PER_CHAR = 0.25


class Run:
    """A run under way: what was asked, and a journal of it with times and ids of its own."""

    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)
        self.events: list[tuple[float, int, dict[str, Any]]] = [(0.0, 0, HEADER)]

    def line(self, now: float, event: dict[str, Any], *commands: dict[str, Any]) -> None:
        self.events.append((now, len(self.events), {"now": now, "event": event, "commands": list(commands)}))

    def call(
        self,
        at_s: float,
        texts: list[str],
        out: int = 20,
        ending: dict[str, Any] | None = None,
        who: dict[str, Any] | None = None,
        **more: Any,
    ) -> tuple[str, float]:
        """One call of these messages, ended after a time of this run's own; its id and when its answer ended."""
        name = f"call-{self.draws.getrandbits(64):016x}"
        chain, chars = chained(texts), sum(map(len, texts))
        asked = {"id": name, "identity": who or {}, "path": "/v1/chat/completions", "chars": chars, "chain": chain}
        end_s = at_s + self.draws.uniform(0.5, 9.0)
        usage = {"prompt_tokens": round(chars * TOKENS_PER_CHAR), "output_tokens": out, "estimated": False}
        settle = {"type": "Settle", "call": name, "engine": "e", "status": 200, "usage": usage, **(ending or {})}
        self.line(at_s, {"type": "Arrived", "call": {**asked, "max_tokens": 48, **more}}, {"type": "Wake", "at_s": 1.0})
        self.line(end_s, {"type": "Finished", "call": name, "attempt": 1, "status": 200, "usage": usage}, settle)
        return name, end_s

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [line for _, _, line in sorted(self.events, key=lambda event: event[:2])]


def chained(texts: list[str]) -> list[list[Any]]:
    """Pieces of messages by digests that cover all before, as the gateway makes them."""
    chain, tip = [], b""
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            tip = blake2b(tip + piece.encode(), digest_size=8).digest()
            chain.append([tip.hex(), len(piece)])
    return chain


def say(name: str, chars: int) -> str:
    return (f"{name} " * chars)[:chars]


def review(run: Run, flow: int, at_s: float, reviewers: int, turns: int, pauses: tuple[float, ...]) -> None:
    """planner -> reviewers beside each other, two turns each -> reviser of some turns -> tester."""

    def talk(role: str, which: int, start_s: float, asks: int) -> float:
        """All turns of one agent; when its last answer ended."""
        texts = [say("system", 120), say(f"{flow} {role} {which}", 300 + 90 * which)]
        for turn in range(asks):
            wait_s = pauses[(which + turn) % len(pauses)] if turn else run.draws.uniform(0.0, 0.004)
            who = {"workflow": f"review-{flow}", "role": role, "stage": f"{role}/{turn}"}
            _, start_s = run.call(start_s + wait_s, texts, who=who)
            texts = [*texts, say(f"answer {flow} {role} {which} {turn}", 90), say(f"tool {turn}", 200)]
        return start_s

    planned_s = talk("planner", 0, at_s, 1)
    reviewed_s = max(talk("reviewer", which, planned_s, 2) for which in range(reviewers))
    talk("tester", 0, talk("reviser", 0, reviewed_s, turns), 1)


SHAPES = st.tuples(
    st.integers(1, 3),  # workflows
    st.integers(1, 4),  # reviewers
    st.integers(1, 3),  # turns of the reviser
    st.lists(st.floats(0.5, 30.0), min_size=1, max_size=3).map(tuple),
)


def play(seed: int, shape: tuple[int, int, int, tuple[float, ...]]) -> Run:
    run = Run(seed)
    for flow in range(shape[0]):
        review(run, flow, 2.0 * flow, *shape[1:])
    return run


def without_seconds(workload: Workload) -> tuple[Workflow, ...]:
    return tuple(
        replace(flow, start_s=0.0, calls=tuple(replace(call, after_s=0.0) for call in flow.calls))
        for flow in workload.workflows
    )


@FIXTURE
@given(SHAPES, st.integers(0, 2**32), st.integers(0, 2**32))
def test_two_ways_of_serving_one_load_are_one_workload(write: Any, shape: Any, seed: int, other_seed: int) -> None:
    """Other ids, other service times, other order of arrival: the same calls, parents, blocks; the pauses they had."""
    one, other = read(write(play(seed, shape).lines)), read(write(play(other_seed, shape).lines))
    assert without_seconds(one) == without_seconds(other)
    for a, b in zip(one.calls, other.calls, strict=True):
        assert a.after_s == pytest.approx(b.after_s, abs=0.005)
    workflows, reviewers, turns, pauses = shape
    assert len(one.workflows) == workflows
    for flow in one.workflows:
        by_stage: dict[str, list] = {}
        for call in flow.calls:
            by_stage.setdefault(call.stage, []).append(call)
        plan, test = by_stage["planner/0"][0], by_stage["tester/0"][0]
        first, second = by_stage["reviewer/0"], by_stage["reviewer/1"]
        revised = [by_stage[f"reviser/{turn}"][0] for turn in range(turns)]
        assert plan.parents == ()
        assert [call.parents for call in first] == [(plan.id,)] * reviewers
        assert sorted(call.parents for call in second) == sorted((call.id,) for call in first)
        assert set(revised[0].parents) == {call.id for call in second}
        assert [call.parents for call in revised[1:]] == [(call.id,) for call in revised[:-1]]
        assert test.parents == (revised[-1].id,)
        for call in second:
            (before,) = (c for c in first if c.id == call.parents[0])
            assert shared(before.chain, call.prompt) == length(before.chain)
            assert min(abs(call.after_s - pause) for pause in pauses) < 1e-6
        for a in first:
            for b in first:
                assert a is b or shared(a.prompt, b.prompt) <= 2  # 120 characters of system prompt, 30 tokens
        assert all(call.after_s < 0.005 for call in (*first, revised[0], test))
        assert all(length(c.prompt) == c.prompt_tokens // 16 and c.max_tokens == 48 for c in flow.calls)


def only(workload: Workload) -> dict[str, Any]:
    """Calls of the only workflow by role."""
    (flow,) = workload.workflows
    return {call.role: call for call in flow.calls}


def who(role: str, **more: Any) -> dict[str, Any]:
    return {"workflow": "w", "role": role, **more}


def test_a_parent_by_name_is_believed(write: Any) -> None:
    """c began after b was answered, and says that it waited for a."""
    run = Run(1)
    a, a_s = run.call(0.0, ["a" * 200], who=who("a"))
    _, b_s = run.call(a_s, ["b" * 200], who=who("b"))
    run.call(b_s + 1.0, ["c" * 200], who=who("c", parent=a))
    run.call(b_s + 20.0, ["d" * 200], who=who("d", parent="an agent's id, no call's"))
    calls = only(read(write(run.lines)))
    assert calls["c"].parents == (calls["a"].id,)
    assert calls["c"].after_s == pytest.approx(b_s + 1.0 - a_s)
    assert set(calls["d"].parents) == {calls["b"].id, calls["c"].id}


def test_a_conversation_waits_for_what_it_launched_and_for_no_other(write: Any) -> None:
    """Two main agents; the first one's answer launches a sub-agent, and its next turn comes after that."""
    run = Run(2)
    first, other = ["m" * 300], ["n" * 300]
    run.call(0.0, other, who=who("other"))
    _, first_s = run.call(0.01, first, who=who("main"))
    _, sub_s = run.call(first_s + 0.2, ["s" * 200], who=who("sub"))
    run.call(sub_s + 1.0, [*first, "answer", "go on"], who=who("again"))
    calls = only(read(write(run.lines)))
    assert calls["main"].id in calls["sub"].parents
    assert calls["again"].parents == (calls["sub"].id,)
    assert calls["again"].after_s == pytest.approx(1.0)
    assert calls["other"].id not in calls["again"].parents


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ({"status": 400}, "1 of 2 calls were answered with an error"),
        ({"usage": None}, "1 of 2 calls were answered without token counts"),
        ({"type": "Reject", "status": 429}, "1 of 2 calls were rejected"),
        ({"type": "Relay"}, "1 of 2 calls were refused by the engine"),
        ({"type": "Break"}, "1 of 2 calls were broken in mid-answer"),
        ({"type": "Abort"}, "1 of 2 calls were given up by their client"),
        ({"type": "Hold"}, "1 of 2 calls were still open at the journal's end"),
    ],
)
def test_a_call_that_was_not_answered_is_left_out_and_noted(write: Any, ending: dict[str, Any], says: str) -> None:
    run = Run(3)
    _, end_s = run.call(0.0, ["a" * 200], who=who("a"))
    run.call(end_s, ["b" * 200], who=who("b"), ending=ending)
    workload = read(write(run.lines))
    assert list(only(workload)) == ["a"]
    assert any(note.startswith(says) for note in workload.notes)


def test_a_call_sent_again_began_when_it_was_first_sent(write: Any) -> None:
    run = Run(4)
    _, end_s = run.call(0.0, ["a" * 200], who=who("a"))
    _, failed_s = run.call(end_s + 2.0, ["b" * 200], who=who("b"), ending={"type": "Reject", "status": 429})
    run.call(failed_s + 1.0, ["b" * 200], who=who("b"))
    calls = only(read(write(run.lines)))
    assert calls["b"].after_s == pytest.approx(2.0)


def test_a_torn_last_line_is_ignored_and_a_damaged_one_is_not(write: Any) -> None:
    run = Run(5)
    run.call(0.0, ["a" * 200], who=who("a"))
    path = write(run.lines)
    path.write_bytes(path.read_bytes() + b'{"now": 7.0, "ev')
    assert list(only(read(path))) == ["a"]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CallerError, match="line 4: "):
        read(path)


def test_the_journal_of_another_system_is_refused(write: Any) -> None:
    with pytest.raises(CallerError, match=r"line 1: the journal of 'memory'; calls are in agents\.jsonl"):
        read(write([{**HEADER, "policy": "memory"}]))
    with pytest.raises(CallerError, match="no call in this outrider trace"):
        read(write([HEADER]))


def test_nameless_calls_are_one_workflow_where_one_goes_on_from_the_other(write: Any) -> None:
    """And equal names of two tenants are two workflows."""
    run = Run(6)
    _, end_s = run.call(0.0, ["a" * 300])
    run.call(end_s + 1.0, ["a" * 300, "answer", "more"])
    run.call(0.5, ["b" * 300])
    run.call(100.0, ["c" * 300], who={"workflow": "w"}, tenant="t1")
    run.call(101.0, ["c" * 300], who={"workflow": "w"}, tenant="t2")
    workload = read(write(run.lines))
    assert [len(flow.calls) for flow in workload.workflows] == [2, 1, 1, 1]
    assert [flow.name for flow in workload.workflows[2:]] == ["t1/w", "t2/w"]


def test_prompts_that_part_inside_a_long_message_share_half_a_piece(write: Any) -> None:
    run = Run(7)
    page = say("page", PIECE)
    _, end_s = run.call(0.0, [page + say("left", 800)], who=who("a"))
    run.call(end_s, [page + say("right", 800)], who=who("b"))
    run.call(end_s, [say("another page", PIECE) + say("left", 800)], who=who("c"))
    calls = only(read(write(run.lines)))
    assert shared(calls["a"].prompt, calls["b"].prompt) == (PIECE + 400) * TOKENS_PER_CHAR // 16
    assert shared(calls["a"].prompt, calls["c"].prompt) == 0


def test_what_a_very_long_prompt_has_beyond_its_chain_is_its_own(write: Any) -> None:
    run = Run(8)
    for role in "ab":
        run.call(0.0, ["x" * 640], who=who(role), chars=1280, ending=long_usage())
    calls = only(read(write(run.lines)))
    assert length(calls["a"].prompt) == 20
    assert shared(calls["a"].prompt, calls["b"].prompt) == 10


def long_usage() -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 320, "output_tokens": 1, "estimated": True}}


def test_estimated_counts_and_deadlines_are_noted(write: Any) -> None:
    run = Run(9)
    run.call(0.0, ["x" * 640], who=who("a", deadline_s=9.0, klass="batch"), ending=long_usage())
    workload = read(write(run.lines))
    assert any("1 calls have token counts that the gateway estimated" in note for note in workload.notes)
    assert any("deadlines" in note for note in workload.notes)
    assert workload.workflows[0].klass == "batch"


def test_nothing_of_a_journal_but_the_load_is_kept(write: Any) -> None:
    """Ids of the gateway are random: the workload's are not."""
    run = Run(10)
    name, _ = run.call(0.0, ["x" * 640], who=who("a"))
    workload = read(write(run.lines))
    assert name not in json.dumps([call.id for call in workload.calls])
    assert [call.id for call in workload.calls] == ["w/0"]
