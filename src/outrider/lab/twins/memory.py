"""The twin of `memory/move.py` and of the server's door: the same policy, modelled links, the virtual clock.

    an engine's hook -> Leased, Prepared, ... -> [policy] -> Grant, Offer to the hook; Load, Save over links -> Copied

Decides nothing and holds no bytes: a block is its key. What the disk tier's index would hold is `disk`, so that a twin
can be restarted on what another one left. Laws 2 and 4 are checked by the policy; the ledger after every event here,
everything every so often, and at the end that each link moved as many bytes as the policy has counted.
"""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from outrider.errors import LawBroken
from outrider.journal import Journal
from outrider.lab.clock import Clock, Timer
from outrider.lab.levels import Levels
from outrider.lab.twins.links import Lane, Way
from outrider.memory import events as ev
from outrider.memory.move import LOADS_PER_REPORT
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Settings
from outrider.memory.traffic import tier_of
from outrider.wants import Want

FULL_CHECK_EVERY = 2000  # events between two passes over every block

Answer = ev.Grant | ev.Offer | ev.Acknowledge | ev.Refuse


class MemoryTwin:
    """One memory server. `lanes` are its links by way, those of the policy's topology.

    notes  keep what each tier held over time, in `levels`, for a report
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        journal: Journal | None = None,
        disk: dict[str, ev.Found] | None = None,
        notes: bool = False,
    ) -> None:
        self.policy = Policy(settings)
        self.clock = clock
        self.lanes = {(link.src, link.dst): Lane(link, clock) for link in settings.topology().links}
        self.disk: dict[str, ev.Found] = {} if disk is None else disk
        self.damaged: dict[tuple[str, str], str] = {}  # (tier, block) that is not what was stored, and how that shows
        self.events = 0
        self.levels = Levels(self.policy) if notes else None
        self._journal = journal
        self._answers: dict[tuple[int, int], Callable[[Answer], object]] = {}
        self._cached: dict[int, None] = {}  # offsets in the hybrid tier that its device has in its own cache
        self._timer: Timer | None = None
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
        if self.levels is not None:
            self.levels.note(now)
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
            case ev.Load(copies, src):
                for start in range(0, len(copies), LOADS_PER_REPORT):
                    self._load(copies[start : start + LOADS_PER_REPORT], src)
            case ev.Save(copies, src, dst):
                self._save(copies, src, dst)
            case ev.Erase(items):
                for item in items:
                    self.disk.pop(item, None)
            case ev.Prefetch(copies):
                for copy in copies:
                    self._cached[copy.src_at] = None
                    self._send(("hybrid", "cache"), (copy,))
            case ev.Unpin(spans):
                for span in spans:
                    self._cached.pop(span.at, None)
            case ev.Wake(at_s):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.clock.at(at_s, partial(self.feed, ev.Woke()))
            case _:
                assert_never(command)

    def _load(self, copies: tuple[ev.Copy, ...], src: str) -> None:
        """As a reading thread does it: what is damaged is reported by itself, the rest as one."""
        good = self._sound(copies, src)
        hits = src == "hybrid" and all(copy.src_at in self._cached for copy in good)
        self._send(("cache" if hits else src, "host"), good)

    def _save(self, copies: tuple[ev.Copy, ...], src: str, dst: str) -> None:
        good = self._sound(copies, src)
        if dst == "disk":
            for copy in good:
                self.disk[copy.item] = _found(copy, copy.dst_at)
        self._send((src, dst), good)

    def _sound(self, copies: tuple[ev.Copy, ...], src: str) -> tuple[ev.Copy, ...]:
        """Those that can be read where they lie; of the others, an event each."""
        good = []
        for copy in copies:
            stale = src == "disk" and self.disk.get(copy.item) != _found(copy, copy.src_at)
            why_not = "stale" if stale else self.damaged.get((src, copy.item), "")
            if why_not:
                self.clock.at(self.clock.now, partial(self.feed, ev.CopyFailed(copy.number, why_not)))
            else:
                good.append(copy)
        return tuple(good)

    def _send(self, way: Way, copies: tuple[ev.Copy, ...]) -> None:
        if copies:
            size_bytes = sum(copy.size_bytes for copy in copies)
            self.lanes[way].send(size_bytes, partial(self.feed, ev.Copied(tuple(copy.number for copy in copies))))

    # -- the end

    def close(self) -> None:
        """The simulation is over, nothing is under way: what was moved is what was counted, and nobody waits."""
        self.policy.residency.check()
        if self._answers:
            raise LawBroken(8, f"{len(self._answers)} requests were never answered, {next(iter(self._answers))} first")
        moved: dict[str, int] = {}
        for (src, dst), lane in self.lanes.items():
            name = f"{tier_of(src)}->{dst}"
            moved[name] = moved.get(name, 0) + lane.moved_bytes
        for name, moved_bytes in moved.items():
            self.counted(name, moved_bytes)
        if self._journal is not None:
            self._journal.close()

    def counted(self, way: str, moved_bytes: int) -> None:
        """Links carried so many bytes that way; LawBroken unless the policy has counted as many."""
        counted = self.policy.tally.moved_bytes.get(way, 0)
        if counted != moved_bytes:
            raise LawBroken(2, f"{way}: links moved {moved_bytes} bytes, memory counted {counted}")


def _found(copy: ev.Copy, at: int) -> ev.Found:
    return ev.Found(copy.item, at, copy.size_bytes, copy.checksum, copy.generation)
