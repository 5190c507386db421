"""Where every block is, and in which state. Pure; owned by `policy.py`, which alone decides what happens.

A block has one copy at most in each tier. Each copy goes through this table and through nothing else:

    absent --prepare--> draft --complete--> here        written in place by a client, hidden until complete (law 3)
                        draft --abandon---> absent
    absent --start----> coming --land-----> here        on its way from another tier
                        coming --fail-----> absent
                        coming --cancel---> unwanted    cannot be un-sent: it keeps its room until it ends (law 4)
                      unwanted --want-----> coming      wanted again before it ended
                      unwanted --land-----> absent
                      unwanted --fail-----> absent
    absent --recover--> here                            found in the disk tier's index
                        here ---evict-----> absent      never while something reads it (`holds`)
                        here ---condemn---> condemned   not what was stored: no new readers, gone after the last
                   condemned ---evict-----> absent

What lies in the hybrid device's own `cache` lies in `hybrid` too, and does not leave there before.

Room is taken in the ledger and in the extents of the tier before anything is written there, and given back as a copy
becomes absent: free + used = capacity after every step (law 2).
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType

from outrider.errors import LawBroken
from outrider.ledger import Ledger
from outrider.memory.events import Found
from outrider.memory.extents import Extents
from outrider.memory.settings import SOURCES, Settings
from outrider.wants import Drop, Move

STORY_LENGTH = 8


class At(StrEnum):
    """State of a block's copy in one tier."""

    ABSENT = "absent"
    DRAFT = "draft"
    COMING = "coming"
    UNWANTED = "unwanted"
    HERE = "here"
    CONDEMNED = "condemned"


TRANSITIONS: Mapping[tuple[At, str], At] = MappingProxyType({
    (At.ABSENT, "prepare"): At.DRAFT,
    (At.DRAFT, "complete"): At.HERE,
    (At.DRAFT, "abandon"): At.ABSENT,
    (At.ABSENT, "start"): At.COMING,
    (At.COMING, "land"): At.HERE,
    (At.COMING, "fail"): At.ABSENT,
    (At.COMING, "cancel"): At.UNWANTED,
    (At.UNWANTED, "want"): At.COMING,
    (At.UNWANTED, "land"): At.ABSENT,
    (At.UNWANTED, "fail"): At.ABSENT,
    (At.ABSENT, "recover"): At.HERE,
    (At.HERE, "evict"): At.ABSENT,
    (At.HERE, "condemn"): At.CONDEMNED,
    (At.CONDEMNED, "evict"): At.ABSENT,
})  # fmt: skip


@dataclass(slots=True)
class Block:
    """One block. `at` holds an offset for every tier where the copy is not absent.

    holds    per tier: leases and copies that read it there now
    joins    leases (client, request) that wait for its arrival in host
    touched  rises with every touch, deepest block of a request first: the smaller one leaves first
    ended    its path was withdrawn and nobody else holds it: leaves before all others
    must     someone waits for it to be durable
    lifted   came to host for a want and was not leased since
    """

    item: str
    size_bytes: int
    state: dict[str, At]
    holds: dict[str, int]
    at: dict[str, int] = field(default_factory=dict)
    checksum: int = 0
    generation: int = 0
    joins: dict[tuple[int, int], None] = field(default_factory=dict)
    touched: int = 0
    touched_s: float = 0.0
    ended: bool = False
    must: bool = False
    lifted: bool = False
    story: deque[tuple[str, str, float]] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))

    def tale(self) -> list[str]:
        """The last events, for people: `host start 18.2`."""
        return [f"{place} {signal} {now:.6g}" for place, signal, now in self.story]


class Residency:
    """All blocks, the room that they take, and the only way to change either."""

    def __init__(self, settings: Settings) -> None:
        topology = settings.topology()
        self.places = tuple(place.name for place in topology.places)
        self.ledger = Ledger(topology)
        self.extents = {place.name: Extents(place.capacity_bytes) for place in topology.places}
        self.blocks: dict[str, Block] = {}
        self.here = dict.fromkeys(self.places, 0)  # blocks that lie there
        self.changed: dict[str, None] = {}  # blocks for whose sake something is to be filed anew
        self.room_bytes = settings.room_bytes
        self._grain_bytes = settings.grain_bytes

    def mark(self, block: Block) -> None:
        """Whoever changes what a block is worth, or whether it may leave or be lifted, says so here."""
        self.changed[block.item] = None

    def hold(self, block: Block, place: str, readers: int) -> None:
        """So many readers more, or less, at `place`."""
        block.holds[place] += readers
        self.mark(block)

    def state(self, item: str, place: str) -> At:
        block = self.blocks.get(item)
        return block.state.get(place, At.ABSENT) if block else At.ABSENT

    def published(self, item: str) -> bool:
        """Can it be read, from whichever tier? What is drafted or on its way is not (law 3)."""
        block = self.blocks.get(item)
        return block is not None and self.lies(block, self.places) is not None

    def lies(self, block: Block, places: Iterable[str]) -> str | None:
        """The first of `places` where it can be read."""
        for place in places:
            behind = "hybrid" if place == "cache" else place
            if block.state.get(place) is At.HERE and block.state[behind] is At.HERE:
                return place
        return None

    def source(self, block: Block) -> str | None:
        """The fastest place that host can load it from."""
        return self.lies(block, SOURCES)

    def evictable(self, block: Block, place: str) -> bool:
        """Not while something reads it there, nor while someone waits for it to be saved or for room to load it."""
        awaited = block.must if place == "host" else block.joins or (block.must and place == "hybrid")
        cached = place == "hybrid" and block.state.get("cache", At.ABSENT) is not At.ABSENT
        return block.state[place] is At.HERE and not block.holds[place] and not awaited and not cached

    def draft(self, item: str, size_bytes: int, start: int, now: float) -> None:
        """A client writes `item` in place at `start`, which was taken from the host's extents."""
        block = self._new(item, size_bytes)
        if not self.ledger.take("host", self.room_bytes("host", size_bytes)):
            raise LawBroken(2, f"host has an extent for {item} but no bytes", block.tale())
        block.at["host"] = start
        self.turn(block, "host", "prepare", now)

    def start(self, block: Block, src: str, dst: str, start: int, now: float, by_s: float) -> Move | None:
        """Book a copy into `start` of `dst`, taken from its extents. None: late, nothing changed but that extent."""
        move = self.ledger.book(block.item, src, dst, self.room_bytes(dst, block.size_bytes), now, by_s)
        if move is not None:
            block.at[dst] = start
            self.hold(block, src, 1)
            self.turn(block, dst, "start", now)
        return move

    def end(self, block: Block, move: Move, signal: str, now: float) -> bool:
        """A copy ended with `land` or `fail`; is the block now at `move.dst`?"""
        self.hold(block, move.src, -1)
        self.turn(block, move.dst, signal, now)
        if block.state[move.dst] is At.HERE:
            return True
        self.extents[move.dst].give(block.at.pop(move.dst), move.size_bytes)
        self.ledger.refund(move)
        self._tidy(block)
        return False

    def leave(self, block: Block, place: str, signal: str, now: float) -> None:
        """The copy at `place` is given up: `evict` where it is here or condemned, `abandon` where it is a draft."""
        if block.holds[place]:
            raise LawBroken(4, f"{block.item} leaves {place} with {block.holds[place]} readers", block.tale())
        self.turn(block, place, signal, now)
        room_bytes = self.room_bytes(place, block.size_bytes)
        self.extents[place].give(block.at.pop(place), room_bytes)
        self.ledger.drop(Drop(block.item, place, room_bytes))
        self._tidy(block)

    def recover(self, found: Found, now: float) -> Block | None:
        """Enter a block of the disk tier's index; None where its bytes do not fit this tier or are taken."""
        room_bytes = self.room_bytes("disk", found.size_bytes)
        misfit = found.size_bytes < 1 or found.at % self._grain_bytes != 0 or found.item in self.blocks
        if misfit or not self.extents["disk"].take_at(found.at, room_bytes):
            return None
        self.ledger.take("disk", room_bytes)
        block = self._new(found.item, found.size_bytes)
        block.at["disk"], block.checksum, block.generation = found.at, found.checksum, found.generation
        self.turn(block, "disk", "recover", now)
        return block

    def turn(self, block: Block, place: str, signal: str, now: float) -> None:
        """One step of the table. LawBroken, with the block's story, where the table has none."""
        was = block.state[place]
        block.story.append((place, signal, now))
        to = TRANSITIONS.get((was, signal))
        if to is None:
            raise LawBroken(4, f"{block.item} is {was} at {place} and cannot {signal}", block.tale())
        block.state[place] = to
        self.here[place] += (to is At.HERE) - (was is At.HERE)
        self.mark(block)

    def check(self) -> None:
        """Laws 2 and 4 over everything; costs a pass over all blocks, so tests call it after every event."""
        self.ledger.check()
        for place in self.places:
            inside = [block for block in self.blocks.values() if block.state[place] is not At.ABSENT]
            used_bytes = sum(self.room_bytes(place, block.size_bytes) for block in inside)
            free_bytes = self.extents[place].free_bytes()
            booked, capacity_bytes = self.ledger.used_bytes[place], self.ledger.capacity_bytes(place)
            if used_bytes != booked or used_bytes + free_bytes != capacity_bytes:
                what = f"blocks take {used_bytes}, ledger says {booked}, extents leave {free_bytes} of {capacity_bytes}"
                raise LawBroken(2, f"{place}: {what}")
            spans = sorted((block.at[place], self.room_bytes(place, block.size_bytes)) for block in inside)
            for (first, size), (second, _) in pairwise(spans):
                if first + size > second:
                    raise LawBroken(2, f"{place}: two blocks lie at {second}")

    def _new(self, item: str, size_bytes: int) -> Block:
        block = Block(item, size_bytes, dict.fromkeys(self.places, At.ABSENT), dict.fromkeys(self.places, 0))
        self.blocks[item] = block
        return block

    def _tidy(self, block: Block) -> None:
        """A block that is nowhere is forgotten."""
        if all(state is At.ABSENT for state in block.state.values()):
            del self.blocks[block.item]
