"""Errors by whose fault they are. Each message is one sentence or two: what, where, how to mend it.

CallerError   the caller's: bad input, an unknown key, a port in use.
WorldError    the world's: an engine died, a disk is full, a server is gone. Nothing was lost; says what to look at.
LawBroken     ours: one of the numbered laws of docs/invariants.md does not hold. Carries the item's story, where known.

The command line prints the first two as one sentence and exits with 2; the third keeps its traceback.
"""

from collections.abc import Sequence


class OutriderError(Exception):
    """Anything that Outrider raises on purpose."""


class CallerError(OutriderError):
    """The caller can mend it: the message names the thing and says how."""


class WorldError(OutriderError):
    """Something outside this process failed; nothing acknowledged was lost."""


class StoreGone(WorldError):
    """The memory server does not answer. Every call of a `Store` may raise it; recompute instead."""


class LawBroken(OutriderError):
    """A law of docs/invariants.md is broken: our fault. Prints the item's story, if given, and how to replay."""

    def __init__(self, law: int, what: str, story: Sequence[str] = (), replay: str = "outrider replay JOURNAL") -> None:
        self.law = law
        tale = f" Story: {', '.join(story)}." if story else ""
        super().__init__(f"LawBroken {law}: {what}.{tale} Replay: {replay}")
