"""Law 2: free + used = capacity in every place, after every call; a link with n slots carries at most n moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.errors import LawBroken
from outrider.ledger import Ledger
from outrider.topology import Link, Place, Topology
from outrider.wants import Drop, Move

TOPOLOGY = Topology(
    (Place("host", 1000), Place("disk", 5000)),
    (Link("disk", "host", bandwidth=100.0, latency_s=0.5, slots=2), Link("host", "disk", bandwidth=50.0)),
)


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of takes, bookings, refunds and drops against a plain model: a dict of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(TOPOLOGY)
        self.held = {"host": 0, "disk": 0}
        self.taken: list[Drop] = []
        self.moves: list[Move] = []
        self.booked: list[Move] = []
        self.now = 0.0

    @rule(place=st.sampled_from(["host", "disk"]), size=st.integers(1, 600))
    def take(self, place: str, size: int) -> None:
        room = self.held[place] + size <= TOPOLOGY.place(place).capacity_bytes
        assert self.ledger.take(place, size) is room
        if room:
            self.held[place] += size
            self.taken.append(Drop("x", place, size))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        drop = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.ledger.drop(drop)
        self.held[drop.place] -= drop.size_bytes

    @rule(way=st.sampled_from([("disk", "host"), ("host", "disk"), ("host", "host")]), size=st.integers(1, 600))
    def book(self, way: tuple[str, str], size: int) -> None:
        move = self.ledger.book("x", *way, size, start_s=self.now, by_s=self.now + 20)
        if move is None:
            return
        link = TOPOLOGY.link(*way)
        assert link is not None, "booked over a link that does not exist"
        assert move.end_s - move.start_s == pytest.approx(link.hop_s(size))
        assert self.now <= move.start_s and move.end_s <= self.now + 20
        self.held[move.dst] += size
        self.moves.append(move)
        self.booked.append(move)

    @precondition(lambda self: self.moves)
    @rule()
    def refund(self) -> None:
        move = self.moves.pop()
        self.ledger.refund(move)
        self.held[move.dst] -= move.size_bytes

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def capacity_is_kept(self) -> None:
        self.ledger.check()
        for place, used_bytes in self.held.items():
            assert self.ledger.used_bytes[place] == used_bytes
            assert self.ledger.free_bytes(place) + used_bytes == self.ledger.capacity_bytes(place)

    @invariant()
    def links_are_not_overbooked(self) -> None:
        for link in TOPOLOGY.links:
            mine = [m for m in self.booked if (m.src, m.dst) == (link.src, link.dst)]
            for move in mine:
                at_once = sum(m.start_s <= move.start_s < m.end_s for m in mine)
                assert at_once <= link.slots


TestLedger = LedgerMachine.TestCase


@given(size=st.integers(1, 10))
def test_giving_back_more_than_was_taken_is_our_fault(size: int) -> None:
    ledger = Ledger(TOPOLOGY)
    with pytest.raises(LawBroken, match="LawBroken 2: host gave back"):
        ledger.give("host", size)


def test_an_unknown_place_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="known: host, disk"):
        TOPOLOGY.place("hbm")
