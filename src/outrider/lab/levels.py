"""What each tier held over time: noted while a policy object runs, or found by running its journal through another.

A simulation, where the policy object is at hand, notes its books as they change and leaves them beside the journal as
memory.levels.json; a live server leaves its journal alone, which is replayed. Called by the twin and by the report.
"""

from pathlib import Path

import msgspec

from outrider import journal
from outrider.errors import CallerError
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings

VISITS = 1_200_000  # events times blocks that a replay may cost: a second or two of work


class Level(msgspec.Struct, frozen=True, array_like=True):
    """Bytes in use of every place, from `now` on."""

    now: float
    used_bytes: dict[str, int]


class Levels:
    """Follows one policy object; `note` after every event."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.noted: list[Level] = []

    def note(self, now: float) -> None:
        used_bytes = self._policy.residency.ledger.used_bytes
        if not self.noted or self.noted[-1].used_bytes != used_bytes:
            self.noted.append(Level(now, dict(used_bytes)))

    def write(self, journal_path: Path) -> None:
        beside(journal_path).write_bytes(msgspec.json.encode(self.noted))


def beside(journal_path: Path) -> Path:
    """memory.levels.json of memory.jsonl."""
    return journal_path.with_suffix(".levels.json")


def read(path: Path) -> tuple[list[Level], str]:
    """The levels of the journal at `path`, and why they end before it does; "" where they do not.

    CallerError where either file is damaged.
    """
    if beside(path).exists():
        try:
            return msgspec.json.decode(beside(path).read_bytes(), type=list[Level]), ""
        except msgspec.DecodeError as error:
            raise CallerError(f"{beside(path)}: {error}. Delete it: the journal beside it is replayed then.") from error
    watches: list[_Watch] = []

    def fresh(_: msgspec.Raw) -> _Watch:
        watches.append(_Watch(Policy(journal.settings(path, Settings))))
        return watches[0]

    _, lines = journal.read(path)
    affordable = (line for line in lines if watches[0].visits < VISITS)
    _, difference = journal.replay(path, ev.Event, fresh, affordable)
    noted = watches[0].levels.noted
    if difference is not None:
        return noted, f"From line {difference.line} of {path.name} on this version of Outrider decides otherwise."
    if watches[0].visits >= VISITS:
        return noted, f"The first {watches[0].events:,} events of {path.name} are replayed."
    return noted, ""


class _Watch:
    """A policy object, its levels, and what it has cost."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.levels = Levels(policy)
        self.events = self.visits = 0

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        commands = self._policy.handle(event, now)
        self.levels.note(now)
        self.events += 1
        self.visits += len(self._policy.residency.blocks)
        return commands
