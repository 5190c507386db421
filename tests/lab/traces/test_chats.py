"""ChatDev and tau2: who waits for whom, whose context grows, what equal beginnings share."""

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.lab.traces import read
from outrider.lab.traces.runs import expand, length, shared

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
START = datetime(2023, 9, 18, 11, 5, 33)
TEXT = st.text("abc ", max_size=200)
CALLS = st.lists(
    st.tuples(
        st.integers(0, 2),  # chats further
        st.sampled_from(["Programmer", "Tester"]),
        TEXT,
        TEXT,
        st.integers(0, 40),  # gap
        st.booleans(),  # is the sending known?
    ),
    min_size=1,
    max_size=10,
)


@FIXTURE
@given(st.lists(CALLS, min_size=1, max_size=3))
def test_chatdev_comes_back_as_a_chain_of_growing_chats(write: Any, runs: list[list[tuple]]) -> None:
    lines, gaps = [], []
    for number, rows in enumerate(runs):
        chat, now, tokens = 0, START, dict[tuple[int, str], int]()
        for seq, (further, role, prompt, said, gap, known) in enumerate(rows):
            chat, sent = chat + further, now + timedelta(seconds=gap)
            out = len(said) // 3  # equal texts have equal counts
            now = sent + timedelta(seconds=1 + out // 30)
            grown = tokens.get((chat, role), 40) + 4 + len(prompt) // 3
            tokens[chat, role] = grown + out
            lines.append(
                {"run": f"r{number}", "seq": seq, "parent": seq - 1 if seq else None, "chat": chat, "phase": f"p{chat}",
                 "role": role, "system": f"You are {role}. " * 5, "prompt": prompt, "completion": said,
                 "in_tok": grown, "out_tok": out, "t_recv": now.isoformat(),
                 "t_send": sent.isoformat() if known else None}
            )  # fmt: skip
            gaps.append(gap if seq and known else 0)
    workload = read(write(lines))
    assert [c.after_s for c in workload.calls] == gaps
    rows_of = iter(lines)
    for flow in workload.workflows:
        for call, before in zip(flow.calls, (None, *flow.calls), strict=False):
            line = next(rows_of)
            assert (call.role, call.stage, call.prompt_tokens, call.output_tokens) == (
                line["role"], line["phase"], line["in_tok"], line["out_tok"])  # fmt: skip
            assert call.parents == ((before.id,) if before else ())
            assert length(call.prompt) == call.prompt_tokens // 16
        speakers: dict[tuple[str, str], list] = {}
        for call in flow.calls:
            speakers.setdefault((call.stage, call.role), []).append(call)
        for own in speakers.values():
            for call, after in pairwise(own):  # a chat's next prompt begins with prompt and answer
                assert shared(call.chain, after.prompt) == min(length(call.chain), length(after.prompt))


def test_chatdev_shares_a_system_prompt_between_runs_and_not_between_roles(
    write: Any, samples: dict[str, list]
) -> None:
    line = {**samples["chatdev"][0], "system": "s" * 640, "in_tok": 200}
    other = {**line, "system": "t" * 640}
    lines = [{**line, "run": "a"}, {**line, "run": "b", "prompt": "else"}, {**other, "run": "c"}]
    a, b, c = read(write(lines)).calls
    assert 640 / 4.7 / 16 - 2 <= shared(a.prompt, b.prompt) <= 640 / 4.7 / 16
    assert shared(a.prompt, c.prompt) == 0


def test_chatdev_refuses_parents_that_are_not_there(write: Any, samples: dict[str, list]) -> None:
    first, second, _ = samples["chatdev"]
    for bad, says in (({**second, "parent": 7}, "line 2: its parent 7"), ({**second, "seq": 0}, "line 2: a second")):
        with pytest.raises(CallerError, match=says):
            read(write([first, bad]))


def test_chatdev_limit_keeps_whole_runs(write: Any, samples: dict[str, list]) -> None:
    lines = [{**line, "run": run} for line in samples["chatdev"] for run in ("a", "b")]  # interleaved
    workload = read(write(lines), limit=1)
    assert [(flow.name, len(flow.calls)) for flow in workload.workflows] == [("a", 3)]


def conversation(*messages: dict, name: str = "a", start: datetime = START) -> list[dict]:
    """The lines of one session; `after` of a message is its distance to the one before."""
    now, lines = start, [{"kind": "session", "session": name, "start": start.isoformat(), "user_scenario": {"a": 1}}]
    for number, message in enumerate(messages):
        now += timedelta(seconds=message.get("after", 1.0))
        rest = {key: value for key, value in message.items() if key != "after"}
        lines.append({"kind": "msg", "i": number, "t": now.isoformat(), **rest})
    return lines


SYSTEM = {"kind": "system", "agent_policy": "p" * 400, "user_guidelines": "g" * 200}


def test_tau2_roles_take_turns_and_tools_take_time(write: Any) -> None:
    tool = {"role": "tool", "text": "a long result of a tool " * 4, "requestor": "assistant"}
    lines = conversation(
        {"role": "agent", "text": "Hi!", "after": 0.25},
        {"role": "user_sim", "text": "My order is late", "in_tok": 100, "out_tok": 10},
        {"role": "agent", "tool_calls": [{"name": "find"}, {"name": "get"}], "in_tok": 200, "out_tok": 20},
        {**tool, "after": 0.5},
        {**tool, "after": 0.125},
        {"role": "agent", "text": "It will come", "in_tok": 290, "out_tok": 12, "after": 3.0},
        {"role": "user_sim", "text": "Good", "in_tok": 125, "out_tok": 3},
    )
    (flow,) = read(write([SYSTEM, *lines])).workflows
    assert [call.role for call in flow.calls] == ["user_sim", "agent", "agent", "user_sim"]
    assert [call.stage for call in flow.calls] == ["after message", "after message", "after tool", "after message"]
    assert [call.after_s for call in flow.calls] == [0.25, 0.0, 0.625, 0.0]
    assert [call.parents for call in flow.calls] == [(), ("a/1",), ("a/2",), ("a/5",)]
    user, agent, again, user_again = flow.calls
    assert shared(user.prompt, agent.prompt) == 0  # contexts of their own
    assert shared(agent.chain, again.prompt) == length(agent.chain)
    assert shared(user.chain, user_again.prompt) == min(length(user.chain), length(user_again.prompt))


def test_tau2_sessions_share_the_agents_policy_and_keep_the_harness_starts(write: Any) -> None:
    say = {"role": "agent", "text": "x" * 40, "in_tok": 160, "out_tok": 5}
    first = conversation(say, name="a", start=START + timedelta(seconds=9))
    second = conversation({**say, "text": "y" * 40}, say, name="b", start=START)
    empty = conversation({"role": "agent", "text": "Hi!"}, name="silent")
    workload = read(write([SYSTEM, *first, *second, *empty]))
    assert [(flow.name, flow.start_s) for flow in workload.workflows] == [("b", 0.0), ("a", 9.0)]
    b, _, a = workload.calls
    assert shared(a.prompt, b.prompt) == 10  # first prompts hold nothing but the policy
    assert [flow.name for flow in read(write([SYSTEM, *first, *second]), limit=1).workflows] == ["b"]


@FIXTURE
@given(st.lists(st.sampled_from(["user", "agent", "tool of user", "tool of agent"]), max_size=14))
def test_tau2_contexts_grow_and_never_mix(write: Any, script: list[str]) -> None:
    """Whoever speaks sees what both said and its own tools; counts grow as contexts do."""
    messages, seen = [], {"agent": 50, "user_sim": 30}
    for number, who in enumerate(script):
        role = "agent" if who.endswith("agent") else "user_sim"
        if who.startswith("tool"):
            requestor = "assistant" if role == "agent" else "user"
            messages += [
                {"role": role, "tool_calls": [{"name": f"t{number}"}], "in_tok": seen[role], "out_tok": 7},
                {"role": "tool", "text": f"result {number}", "requestor": requestor},
            ]
            seen[role] += 30
        else:
            messages.append({"role": role, "text": f"message {number}", "in_tok": seen[role], "out_tok": 9})
            seen = {role: tokens + 20 for role, tokens in seen.items()}
    lines = [SYSTEM, *conversation(*messages)]
    if not script:
        with pytest.raises(CallerError, match="no call"):
            read(write(lines))
        return
    calls = list(read(write(lines)).calls)
    assert [call.parents for call in calls] == [(), *((call.id,) for call in calls[:-1])]
    for role in seen:
        own = [call for call in calls if call.role == role]
        for call, after in pairwise(own):
            assert shared(call.chain, after.prompt) == min(length(call.chain), length(after.prompt))
    ids = {role: {block for c in calls if c.role == role for block in expand(c.chain)} for role in seen}
    assert not ids["agent"] & ids["user_sim"]


def test_tau2_refuses_messages_without_a_session_and_mixed_clocks(write: Any, samples: dict[str, list]) -> None:
    system, session, greeting, said = samples["tau2"]
    with pytest.raises(CallerError, match="line 2: a message before any session"):
        read(write([system, said]))
    with pytest.raises(CallerError, match="line 4: "):
        read(write([system, session, greeting, {**said, "t": "2025-08-01T16:16:38+02:00"}]))
