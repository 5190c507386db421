"""Who speaks: every contract of the reference, and nothing that a client sends can raise or grow."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.agents import workflow
from outrider.agents.events import Identity
from outrider.agents.identity import read_call
from outrider.agents.prompt import PIECE, read_chain
from outrider.errors import CallerError

Headers = list[tuple[str, str]]


def identity(headers: Headers | None = None, body: Any = None, wall_s: float = 0.0) -> Identity:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body or {})
    return read_call("c", "/v1/messages", headers or [], data, wall_s=wall_s)[0].identity


def test_our_headers_say_it_all() -> None:
    headers = [
        ("Outrider-Workflow", "wf-7f3"),
        ("OUTRIDER-ROLE", "reviewer"),
        ("outrider-stage", "review/2"),
        ("Outrider-Parent", "call-19"),
        ("Outrider-Class", "batch"),
        ("Outrider-Deadline", "30s"),
        ("Outrider-Next", "coder@model-b"),
        ("Outrider-Final", "true"),
    ]
    got = identity(headers)
    assert (got.workflow, got.role, got.stage, got.stage_name) == ("wf-7f3", "reviewer", "review/2", "review")
    assert (got.parent, got.klass, got.deadline_s, got.next_role, got.final) == (
        "call-19",
        "batch",
        30.0,
        "coder@model-b",
        True,
    )
    assert set(got.sources.values()) == {"header"}


def test_our_helper_speaks_our_headers() -> None:
    with workflow("wf", klass="interactive", deadline_s=2.5) as wf:
        got = identity(list(wf.headers("coder", "code/1", parent="p", final=True).items()))
    assert (got.workflow, got.klass, got.deadline_s, got.role) == ("wf", "interactive", 2.5, "coder")
    assert (got.stage, got.parent, got.final, got.ignored) == ("code/1", "p", True, ())
    with pytest.raises(CallerError, match="interactive or batch"):
        workflow("wf", klass="urgent")


@pytest.mark.parametrize(
    ("headers", "workflow", "role", "parent"),
    [
        ({"x-claude-code-session-id": "s"}, "s", "main", ""),
        (
            {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a", "x-claude-code-parent-agent-id": "p"},
            "s",
            "subagent",
            "p",
        ),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-type": "Explore",
                "x-claude-code-request-class": "subagent",
            },
            "s",
            "Explore",
            "",
        ),
        ({"x-claude-code-session-id": "s", "x-claude-code-request-class": "auxiliary"}, "s", "auxiliary", ""),
        ({"session-id": "cx", "x-openai-subagent": "review"}, "cx", "review", ""),
        ({"x-session-id": "oc", "x-parent-session-id": "up"}, "oc", "", "up"),
        ({"X-Dynamo-Session-ID": "dy", "x-claude-code-session-id": "s"}, "dy", "main", ""),
        ({"x-litellm-session-id": "ll"}, "ll", "", ""),
        ({"baggage": "k=v, gen_ai.conversation.id=c%20v;p=1,gen_ai.agent.name=planner"}, "c v", "planner", ""),
    ],
)
def test_contracts_that_clients_already_send(headers: dict[str, str], workflow: str, role: str, parent: str) -> None:
    got = identity(list(headers.items()))
    assert (got.workflow, got.role, got.parent) == (workflow, role, parent)


def test_a_compaction_is_a_stage_of_its_own() -> None:
    got = identity([("x-claude-code-session-id", "s"), ("x-claude-code-compaction", "auto")])
    assert (got.workflow, got.stage) == ("s", "compaction")


@pytest.mark.parametrize(
    ("body", "workflow", "source"),
    [
        ({"outrider": {"workflow": "o"}, "prompt_cache_key": "p"}, "o", "body"),
        ({"vllm_xargs": {"agentic_context": {"program_id": "v", "agent_role": "r"}}}, "v", "agentic_context"),
        ({"vllm_xargs": {"agentic_context": '{"session_id": "v"}'}}, "v", "agentic_context"),
        ({"metadata": {"session_id": "m"}}, "m", "metadata"),
        ({"metadata": {"user_id": "u_session_123e4567-e89b-12d3-a456-426614174000"}}, "123e4567", "metadata"),
        ({"prompt_cache_key": "p"}, "p", "prompt_cache_key"),
        ({"metadata": [1], "vllm_xargs": 3, "prompt_cache_key": 7, "outrider": "x"}, "", None),
    ],
)
def test_contracts_in_the_body(body: dict[str, Any], workflow: str, source: str | None) -> None:
    got = identity(body=body)
    assert got.workflow.startswith(workflow)
    assert bool(got.workflow) == bool(workflow)
    assert got.sources.get("workflow") == source


def test_contradictions_are_settled_by_order_and_said() -> None:
    got = identity([("Outrider-Role", "a"), ("Outrider-Role", "b"), ("x-openai-subagent", "c")])
    assert got.role == "a"
    assert "a second outrider-role" in got.ignored


def test_malformed_claims_fall_through_to_the_next_source() -> None:
    got = identity(
        [
            ("Outrider-Workflow", "\x07"),
            ("Outrider-Final", "maybe"),
            ("Outrider-Deadline", "-3"),
            ("Outrider-Class", "vip"),
        ],
        {"outrider": {"workflow": "fine", "final": True, "deadline": 5}},
    )
    assert (got.workflow, got.final, got.deadline_s, got.klass) == ("fine", True, 5.0, "")
    assert len(got.ignored) == 4


def test_a_huge_id_still_groups_but_stays_small() -> None:
    first, again, other = (identity([("Outrider-Workflow", text * 5000)]).workflow for text in ("ab", "ab", "ac"))
    assert first == again != other
    assert len(first) < 64


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("30s", 30.0), ("1.5", 1.5), ("2026-11-24T12:00:30Z", 30.0), ("2026-11-24T13:00:30.5+01:00", 30.5)]
    + [(bad, None) for bad in ("2026-11-24T11:00:00Z", "2026-11-24", "nan", "inf", "1e99", "soon", "0")],
)
def test_deadlines(text: str, wanted: float | None) -> None:
    noon_s = 1795521600.0  # 2026-11-24T12:00:00Z
    got = identity([("Outrider-Deadline", text)], wall_s=noon_s).deadline_s
    assert got == (None if wanted is None else pytest.approx(wanted))


NAMES = [
    "outrider-workflow",
    "outrider-final",
    "outrider-deadline",
    "baggage",
    "x-claude-code-session-id",
    "x-smg-priority",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
members = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "system",
        "tools",
        "metadata",
        "vllm_xargs",
        "outrider",
        "max_tokens",
        "stream",
        "prompt_cache_key",
        "x",
    ]
)


@given(
    headers=st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=40)), max_size=6),
    body=st.dictionaries(members, values, max_size=6) | values,
)
def test_nothing_a_client_sends_raises(headers: Headers, body: Any) -> None:
    sent = msgspec.json.encode(body)
    call, forwarded = read_call("c", "/v1/completions", headers, sent)
    if not (isinstance(body, dict) and "outrider" in body):
        assert forwarded == sent
    else:
        rest = {name: value for name, value in body.items() if name != "outrider"}
        assert msgspec.json.decode(forwarded) == msgspec.json.decode(msgspec.json.encode(rest))
    assert msgspec.json.decode(msgspec.json.encode(call), type=type(call)) == call, "a journal holds it whole"
    assert sum(link.chars for link in call.chain) <= call.chars


@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_raise_nothing(body: bytes) -> None:
    call, forwarded = read_call("c", "/v1/completions", [], body)
    assert forwarded == body or b"outrider" in body
    assert call.id == "c"


# -- prompts as chains ------------------------------------------------------------------------------------------------


def chain(body: dict[str, Any], model: str = "m") -> list[str]:
    fields = msgspec.json.decode(msgspec.json.encode(body), type=dict[str, msgspec.Raw])
    return [link.digest for link in read_chain("/v1/chat/completions", model, fields)[0]]


def test_a_grown_conversation_begins_with_the_old_one() -> None:
    turns = [{"role": "user", "content": "a" * (3 * PIECE)}, {"role": "assistant", "content": "b"}]
    old, new = chain({"messages": turns[:1]}), chain({"messages": turns})
    assert len(old) > 3, "long messages are cut in pieces"
    assert new[: len(old)] == old
    assert len(new) == len(old) + 1


def test_what_changes_the_prompt_changes_the_chain() -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    plain = chain(said)
    assert chain(said, model="other") != plain
    assert chain({**said, "system": "s"})[-1] != plain[-1]
    assert chain({**said, "tools": [{"name": "t"}]})[-1] != plain[-1]
    assert chain({**said, "temperature": 1, "stream": True}) == plain


def test_the_marks_that_move_do_not_count() -> None:
    """Claude Code moves cache_control from turn to turn; key order and spacing are the serialiser's business."""
    marked = {
        "messages": [{"content": [{"text": "hi", "type": "text", "cache_control": {"type": "e"}}], "role": "user"}]
    }
    plain = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    assert chain(marked) == chain(plain)


def test_token_prompts_have_prefixes_too() -> None:
    ids = list(range(2000))
    old, new = chain({"prompt": ids}), chain({"prompt": [*ids, 1, 2, 3, *ids]})
    assert len(set(old) & set(new)) >= len(old) - 1
