"""What a process group says of a rank that died or keeps silent, in words. Pure; called by move.py and layer.py."""

from collections.abc import Iterator
from contextlib import contextmanager

from outrider.errors import WorldError


@contextmanager
def watched(doing: str) -> Iterator[None]:
    """What gloo says of a rank that died or kept silent for the group's time-out becomes a WorldError."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        reason = str(error).split("] ", 1)[-1].split(". ")[0]
        raise WorldError(
            f"experts: lost another rank while {doing}: {reason}. No weight was changed in this step."
            " Look at the rank that ended first, and start all again from the last checkpoint."
        ) from error
