"""Plays a workload's clients on the virtual clock: a call goes out once its parents are answered and its time has come.

As a careful client would: a call that is refused for now is sent again, under a name of its own, after the time that
the gateway asks for, ATTEMPTS times at most. What is never answered ends its workflow there, and is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from outrider.agents import events as ev
from outrider.errors import LawBroken
from outrider.lab.clock import Clock
from outrider.lab.traces.runs import Runs, length, shared
from outrider.lab.traces.workload import Call, Workflow, Workload
from outrider.lab.twins.agents import Flight, Work
from outrider.lab.twins.pool import Ids

ATTEMPTS = 8  # sends of one call at most
AGAIN = frozenset((429, 502, 503, 504))
CHARS_PER_TOKEN = 4  # what the gateway sees of a prompt is characters; its prior is a quarter token a character
MOST_LINKS = 1024  # of one prompt, as in the gateway
SAYS_FINAL = frozenset(("chatdev", "outrider"))  # traces of programs that know which of their calls is the last


@dataclass(frozen=True, slots=True)
class Answer:
    """One call, answered; seconds from its first send. `reused` by where it lay: engine, host, disk, ..."""

    workflow: str
    call: Call
    returning: bool  # it takes up a context that was computed before
    sent_s: float
    ttft_s: float
    total_s: float
    sends: int
    reused: dict[str, int]  # prompt tokens


@dataclass(eq=False, slots=True)
class Open:
    """A workflow under way."""

    workflow: Workflow
    calls: dict[str, Call]
    children: dict[str, list[Call]]
    missing: dict[str, int]  # parents not yet answered
    last: str  # the call that says so; "" for none
    unanswered: int
    lost: bool = False


@dataclass(eq=False, slots=True)
class Sent:
    """A call that was sent, and not yet answered."""

    open: Open
    call: Call
    first_s: float
    sends: int = 1


@dataclass(slots=True)
class Record:
    """What the clients saw."""

    answers: list[Answer] = field(default_factory=list)
    completions_s: dict[str, float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)  # by status: calls that were given up
    abandoned: int = 0  # workflows that did not come to their end
    sends: int = 0
    late: int = 0  # workflows that ended after their deadline


class Callers:
    """All clients of one run. `send` is the twin's door; `on_end` goes to the twin."""

    def __init__(
        self, clock: Clock, workload: Workload, send: Callable[[ev.Call, Work], None], on_answer: Callable[[], object]
    ) -> None:
        self.record = Record()
        self._clock, self._workload, self._send, self._on_answer = clock, workload, send, on_answer
        self._sent: dict[str, Sent] = {}
        longest = max((length(call.prompt) for call in workload.calls), default=0)
        self._link_blocks = max(1, -(-longest // MOST_LINKS))
        self._links: dict[int, ev.Link] = {}
        for workflow in workload.workflows:
            clock.at(workflow.start_s, partial(self._begin, workflow))

    def _begin(self, workflow: Workflow) -> None:
        children: dict[str, list[Call]] = {}
        for call in workflow.calls:
            for parent in call.parents:
                children.setdefault(parent, []).append(call)
        last = workflow.calls[-1].id if self._workload.format in SAYS_FINAL and _one_end(workflow, children) else ""
        missing = {call.id: len(call.parents) for call in workflow.calls}
        calls = {call.id: call for call in workflow.calls}
        run = Open(workflow, calls, children, missing, last, len(calls))
        for call in workflow.calls:
            if not call.parents:
                self._later(run, call)

    def _later(self, run: Open, call: Call) -> None:
        self._clock.at(self._clock.now + call.after_s, lambda: self._go(Sent(run, call, self._clock.now)))

    def _go(self, sent: Sent) -> None:
        call, workflow = sent.call, sent.open.workflow
        name = call.id if sent.sends == 1 else f"{call.id}~{sent.sends}"
        identity = ev.Identity(
            workflow=workflow.name,
            role=call.role,
            stage=call.stage,
            klass=workflow.klass,
            deadline_s=workflow.deadline_s,
            final=call.id == sent.open.last,
        )
        chain = self._chain(call.prompt)
        asked = ev.Call(
            name,
            identity,
            "/v1/chat/completions",
            stream=True,
            chars=call.prompt_tokens * CHARS_PER_TOKEN,
            max_tokens=call.max_tokens,
            chain=chain,
        )
        self._sent[name] = sent
        self.record.sends += 1
        work = Work(max(call.prompt_tokens, 1), max(call.output_tokens, 1), ids_of(call.chain))
        self._send(asked, work)

    def _chain(self, prompt: Runs) -> tuple[ev.Link, ...]:
        """The prompt as the gateway sees it: pieces of whole blocks, each named by the last, which binds all before."""
        ends = ids_of(prompt)[self._link_blocks - 1 :: self._link_blocks].tolist()
        links, chars = self._links, self._link_blocks * self._workload.block_tokens * CHARS_PER_TOKEN
        return tuple(links.get(end) or links.setdefault(end, ev.Link(f"{end:x}", chars)) for end in ends)

    def on_end(self, end: ev.Terminal, flight: Flight) -> None:
        """The twin says how a call ended."""
        sent = self._sent.pop(flight.call.id)
        status = end.status if isinstance(end, ev.Settle | ev.Reject) else 502
        if isinstance(end, ev.Settle) and status == 200:
            self._answered(sent, end, flight)
        elif status in AGAIN and sent.sends < ATTEMPTS:
            wait_s = (end.retry_after_s if isinstance(end, ev.Reject) else None) or 1
            sent.sends += 1
            self._clock.at(self._clock.now + wait_s, partial(self._go, sent))
        else:
            self._lost(sent, status)

    def _answered(self, sent: Sent, end: ev.Settle, flight: Flight) -> None:
        job, call, run, now = flight.job, sent.call, sent.open, self._clock.now
        assert job is not None
        if sum(job.tiers.values()) != job.external_blocks:
            raise LawBroken(2, f"call {call.id}: {job.external_blocks} blocks from memory, by tier {job.tiers}")
        waited_s = now - end.total_s - sent.first_s  # in sends that were refused
        block_tokens = self._workload.block_tokens
        reused = {"engine": job.own_blocks * block_tokens}
        reused |= {place: blocks * block_tokens for place, blocks in sorted(job.tiers.items())}
        answer = Answer(
            run.workflow.name,
            call,
            any(_goes_on(call, run.calls[parent]) for parent in call.parents),
            sent.first_s,
            waited_s + end.ttft_s,
            waited_s + end.total_s,
            sent.sends,
            reused,
        )
        self.record.answers.append(answer)
        self._on_answer()
        for child in run.children.get(call.id, ()):
            run.missing[child.id] -= 1
            if not run.missing[child.id]:
                self._later(run, child)
        run.unanswered -= 1
        if not run.unanswered:
            took_s = now - run.workflow.start_s
            self.record.completions_s[run.workflow.name] = took_s
            self.record.late += run.workflow.deadline_s is not None and took_s > run.workflow.deadline_s

    def _lost(self, sent: Sent, status: int) -> None:
        """Never answered: what waits for it will not be sent."""
        name = str(status)
        self.record.refused[name] = self.record.refused.get(name, 0) + 1
        self.record.abandoned += not sent.open.lost
        sent.open.lost = True
        self._on_answer()

    def close(self) -> None:
        """The simulation is over: every workflow came to its end, or was given up and says so."""
        ended, begun = len(self.record.completions_s) + self.record.abandoned, len(self._workload.workflows)
        if self._sent or ended != begun:
            raise LawBroken(8, f"{begun} workflows, {ended} ended; {len(self._sent)} calls are still waited for")


def _goes_on(call: Call, parent: Call) -> bool:
    """Does its prompt begin with the parent's whole prompt?"""
    return bool(parent.prompt) and shared(parent.prompt, call.prompt) == length(parent.prompt)


def _one_end(workflow: Workflow, children: dict[str, list[Call]]) -> bool:
    """Does the workflow end with its last call, whatever the others do?"""
    return [call.id for call in workflow.calls if call.id not in children] == [workflow.calls[-1].id]


def ids_of(runs: Runs) -> Ids:
    """Every block id, in order."""
    if not runs:
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(first, first + count) for first, count in runs])
