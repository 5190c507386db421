"""The words in which the three systems speak to one another: Want, Move, Drop. Pure data.

`agents` and `experts` know the future and say it as wants; `memory` turns wants into moves and drops. The unit of
worth is the same everywhere, expected seconds saved, so that a KV block can be traded against an expert.
"""

import msgspec


class Want(msgspec.Struct, frozen=True):
    """`item` should be at `place` by `by_s`; if it is, `saved_s` seconds are expected to be saved.

    item     name of a thing with bytes: a block's key, a path (a named chain of blocks), an expert
    by_s     seconds on the caller's clock (CLOCK_MONOTONIC between processes of one machine)
    saved_s  expected seconds saved, probability times seconds; at most 0 means: no longer needed
    """

    item: str
    place: str
    by_s: float
    saved_s: float


class Move(msgspec.Struct, frozen=True):
    """One hop of one item over one link. `start_s` and `end_s` are the booked seconds on that link."""

    item: str
    src: str
    dst: str
    size_bytes: int
    start_s: float
    end_s: float


class Drop(msgspec.Struct, frozen=True):
    """The copy of `item` at `place` is given up; its bytes are free at once."""

    item: str
    place: str
    size_bytes: int
