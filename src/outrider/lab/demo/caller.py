"""Plays the agents: runs each workflow's conversations against a gateway and records what every call cost.

As a careful client would: streams, honours Retry-After, and asks again when a stream breaks before its end. A call
counts as answered once, however often it was sent. Decides nothing about serving.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from outrider.errors import WorldError
from outrider.lab.demo.workload import SYSTEM, Agent, Workflow

ATTEMPTS = 8  # sends of one call at most; a gateway that refuses this often is down
PATIENCE_S = 240.0  # one attempt, from send to last byte

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One call, answered. Seconds from the first send to the first token and to the last byte."""

    workflow: str
    agent: str
    role: str
    turn: int
    last: bool  # turn of its agent
    text: str
    prompt_tokens: int
    output_tokens: int
    reused_tokens: int  # of the prompt: from the engine's own cache or from memory
    external_tokens: int  # of the prompt: from memory
    ttft_s: float
    total_s: float
    sent_at_s: float  # since the workload began
    sends: int

    @property
    def returning(self) -> bool:
        """A later turn of a conversation: its context was computed before."""
        return self.turn > 0


@dataclass
class Record:
    """Everything that one run of the workload left behind."""

    answers: list[Answer] = field(default_factory=list)
    completions_s: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def open_tokens_peak(self) -> int:
        """Most tokens of open contexts at one moment: from an agent's first send to the end of its last answer."""
        changes: list[tuple[float, int]] = []
        last_tokens: dict[str, int] = {}
        for answer in sorted(self.answers, key=lambda a: a.sent_at_s):
            tokens = answer.prompt_tokens + answer.output_tokens
            changes.append((answer.sent_at_s, tokens - last_tokens.get(answer.agent, 0)))
            last_tokens[answer.agent] = tokens
            if answer.last:
                changes.append((answer.sent_at_s + answer.total_s, -tokens))
        open_tokens, peak = 0, 0
        for _, change in sorted(changes):
            open_tokens += change
            peak = max(peak, open_tokens)
        return peak


class Broken(Exception):
    """A call that must be sent again: refused for now, or its stream ended with an error. Seconds to wait first."""

    def __init__(self, why: str, wait_s: float) -> None:
        super().__init__(why)
        self.wait_s = wait_s


async def play(gateway: str, model: str, workflows: list[Workflow], on_answer: Callable[[Answer], None]) -> Record:
    """Run all workflows at once, each from its own start.

    Raises WorldError, as itself, when a call is refused or stays unanswered; the other workflows are cancelled.
    """
    record, began_s = Record(), time.monotonic()
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        caller = Caller(session, gateway, model, record, began_s, on_answer)
        try:
            async with asyncio.TaskGroup() as running:
                for workflow in workflows:
                    running.create_task(caller.review(workflow))
        except* WorldError as failed:
            raise _first(failed) from None
    record.wall_s = time.monotonic() - began_s
    return record


def _first(failed: BaseExceptionGroup[WorldError]) -> WorldError:
    """The first error of a group of groups: fan-outs nest."""
    error: BaseException = failed
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, WorldError)
    return error


class Caller:
    """The agents of all workflows of one run."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        gateway: str,
        model: str,
        record: Record,
        began_s: float,
        on_answer: Callable[[Answer], None],
    ) -> None:
        self._session = session
        self._url = f"{gateway}/v1/chat/completions"
        self._model = model
        self._record = record
        self._began_s = began_s
        self._on_answer = on_answer

    async def review(self, workflow: Workflow) -> None:
        """One workflow, in the order of workload.py's picture."""
        await asyncio.sleep(workflow.start_s)
        began_s = time.monotonic()
        plan = await self._converse(workflow, workflow.planner, "")
        async with asyncio.TaskGroup() as fan:
            tasks = [
                fan.create_task(self._converse(workflow, agent, f"The plan: {plan}")) for agent in workflow.reviewers
            ]
        findings = "\n".join(
            f"{agent.role}: {task.result()}" for agent, task in zip(workflow.reviewers, tasks, strict=True)
        )
        change = await self._converse(workflow, workflow.reviser, f"Findings:\n{findings}")
        test = await self._converse(workflow, workflow.tester, f"The change: {change}")
        await self._converse(workflow, workflow.summariser, f"Change: {change}\nTest: {test}", final=True)
        self._record.completions_s[workflow.name] = time.monotonic() - began_s

    async def _converse(self, workflow: Workflow, agent: Agent, told: str, final: bool = False) -> str:
        """All turns of one agent; its last answer."""
        messages: list[Message] = [{"role": "system", "content": SYSTEM}]
        for turn, (ask, pause_s) in enumerate(zip(agent.asks, agent.pauses_s, strict=True)):
            await asyncio.sleep(pause_s)
            content = "\n".join(filter(None, (agent.opening, told, ask))) if turn == 0 else ask
            messages.append({"role": "user", "content": content})
            last = turn == len(agent.asks) - 1
            answer = await self._call(workflow, agent, turn, messages, final and last)
            messages.append({"role": "assistant", "content": answer.text})
        return answer.text

    async def _call(self, workflow: Workflow, agent: Agent, turn: int, messages: list[Message], final: bool) -> Answer:
        headers = {
            "Outrider-Workflow": workflow.name,
            "Outrider-Role": agent.role,
            "Outrider-Stage": f"{agent.role}/{turn}",
        }
        if final:
            headers["Outrider-Final"] = "true"
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": agent.answer_tokens,
            "stop": ["\n"],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began_s = time.monotonic()
        for sends in range(1, ATTEMPTS + 1):
            try:
                text, usage, first_s = await self._stream(body, headers)
            except Broken as broken:
                why = str(broken)
                await asyncio.sleep(broken.wait_s)
                continue
            details = usage.get("prompt_tokens_details") or {}
            answer = Answer(
                workflow.name,
                agent.name,
                agent.role,
                turn,
                turn == len(agent.asks) - 1,
                text,
                usage["prompt_tokens"],
                usage["completion_tokens"],
                details.get("cached_tokens", 0),
                details.get("external_tokens", 0),
                first_s - began_s,
                time.monotonic() - began_s,
                began_s - self._began_s,
                sends,
            )
            self._record.answers.append(answer)
            self._on_answer(answer)
            return answer
        raise WorldError(f"{agent.name} turn {turn}: no answer after {ATTEMPTS} sends: {why}")

    async def _stream(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, dict[str, Any], float]:
        """One send: the text, the usage, and the moment of the first token. Broken where it must be sent again."""
        text: list[str] = []
        usage: dict[str, Any] = {}
        first_s, done = 0.0, False
        try:
            async with self._session.post(self._url, json=body, headers=headers) as response:
                if response.status in {429, 502, 503, 504}:
                    raise Broken(f"HTTP {response.status}", float(response.headers.get("Retry-After", 1)))
                if response.status != 200:
                    raise WorldError(f"{self._url}: HTTP {response.status}: {(await response.text())[:300]}")
                async for raw in response.content:
                    line = raw.decode().strip()
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        done = True
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise Broken(str(event["error"])[:200], 0.2)
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        text.append(choice["delta"].get("content") or "")
                        first_s = first_s or (time.monotonic() if text[-1] else 0.0)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Broken(f"{type(error).__name__}: {error}", 0.5) from error
        if not done or not usage:
            raise Broken("the stream ended early", 0.2)
        return "".join(text), usage, first_s or time.monotonic()
