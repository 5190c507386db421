"""The live gateway's fixtures, and a clock on which nothing happens until the live journal says that it was next."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outrider.lab.clock import Clock, Timer

_spec = importlib.util.spec_from_file_location("agents_fixtures", Path(__file__).parents[1] / "agents" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_agents = importlib.util.module_from_spec(_spec)
sys.modules["agents_fixtures"] = _agents
_spec.loader.exec_module(_agents)
farm, door = _agents.farm, _agents.door

encode = msgspec.json.encode
LATE_S = 1.0  # by which a busy machine may run a timer late


class Imposed(Clock):
    """Work that is due at once is done at once; events that a twin would feed itself, and limits, wait to be chosen.

    A twin reaches its journal through `feed` alone, and whatever it wants to tell itself goes through a timer. So when
    the live journal says that event E came next, E must be among the timers, byte for byte, or the twin would not have
    produced it. Limits and wake-ups must have been set for that very moment too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Timer] = []
        self.limits: list[Timer] = []

    def at(self, at_s: float, do: Callable[[], object]) -> Timer:
        timer = Timer(at_s, do)
        if isinstance(do, partial) and do.func.__name__ == "feed":
            self.events.append(timer)
        elif isinstance(do, partial) and do.func.__name__ == "_late":
            self.limits.append(timer)
        else:
            do()
        return timer

    def choose(self, event: bytes) -> None:
        """Let this event happen; fails where the twin has no such thing in hand."""
        for timer in self.events:
            if isinstance(timer.do, partial) and encode(timer.do.args[0]) == event:
                if encode({"type": "Woke"}) == event:
                    self.due(timer, "a wake-up")
                do, timer.do = timer.do, None
                self.events.remove(timer)
                do()
                return
        in_hand = [encode(timer.do.args[0]).decode() for timer in self.events if isinstance(timer.do, partial)]
        raise AssertionError(f"live had {event.decode()}; the twin has in hand {in_hand}")

    def late(self, call: str, attempt: int) -> None:
        """The limit of this attempt passes."""
        for timer in self.limits:
            dispatch = timer.do.args[1] if isinstance(timer.do, partial) else None
            if dispatch is not None and (dispatch.call, dispatch.attempt) == (call, attempt):
                self.due(timer, f"the limit of attempt {attempt} of {call}")
                do, timer.do = timer.do, None
                assert do is not None
                do()
                return
        raise AssertionError(f"the twin set no limit for attempt {attempt} of {call}")

    def due(self, timer: Timer, what: str) -> None:
        """What live did now, the twin had set for now: never for later, nor for long before."""
        assert -0.01 <= self.now - timer.at_s < LATE_S, f"{what}: live at {self.now}, the twin's for {timer.at_s}"

    def left(self) -> list[Any]:
        """Events that the twin still has in hand."""
        return [timer.do.args[0] for timer in self.events if isinstance(timer.do, partial)]


@pytest.fixture
def imposed() -> Callable[[], Imposed]:
    return Imposed


@pytest.fixture
def same_lines() -> Callable[[Path, Path], int]:
    """Two journals hold the same (now, event, commands) lines, byte for byte; how many."""

    def compare(live: Path, twin: Path) -> int:
        ours, theirs = twin.read_bytes().splitlines()[1:], live.read_bytes().splitlines()[1:]
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=2):
            assert one == other, f"line {number}: twin {one.decode()}, live {other.decode()}"
        assert len(ours) == len(theirs)
        return len(ours)

    return compare
