"""Dialogues with the policy, to be read. To rewrite: `OUTRIDER_GOLDEN=write pytest tests/agents/test_golden.py`.

Commit only a difference that you can explain: each line is a decision that users will see.
"""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outrider.agents.events import (
    Arrived,
    Call,
    EngineDown,
    EngineUp,
    Event,
    Failed,
    Finished,
    FirstByte,
    Gone,
    Identity,
    Link,
    Usage,
    Woke,
)
from outrider.agents.policy import Policy
from outrider.agents.settings import Foresight, GatewaySettings, Limits

GOLDEN = Path(__file__).parent / "golden"
A, B = "http://a:1", "http://b:1"
Script = list[tuple[float, Event]]


def call(name: str, workflow: str, role: str, chain: str, final: bool = False, parent: str = "") -> Arrived:
    links = tuple(Link(chain[: at + 1], 1000) for at in range(len(chain)))
    identity = Identity(workflow, role, f"{role}/1", parent, final=final)
    return Arrived(Call(name, identity, "/v1/chat/completions", "", "m", True, 1000 * len(chain), 200, links))


def done(name: str, output: int, attempt: int = 1, cached: int = 0) -> Finished:
    return Finished(name, attempt, 200, Usage(500, output, cached, 0, estimated=False))


UP: Script = [(0.0, EngineUp(A, ("m",), 4096)), (0.0, EngineUp(B, ("m",), 4096))]
DIALOGUES: dict[str, tuple[dict[str, Any], Script]] = {
    # a planner fans out to reviewers that share its prefix; the reviser's context returns; wants go and are withdrawn
    "fan_out": (
        {"memory_attached": True, "credit": 2},
        [
            *UP,
            (1.0, call("plan", "wf", "planner", "sp")),
            (1.5, FirstByte("plan", 1)),
            (3.0, done("plan", 60)),
            (3.1, call("rev-1", "wf", "reviewer", "spx", parent="plan")),
            (3.1, call("rev-2", "wf", "reviewer", "spy", parent="plan")),
            (3.1, call("rev-3", "wf", "reviewer", "spz", parent="plan")),
            (5.0, done("rev-1", 40)),
            (5.5, done("rev-2", 44)),
            (6.0, done("rev-3", 52)),
            (6.5, call("fix-1", "wf", "reviser", "spq")),
            (8.0, done("fix-1", 80)),
            (11.0, call("fix-2", "wf", "reviser", "spqrs")),
            (12.0, done("fix-2", 80, cached=400)),
            (12.5, call("sum", "wf", "summariser", "st", final=True)),
            (14.0, done("sum", 30)),
        ],
    ),
    # an engine dies under one call and refuses the next; it stays out until it answers again; another breaks mid-stream
    "an_engine_dies": (
        {"credit": 1, "routing": "sticky", "policy": "fcfs"},
        [
            *UP,
            (1.0, call("x", "wf-1", "coder", "a")),
            (1.0, call("y", "wf-2", "coder", "b")),
            (1.0, call("z", "wf-1", "coder", "c")),
            (3.0, Failed("x", 1, "reset", "ServerDisconnectedError", started=False)),
            (3.1, Failed("y", 1, "refused", "ClientConnectorError", started=False)),
            (3.2, EngineDown(B, "ConnectionRefusedError", refused=True)),
            (4.0, done("x", 20, attempt=2)),
            (4.0, done("x", 20, attempt=1)),
            (4.5, FirstByte("y", 2)),
            (4.6, Failed("y", 2, "reset", "ClientPayloadError", started=True)),
            (5.0, Gone("z")),
            (6.0, EngineUp(B, ("m",), 4096)),
            (7.0, call("w", "wf-1", "coder", "c")),
        ],
    ),
    # a short line, nobody there to serve it: 429 at once, 503 after the bounded wait
    "nobody_answers": (
        {"queue_limit": 1},
        [(0.0, call("x", "wf", "coder", "a")), (0.5, call("y", "wf", "coder", "b")), (2.0, Woke()), (3.0, Woke())],
    ),
}


def shown(value: Any) -> str:
    """A struct as words: its type and what differs from the defaults; nested structs by their JSON."""
    words = [type(value).__name__]
    for field in msgspec.structs.fields(value):
        member = getattr(value, field.name)
        if member == field.default:
            continue
        if isinstance(member, float):
            member = round(member, 4)
        elif isinstance(member, Call):
            who = member.identity
            member = f"{member.id} {who.workflow}/{who.role} {len(member.chain)} pieces{' final' if who.final else ''}"
        elif isinstance(member, tuple) and member and isinstance(member[0], msgspec.Struct):
            member = " ".join(f"{score.engine[7]}:{score.total_s:.4f}" for score in member)
        elif isinstance(member, msgspec.Struct):
            member = shown(member)
        words.append(f"{field.name}={member}")
    return "  ".join(words)


def dialogue(options: dict[str, Any], script: Script) -> str:
    limits = Limits(no_engine_s=3.0)
    settings = GatewaySettings(engines=(A, B), limits=limits, foresight=Foresight(prior_gap_s=2.0), **options)
    policy = Policy(settings)
    lines = []
    for now, event in script:
        lines.append(f"{now:g}  {shown(event)}")
        lines += [f"    {shown(command)}" for command in policy.handle(event, now)]
        policy.check()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_policy_says_what_it_said(name: str) -> None:
    said = dialogue(*DIALOGUES[name])
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("OUTRIDER_GOLDEN") == "write":
        path.write_text(said)
    assert said == path.read_text(), f"{path}: rewrite it with OUTRIDER_GOLDEN=write if you can explain the difference"
