"""Claude Code sessions: chains, gaps, sub-agents beside each other, ids apart between sessions."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.lab.traces import read
from outrider.lab.traces.claude_code import OUTPUT_S, SETUP_S
from outrider.lab.traces.runs import collect, expand, length, shared

SIZE = 64


def request(t: float, blocks: list[list[int]], out: int = 10, api_time: float | None = 1.0, spare: int = 0) -> dict:
    tokens = SIZE * sum(count for _, count in blocks) + spare
    timed = {} if api_time is None else {"api_time": api_time}
    return {"t": t, "type": "n", "in": tokens, "out": out, "hash_runs": blocks, **timed}


def session(*requests: dict, name: str = "s") -> dict:
    return {"id": name, "block_size": SIZE, "hash_id_scope": "local", "requests": list(requests)}


def agent(t: float, *requests: dict, name: str = "a", duration_ms: float | None = None) -> dict:
    return {
        "t": t,
        "type": "subagent",
        "agent_id": name,
        "subagent_type": "Explore",
        "duration_ms": duration_ms,
        "requests": list(requests),
    }


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 300),  # gap
        st.integers(0, 900),  # service, hundredths of a second
        st.integers(0, 5),  # blocks kept of the prompt before; beyond its length: all
        st.integers(0, 4),  # new blocks
        st.integers(0, SIZE - 1),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_what_was_written_is_read(write: Any, sessions: list[list[tuple[int, ...]]]) -> None:
    """A sequential session comes back call by call; no two sessions share an id."""
    lines, expected = [], []
    for number, rows in enumerate(sessions):
        t, fresh, before, requests, truth = 0.0, 1, list[int](), list[dict](), list[tuple]()
        for gap, service, kept, new, spare, out in rows:
            prompt = [*before[: kept if kept < 5 else None], *range(fresh, fresh + new)]
            fresh += new
            t = 0.0 if not requests else t + gap
            runs = [list(run) for run in collect(prompt)]
            requests.append(request(t, runs, out, service / 100, spare))
            truth.append((gap if len(requests) > 1 else 0, prompt, SIZE * len(prompt) + spare, out))
            before, t = prompt, t + service / 100
        lines.append(session(*requests, name=f"s{number}"))
        expected.append(truth)
    workload = read(write(lines))
    assert [flow.name for flow in workload.workflows] == [f"s{n}" for n in range(len(sessions))]
    used: list[set[int]] = []
    for flow, truth in zip(workload.workflows, expected, strict=True):
        base = {first - want for call, (_, prompt, _, _) in zip(flow.calls, truth, strict=True)
                for first, want in zip(expand(call.prompt), prompt, strict=True)}  # fmt: skip
        assert len(base) <= 1  # one shift for the whole session
        for call, (gap, _, tokens, out) in zip(flow.calls, truth, strict=True):
            assert (call.prompt_tokens, call.output_tokens, call.role) == (tokens, out, "main")
            assert call.after_s == pytest.approx(gap, abs=1e-6)
            assert length(call.chain) == (tokens + out) // SIZE
        for call, after in pairwise(flow.calls):
            assert after.parents == (call.id,)
            if shared(call.prompt, after.prompt) == length(call.prompt):
                assert shared(call.chain, after.prompt) == min(length(call.chain), length(after.prompt))
        used.append({block for call in flow.calls for block in expand(call.chain)})
    assert sum(map(len, used)) == len(set().union(*used))


def test_sub_agents_run_beside_each_other_and_the_next_main_request_waits(write: Any) -> None:
    """t of a finished sub-agent is its end: both began at 5, right after the answer at 4."""
    lines = session(
        request(0.0, [[1, 2]], api_time=4.0),
        agent(15.0, request(0.0, [[50, 1]]), request(4.0, [[50, 2]], api_time=4.5), name="a", duration_ms=10_000),
        agent(25.0, request(0.0, [[50, 1]], api_time=18.0), name="b", duration_ms=20_000),
        request(27.0, [[1, 4]]),
        request(30.0, [[1, 5]]),
    )
    calls = {call.id: call for call in read(write([lines])).calls}
    assert calls["s/a/0"].parents == calls["s/b/0"].parents == ("s/0",)
    assert calls["s/a/0"].after_s == calls["s/b/0"].after_s == 1.0
    assert (calls["s/a/1"].parents, calls["s/a/1"].after_s) == (("s/a/0",), 3.0)
    assert set(calls["s/1"].parents) == {"s/a/1", "s/b/0"}
    assert calls["s/1"].after_s == 4.0  # b's last answer was at 5 + 18
    assert (calls["s/2"].parents, calls["s/2"].after_s) == (("s/1",), 2.0)
    assert calls["s/a/0"].role == "Explore" and calls["s/1"].role == "main"
    assert shared(calls["s/a/0"].prompt, calls["s/b/0"].prompt) == 1  # the session's ids are theirs too


def test_nobody_waits_for_a_sub_agent_in_the_background(write: Any) -> None:
    lines = session(
        request(0.0, [[1, 2]], api_time=4.0),
        agent(4.5, request(0.0, [[50, 1]], api_time=2.0)),
        request(9.0, [[1, 3]]),
    )
    calls = {call.id: call for call in read(write([lines])).calls}
    assert (calls["s/a/0"].parents, calls["s/a/0"].after_s) == (("s/0",), 0.5)
    assert (calls["s/1"].parents, calls["s/1"].after_s) == (("s/0",), 5.0)


def test_overlapping_requests_are_branches(write: Any) -> None:
    """The second begins 6 s before the first ends; the third waits for both."""
    lines = session(
        request(0.0, [[1, 2]], api_time=10.0),
        request(4.0, [[1, 2]], api_time=2.0),
        request(12.0, [[1, 3]]),
        request(13.5, [[1, 4]]),  # 0.5 s after: within the clock's grain of one second
    )
    calls = read(write([lines])).workflows[0].calls
    assert [call.parents for call in calls] == [(), (), ("s/0", "s/1"), ("s/2",)]
    assert [call.after_s for call in calls] == [0.0, 4.0, 2.0, 0.5]


def test_a_request_without_a_service_time_is_given_one_and_said(write: Any) -> None:
    lines = session(request(0.0, [[1, 2]], out=100, api_time=None), request(20.0, [[1, 3]]))
    workload = read(write([lines]))
    assert workload.workflows[0].calls[1].after_s == pytest.approx(20.0 - SETUP_S - 100 * OUTPUT_S)
    assert any(note.startswith("1 requests have no service time") for note in workload.notes)


def test_ids_one_by_one_are_read_as_runs(write: Any) -> None:
    """As the trace is published, before its ids were cut into runs."""
    runs, one_by_one = session(request(0.0, [[1, 3], [9, 1]])), session(request(0.0, [[1, 3], [9, 1]]))
    del one_by_one["requests"][0]["hash_runs"]
    one_by_one["requests"][0]["hash_ids"] = [1, 2, 3, 9]
    assert read(write([one_by_one])).workflows == read(write([runs])).workflows


def test_what_contradicts_itself_is_refused_by_line(write: Any) -> None:
    good = session(request(0.0, [[1, 1]]))
    short = session(request(7.0, [[1, 2]]), name="x")
    short["requests"][0]["in"] = 100
    other = {**session(request(0.0, [[1, 1]]), name="x"), "block_size": 32}
    for bad, says in (
        (short, "line 2: the request at 7 s has more blocks"),
        (other, "line 2: blocks of 32 tokens after"),
        (session(name="x"), "line 2: session x has no request"),
    ):
        with pytest.raises(CallerError, match=says):
            read(write([good, bad]))
    with pytest.raises(CallerError, match="workflow 's' appears twice"):
        read(write([good, json.loads(json.dumps(good))]))
