"""The twin of `memory/move.py` and of the server's door: the same policy, modelled links, the virtual clock.

    an engine's hook -> Leased, Prepared, ... -> [policy] -> Grant, Offer to the hook; Load, Save over a link -> Copied

Decides nothing and holds no bytes: a block is its key. What the disk tier's index would hold is `disk`, so that a twin
can be restarted on what another one left. Laws 2 and 4 are checked by the policy; the ledger after every event here,
everything every so often, and at the end that each link moved as many bytes as the policy has counted.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import assert_never

from outrider.errors import LawBroken
from outrider.journal import Journal
from outrider.lab.clock import Clock, Timer
from outrider.lab.twins.links import Lane, Way
from outrider.memory import events as ev
from outrider.memory.move import LOADS_PER_REPORT
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Settings
from outrider.wants import Want

FULL_CHECK_EVERY = 2000  # events between two passes over every block
LOAD: Way = ("disk", "host")
SAVE: Way = ("host", "disk")

Answer = ev.Grant | ev.Offer | ev.Acknowledge | ev.Refuse


class MemoryTwin:
    """One memory server. `lanes` are its links by way; those of the policy's topology where none are given."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        lanes: Mapping[Way, Lane] | None = None,
        journal: Journal | None = None,
        disk: dict[str, ev.Found] | None = None,
    ) -> None:
        self.policy = Policy(settings)
        self.clock = clock
        self.lanes = {(link.src, link.dst): Lane(link, clock) for link in settings.topology().links} | dict(lanes or {})
        self.disk: dict[str, ev.Found] = {} if disk is None else disk
        self.damaged: dict[str, str] = {}  # blocks whose bytes on disk are not what was stored, and how that shows
        self.events = 0
        self._journal = journal
        self._answers: dict[tuple[int, int], Callable[[Answer], object]] = {}
        self._timer: Timer | None = None
        self._copied_bytes: dict[Way, int] = dict.fromkeys(self.lanes, 0)
        if "disk" in self.policy.residency.places:
            self.feed(ev.Recovered(tuple(self.disk.values())))

    # -- the door

    def lookup(self, items: tuple[str, ...]) -> int:
        return self.policy.lookup(items)

    def lies(self, item: str) -> str:
        """The fastest place where a block can be read now; "" for none."""
        places = self.policy.residency.places
        return next((place for place in places if self.policy.residency.state(item, place) is At.HERE), "")

    def ask(self, event: ev.Leased | ev.Prepared | ev.Completed | ev.Abandoned | ev.Flushed,
            answer: Callable[[Answer], object]) -> None:  # fmt: skip
        """A client's request that is answered, now or later."""
        name = (event.client, event.request)
        if name in self._answers:
            raise LawBroken(8, f"client {name[0]} asked twice under {name[1]}")
        self._answers[name] = answer
        self.feed(event)

    def want(self, want: Want) -> None:
        self.feed(ev.Wanted(want))

    # -- events and commands

    def feed(self, event: ev.Event) -> None:
        """One event in, its commands out."""
        now = self.clock.now
        commands = self.policy.handle(event, now)
        if self._journal is not None:
            self._journal.write(now, event, commands)
        self.events += 1
        self.policy.residency.ledger.check()
        if self.events % FULL_CHECK_EVERY == 0:
            self.policy.residency.check()
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Grant(client, request) | ev.Offer(client, request) | ev.Acknowledge(client, request):
                answer = self._answers.pop((client, request), None)
                if answer is None:
                    raise LawBroken(8, f"client {client} was answered twice under {request}: {command}")
                answer(command)
            case ev.Refuse(client, request):
                answer = self._answers.pop((client, request), None)
                if answer is not None:  # request 0 and releases are not answered: the live server cuts the client off
                    answer(command)
            case ev.Load(copies):
                for start in range(0, len(copies), LOADS_PER_REPORT):
                    self._load(copies[start : start + LOADS_PER_REPORT])
            case ev.Save(copies):
                for copy in copies:
                    self.disk[copy.item] = _found(copy, copy.dst_at)
                self._send(SAVE, copies)
            case ev.Erase(items):
                for item in items:
                    self.disk.pop(item, None)
            case ev.Wake(at_s):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.clock.at(at_s, partial(self.feed, ev.Woke()))
            case _:
                assert_never(command)

    def _load(self, copies: tuple[ev.Copy, ...]) -> None:
        """As a reading thread does it: what is damaged is reported by itself, the rest as one."""
        good = []
        for copy in copies:
            if self.disk.get(copy.item) != _found(copy, copy.src_at):
                self._fail(copy, "stale")
            elif copy.item in self.damaged:
                self._fail(copy, self.damaged[copy.item])
            else:
                good.append(copy)
        self._send(LOAD, tuple(good))

    def _fail(self, copy: ev.Copy, reason: str) -> None:
        self.clock.at(self.clock.now, partial(self.feed, ev.CopyFailed(copy.number, reason)))

    def _send(self, way: Way, copies: tuple[ev.Copy, ...]) -> None:
        if copies:
            size_bytes = sum(copy.size_bytes for copy in copies)
            self._copied_bytes[way] += size_bytes
            self.lanes[way].send(size_bytes, partial(self.feed, ev.Copied(tuple(copy.number for copy in copies))))

    # -- the end

    def close(self) -> None:
        """The simulation is over, nothing is under way: what was moved is what was counted, and nobody waits."""
        self.policy.residency.check()
        if self._answers:
            raise LawBroken(8, f"{len(self._answers)} requests were never answered, {next(iter(self._answers))} first")
        counted = self.policy.tally.moved_bytes
        for way, moved_bytes in self._copied_bytes.items():
            said = counted.get("->".join(way), 0)
            if not moved_bytes == self.lanes[way].moved_bytes == said:
                went = f"the link moved {self.lanes[way].moved_bytes}, memory counted {said}"
                raise LawBroken(2, f"{way[0]} to {way[1]}: copies of {moved_bytes} bytes, {went}")
        if self._journal is not None:
            self._journal.close()


def _found(copy: ev.Copy, at: int) -> ev.Found:
    return ev.Found(copy.item, at, copy.size_bytes, copy.checksum, copy.generation)
