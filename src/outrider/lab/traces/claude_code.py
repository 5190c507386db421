"""Reader of anonymised Claude Code sessions: JSONL, one session a line, its requests with hashes of 64-token blocks.

A session is a workflow. Main requests follow each other; a sub-agent is launched by the request answered before it
began, runs its own requests beside others, and is waited for by the next main request. A request's `t` is when it
began, but a finished sub-agent's `t` is when it ended: only so does each begin within a second of the answer that
launched it. One without a duration was launched in the background: its `t` is the launch, and nobody waits for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated

import msgspec

from outrider.lab.traces.blocks import Ids, answered, moved
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.order import Answered, Frontier, gap_s
from outrider.lab.traces.runs import collect, join, length
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

KEYS = ("id", "block_size", "hash_id_scope", "requests")
GRAIN_S = 1.0  # main requests begin on whole seconds
SETUP_S, OUTPUT_S = 2.5, 0.015  # service of a request without api_time, and per output token: medians of the timed ones
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Pairs = tuple[tuple[Count, Annotated[int, msgspec.Meta(ge=1)]], ...]


class Request(msgspec.Struct, tag_field="type", tag="n"):
    """One request, answered whole. hash_runs: [first id, count]; hash_ids: the same, one by one."""

    t: Seconds
    input_tokens: Count = msgspec.field(name="in")
    output_tokens: Count = msgspec.field(name="out")
    api_time: Seconds | None = None
    hash_runs: Pairs = ()
    hash_ids: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        self.hash_runs = collect(self.hash_ids) if self.hash_ids else join(self.hash_runs)
        self.hash_ids = ()

    @property
    def service_s(self) -> float:
        return SETUP_S + OUTPUT_S * self.output_tokens if self.api_time is None else self.api_time


class Streamed(Request, tag="s"):
    """One request, answered as a stream."""


class SubAgent(msgspec.Struct, tag_field="type", tag="subagent"):
    """Requests of one sub-agent; their t counts from its start, their ids are the session's."""

    t: Seconds
    requests: tuple[Request | Streamed, ...]
    agent_id: str
    subagent_type: str = "subagent"
    duration_ms: Seconds | None = None

    @property
    def start_s(self) -> float:
        return max(self.t - (self.duration_ms or 0.0) / 1000, 0.0)


class Session(msgspec.Struct):
    """One line."""

    id: str
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    requests: tuple[Request | Streamed | SubAgent, ...]

    @property
    def agents(self) -> list[SubAgent]:
        return [item for item in self.requests if isinstance(item, SubAgent)]

    @property
    def main_requests(self) -> list[Request]:
        return [item for item in self.requests if not isinstance(item, SubAgent)]

    @property
    def all_requests(self) -> list[Request]:
        return self.main_requests + [request for agent in self.agents for request in agent.requests]


def read(source: Source, limit: int | None) -> Draft:
    """Every session a workflow. Ids are local to a session in the trace, so no two sessions share a block."""
    decoder = msgspec.json.Decoder(Session)
    ids, workflows, untimed, block_tokens = Ids(), list[Workflow](), 0, 0
    for number, line in source.lines():
        session = source.decode(number, line, decoder)
        block_tokens = block_tokens or session.block_size
        if session.block_size != block_tokens:
            raise source.fault(number, f"blocks of {session.block_size} tokens after blocks of {block_tokens}")
        if not session.all_requests:
            raise source.fault(number, f"session {session.id} has no request")
        for request in session.all_requests:
            if length(request.hash_runs) > request.input_tokens // block_tokens:
                raise source.fault(number, f"the request at {request.t:g} s has more blocks than its prompt fills")
        untimed += sum(request.api_time is None for request in session.all_requests)
        workflows.append(Workflow(session.id, 0.0, _calls(session, ids)))
        if len(workflows) == limit:
            break
    notes = (
        "think and tool time is the time from an answer's end to the next request; service time is left out",
        f"{untimed} requests have no service time: {SETUP_S} s and {OUTPUT_S} s an output token were assumed, "
        "the medians of those that have one",
        "a sub-agent runs beside others from the answer that launched it, and the next main request waits for it; "
        "nobody waits for one launched in the background",
        "block ids are local to a session: what sessions share (tools, system prompt) is not seen as shared",
        "an output is taken to be the beginning of what the next prompt has new; where that prompt does not begin "
        "with the last one, the output's blocks are nobody else's",
    )
    return Draft(block_tokens, workflows, False, notes)


@dataclass(frozen=True)
class _Turn:
    """A request in its conversation; `following` is the next one there."""

    name: str
    role: str
    request: Request
    following: Request | None


def _turns(conversation: str, role: str, requests: Iterable[Request]) -> list[_Turn]:
    """As they began."""
    begun = sorted(requests, key=lambda request: request.t)
    pairs = zip_longest(begun, begun[1:])
    return [_Turn(f"{conversation}/{number}", role, *pair) for number, pair in enumerate(pairs)]


def _calls(session: Session, ids: Ids) -> tuple[Call, ...]:
    """The session's calls, each after those it waited for."""
    made = _Made(session.block_size, ids, base=ids.next)
    ids.take(max((sum(run) for request in session.all_requests for run in request.hash_runs), default=0))
    main = _turns(session.id, "main", session.main_requests)
    items: list[tuple[float, _Turn | SubAgent]] = [(turn.request.t, turn) for turn in main]
    items += [(agent.start_s, agent) for agent in session.agents]
    frontier = Frontier(GRAIN_S)
    for start_s, item in sorted(items, key=lambda pair: pair[0]):
        before = frontier.before(start_s)
        if isinstance(item, _Turn):
            made.add(item, start_s, before, frontier)
            continue
        own = Frontier(GRAIN_S)
        for turn in _turns(f"{session.id}/{item.agent_id}", item.subagent_type, item.requests):
            begun_s = start_s + turn.request.t
            made.add(turn, begun_s, own.before(begun_s) or before, own)
        if item.duration_ms is not None:
            for last in own.last():
                frontier.enter(last.call, last.end_s, [answer.call for answer in before])
    return tuple(made.calls)


@dataclass
class _Made:
    """The calls of one session as they come; `base` is added to its block ids."""

    block_tokens: int
    ids: Ids
    base: int
    calls: list[Call] = field(default_factory=list)

    def add(self, turn: _Turn, start_s: float, parents: Sequence[Answered], frontier: Frontier) -> None:
        """One more call, which began at start_s after `parents`."""
        request = turn.request
        prompt = moved(request.hash_runs, self.base)
        following = moved(turn.following.hash_runs, self.base) if turn.following else ()
        blocks = (request.input_tokens + request.output_tokens) // self.block_tokens
        chain = answered(prompt, following, blocks, self.ids)
        names = tuple(parent.call for parent in parents)
        lengths = request.input_tokens, request.output_tokens
        self.calls.append(Call(turn.name, turn.role, "", names, gap_s(start_s, parents, 0.0), *lengths, prompt, chain))
        frontier.enter(turn.name, start_s + request.service_s, names)
