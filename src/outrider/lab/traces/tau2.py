"""Reader of tau2-bench conversations: JSONL, one message a line; agent and user simulator are both models.

A session is a workflow. Agent and user simulator take turns: each call waits for the one before it. Each has a context
of its own: its system prompt, what both said, and only its own tool calls and their results. Texts are not kept.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from outrider.lab.traces.blocks import Ids, Piece, PrefixTree, answered
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.runs import Runs
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

KEYS = ("kind",)
BLOCK_TOKENS = 16
ROLES = ("agent", "user_sim")
REQUESTORS = {"assistant": "agent", "user": "user_sim"}  # whose tool it was -> whose context sees the result
Count = Annotated[int, msgspec.Meta(ge=0)]


class System(msgspec.Struct, tag_field="kind", tag="system"):
    """First line: the system prompts that all sessions share."""

    agent_policy: str = ""
    user_guidelines: str = ""


class Session(msgspec.Struct, tag_field="kind", tag="session"):
    """Begins a session; the messages up to the next such line are its own."""

    session: str
    start: datetime
    user_scenario: msgspec.Raw = msgspec.Raw(b"")


class Message(msgspec.Struct, tag_field="kind", tag="msg"):
    """One message. t is when it was produced; no counts on a canned greeting and on a tool's result."""

    role: Literal["agent", "user_sim", "tool"]
    i: Count
    t: datetime
    text: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")
    requestor: Literal["assistant", "user"] = "assistant"
    in_tok: Count | None = None
    out_tok: Count | None = None


def read(source: Source, limit: int | None) -> Draft:
    """Every session a workflow, started as the harness that recorded it started it."""
    ids = Ids()
    tree, system, talk = PrefixTree(BLOCK_TOKENS, ids), System(), _Talk("", None, {})
    workflows: list[Workflow] = []
    decoder = msgspec.json.Decoder(System | Session | Message)
    for number, raw in source.lines():
        line = source.decode(number, raw, decoder)
        match line:
            case System():
                system = line
            case Session():
                workflows += talk.workflow(ids)
                talk = _Talk(line.session, line.start, _openings(system, line))
            case Message():
                if talk.start is None:
                    raise source.fault(number, "a message before any session")
                try:
                    talk.hear(line, tree)
                except TypeError as error:  # one time has a zone, the other has none
                    raise source.fault(number, str(error)) from error
    workflows += talk.workflow(ids)
    notes = (
        "starts are those of the benchmark's harness, which began a session when another ended: no users' arrivals",
        "agent and user simulator take turns, each with its own context; a tool's time is added before the next call; "
        "canned greetings are no calls",
        f"blocks of {BLOCK_TOKENS} tokens are shared where messages are equal from the first on; tool schemas are "
        "counted with the first messages, which is where the trace counts them",
    )
    return Draft(BLOCK_TOKENS, workflows, True, notes)


def _openings(system: System, session: Session) -> dict[str, list[Piece]]:
    """What each role's context begins with."""
    scenario = bytes(session.user_scenario)
    return {
        "agent": [(("policy", system.agent_policy), len(system.agent_policy))],
        "user_sim": [
            (("guidelines", system.user_guidelines), len(system.user_guidelines)),
            (("scenario", scenario), len(scenario)),
        ],
    }


class _Talk:
    """A session under way."""

    def __init__(self, name: str, start: datetime | None, contexts: dict[str, list[Piece]]) -> None:
        self.name = name
        self.start = start
        self._contexts = contexts
        self._heard_at = start
        self._tools_s = 0.0  # since the last call's answer
        self._after_tool = False
        self._calls: list[tuple[Message, str, float, Runs]] = []  # message, stage, seconds after the one before, prompt

    def hear(self, message: Message, tree: PrefixTree) -> None:
        """One more message: a call if it has token counts, and a piece of the contexts that see it."""
        assert self._heard_at is not None
        passed_s = max((message.t - self._heard_at).total_seconds(), 0.0)
        self._heard_at = message.t
        if message.in_tok is not None and message.role != "tool":
            prompt = tree.lay(self._contexts[message.role], message.in_tok)
            stage = "after tool" if self._after_tool else "after message"
            self._calls.append((message, stage, self._tools_s, prompt))
            self._tools_s = 0.0
        else:  # nobody's model spoke: the time is a tool's, or the harness's before a greeting
            self._tools_s += passed_s
        self._after_tool = message.role == "tool"
        said = bytes(message.tool_calls) + (message.text or "").encode()
        owner = REQUESTORS[message.requestor] if message.role == "tool" else message.role
        alone = message.role == "tool" or bytes(message.tool_calls) not in {b"", b"null", b"[]"}
        for role in (owner,) if alone else ROLES:
            self._contexts[role].append(((message.role, said), len(said)))

    def workflow(self, ids: Ids) -> list[Workflow]:
        """The session, unless it has no call."""
        if self.start is None or not self._calls:
            return []
        calls: list[Call] = []
        following: dict[str, Runs] = {}
        chains: list[Runs] = []
        for message, _, _, prompt in reversed(self._calls):
            tokens = (message.in_tok or 0) + (message.out_tok or 0)
            chains.append(answered(prompt, following.get(message.role, ()), tokens // BLOCK_TOKENS, ids))
            following[message.role] = prompt
        for (message, stage, after_s, prompt), chain in zip(self._calls, reversed(chains), strict=True):
            parents = (calls[-1].id,) if calls else ()
            lengths = message.in_tok or 0, message.out_tok or 0
            call = Call(f"{self.name}/{message.i}", message.role, stage, parents, after_s, *lengths, prompt, chain)
            calls.append(call)
        return [Workflow(self.name, _epoch_s(self.start), tuple(calls))]


def _epoch_s(moment: datetime) -> float:
    """Seconds since an origin that all moments of a file share."""
    return (moment - datetime(2000, 1, 1, tzinfo=moment.tzinfo)).total_seconds()
