"""Numbers from a journal: how often each event came and each command was given, and over how long.

Live totals (stats, /metrics) are kept by a system's `tally.py`, inside its policy; this reads what a run left behind.
Called by `outrider replay --json` and by the tests.
"""

from collections import Counter
from pathlib import Path

import msgspec

from outrider import journal


class Tally(msgspec.Struct, frozen=True):
    """What a journal holds. `span_s` is last `now` minus first (micro-steps for experts); names are struct tags."""

    lines: int
    span_s: float
    events: dict[str, int]
    commands: dict[str, int]


class _Tagged(msgspec.Struct):
    type: str


def tally(path: Path) -> Tally:
    """Count the events and commands of a journal by their tag, most frequent first, ties by name.

    Raises CallerError where `path` is no journal.
    """
    _, lines = journal.read(path)
    events: Counter[str] = Counter()
    commands: Counter[str] = Counter()
    nows: list[float] = []
    for line in lines:
        nows.append(line.now)
        events[msgspec.json.decode(line.event, type=_Tagged).type] += 1
        commands.update(command.type for command in msgspec.json.decode(line.commands, type=list[_Tagged]))
    span_s = nows[-1] - nows[0] if nows else 0.0
    return Tally(len(nows), span_s, _ordered(events), _ordered(commands))


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
