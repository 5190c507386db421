"""The explanation of each call, put together from the events and commands that the journal holds too. Pure; bounded.

Answers GET /v1/outrider/requests/ID: why it was queued, why it went to that engine, what was predicted and what came.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from outrider.agents.events import (
    Abort,
    Arrived,
    Break,
    Call,
    Command,
    Dispatch,
    Event,
    Failed,
    FirstByte,
    Hold,
    Reject,
    Relay,
    Settle,
)
from outrider.agents.lru import Lru

KEPT = 4096


class Story(msgspec.Struct):
    """What happened to one call; times on the gateway's clock."""

    call: Call
    arrived_s: float
    hold: Hold | None = None
    dispatches: list[tuple[float, Dispatch]] = msgspec.field(default_factory=list)
    failures: list[tuple[float, Failed]] = msgspec.field(default_factory=list)
    first_byte_s: float | None = None
    end: Command | None = None
    ended_s: float | None = None


class Stories:
    """The last `KEPT` calls."""

    def __init__(self) -> None:
        self._stories: Lru[str, Story] = Lru(KEPT)

    def note(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        """Take in what the policy saw and said at time now."""
        match event:
            case Arrived(call):
                self._stories.put(call.id, Story(call, now))
            case FirstByte(call_id):
                if (story := self._stories.get(call_id)) is not None:
                    story.first_byte_s = now
            case Failed(call_id):
                if (story := self._stories.get(call_id)) is not None:
                    story.failures.append((now, event))
            case _:
                pass  # the commands say the rest
        for command in commands:
            if isinstance(command, Dispatch | Hold | Settle | Reject | Relay | Break | Abort):
                story = self._stories.get(command.call)
                if story is not None:
                    _tell(story, command, now)

    def explain(self, call_id: str) -> dict[str, Any] | None:
        """Everything known about one call, ready for JSON; None when it is unknown or forgotten."""
        story = self._stories.get(call_id)
        if story is None:
            return None
        identity = story.call.identity
        return {
            "id": call_id,
            "path": story.call.path,
            "model": story.call.model,
            "state": type(story.end).__name__.lower() if story.end else ("running" if story.dispatches else "queued"),
            "identity": msgspec.to_builtins(identity),
            "queued": _queued(story),
            "attempts": [_attempt(story, at_s, dispatch) for at_s, dispatch in story.dispatches],
            "failures": [
                {"after_s": at_s - story.arrived_s, "attempt": failed.attempt, "kind": failed.kind, "why": failed.why}
                for at_s, failed in story.failures
            ],
            "predicted": _predicted(story),
            "actual": _actual(story),
            "why_ended": getattr(story.end, "why", None),
            "timings": {
                "queued_s": story.dispatches[-1][1].queued_s if story.dispatches else None,
                "first_byte_s": story.first_byte_s - story.arrived_s if story.first_byte_s is not None else None,
                "total_s": story.ended_s - story.arrived_s if story.ended_s is not None else None,
            },
        }


def _tell(story: Story, command: Dispatch | Hold | Settle | Reject | Relay | Break | Abort, now: float) -> None:
    if isinstance(command, Dispatch):
        story.dispatches.append((now, command))
    elif isinstance(command, Hold):
        story.hold = command
    else:
        story.end, story.ended_s = command, now


def _queued(story: Story) -> dict[str, Any]:
    """Why it waited: its place, the calls before it and the credit that there was, all at arrival."""
    if story.hold is None:
        return {
            "waited": False,
            "why": "an engine had free credit" if story.dispatches else "it never entered the line",
        }
    hold = story.hold
    if hold.ahead:
        why = f"{hold.position - 1} calls were ahead"
    elif any(hold.free_credit.values()):
        why = "waiting for the engine where it starts soonest, or for KV room"
    else:
        why = "no engine had free credit"
    return {
        "waited": True,
        "why": why,
        "position": hold.position,
        "ahead": list(hold.ahead),
        "free_credit": hold.free_credit,
        "remaining_work_s": hold.remaining_s,
    }


def _attempt(story: Story, at_s: float, dispatch: Dispatch) -> dict[str, Any]:
    """Why this engine: seconds to the first byte for every engine that could take it."""
    return {
        "attempt": dispatch.attempt,
        "engine": dispatch.engine,
        "after_s": at_s - story.arrived_s,
        "reason": dispatch.reason,
        "scores_s": [
            {
                "engine": score.engine,
                "total_s": score.total_s,
                "prefill_s": score.prefill_s,
                "load_s": score.load_s,
                "outstanding_s": score.outstanding_s,
                "resident_tokens": score.resident_tokens,
            }
            for score in dispatch.scores
        ],
    }


def _predicted(story: Story) -> dict[str, Any] | None:
    if not story.dispatches:
        return None
    dispatch = story.dispatches[-1][1]
    return {
        "output_tokens": dispatch.predicted_tokens,
        "bound_tokens": dispatch.bound_tokens,
        "from": dispatch.predicted_from,
        "remaining_work_s": dispatch.remaining_s,
        "reserved_tokens": dispatch.reserved_tokens,
    }


def _actual(story: Story) -> dict[str, Any] | None:
    if not isinstance(story.end, Settle):
        return None
    usage = msgspec.to_builtins(story.end.usage) if story.end.usage is not None else {}
    deadline_s = story.call.identity.deadline_s
    met = None if deadline_s is None else story.end.total_s <= deadline_s
    return {"status": story.end.status, **usage, "deadline_met": met}
