"""Every decision of memory: who gets room, what is lifted, saved and evicted, who waits and who is answered. Pure.

Live it is driven by `move.py`, simulated by its twin; both send the events of `events.py` and carry out the commands.
Goals in order: never serve a wrong byte, never lose what was acknowledged as durable, answer every request in bounded
time, save the most expected seconds per byte-second held (`foresee.py`).
"""

from collections.abc import Iterable
from typing import Any, assert_never

from outrider.memory import events as ev
from outrider.memory.demand import Debt, Demands, Lease
from outrider.memory.flights import OPEN_END_S
from outrider.memory.paths import Paths
from outrider.memory.residency import At, Residency
from outrider.memory.settings import Settings
from outrider.memory.tally import Tally
from outrider.memory.traffic import Traffic

TIERS = ("host", "hybrid", "disk")


class Policy:
    """The state of one memory server. `handle` is its only door that changes anything."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.residency = Residency(settings)
        self.paths = Paths(settings.paths_max, settings.paths_max)
        self.demands = Demands()
        self.tally = Tally()
        self.traffic = Traffic(settings, self.residency, self.paths, self.demands, self.tally)
        self.told, self.room = self.traffic.told, self.traffic.room
        self._wake_at_s = -OPEN_END_S
        self._out: list[ev.Command] = []
        self._now = 0.0

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take one event at time `now` [s]; return what the shell must do, in order."""
        self._out, self._now = [], now
        self.traffic.begin(self._out, now)
        match event:
            case ev.Recovered(blocks):
                self.traffic.recover(blocks)
            case ev.Leased():
                self._lease(event)
            case ev.Released(client, lease):
                self._release(client, lease)
            case ev.Prepared():
                self._prepare(event)
            case ev.Completed():
                self._complete(event)
            case ev.Abandoned(client, request, items):
                self._abandon(client, request, items)
            case ev.Remembered(path, items):
                self.paths.remember(path, items)
                self.room.touch(items)
                self.told.watch(items, now)
            case ev.Wanted(want):
                self.told.want(want, now)
            case ev.Withdrawn(item):
                self.told.withdraw(item, now)
            case ev.Flushed(client, request):
                self._owe(client, request, self._above_disk())
            case ev.Left(client):
                self._leave(client)
            case ev.Copied(copies):
                for number in copies:
                    self._landed(self.traffic.copied(number))
            case ev.CopyFailed(copy, reason):
                self._landed(self.traffic.failed(copy, reason))
            case ev.Woke():
                self._wake_at_s = -OPEN_END_S
            case _:
                assert_never(event)
        self._expire()
        self._move()
        self._out.extend(self.demands.settled())
        self.traffic.file()
        self._set_timer()
        return self._out

    def lookup(self, items: Iterable[str]) -> int:
        """Length of the leading run that is published in some tier. Changes nothing."""
        count = 0
        for item in items:
            if not self.residency.published(item):
                break
            count += 1
        return count

    def stats(self) -> dict[str, Any]:
        """Counters since the start and what each tier holds now; see `tally.py` for the names."""
        dirty = {item: None for queue in self.traffic.dirty.values() for item in queue}
        return self.tally.report(self.residency, open_wants=len(self.paths.wants), dirty_blocks=len(dirty))

    # what clients ask for ------------------------------------------------------------------------------------------

    def _lease(self, event: ev.Leased) -> None:
        run = event.items[: self.lookup(event.items)]
        lease = Lease(event.client, event.request, event.items, event.by_s)
        if lease.name in self.demands.leases:
            self._out.append(ev.Refuse(event.client, event.request, f"request {event.request} is open. Count upwards."))
            return
        self.demands.asked(lease)
        self.room.touch(run)
        for item in dict.fromkeys(run):
            block = self.residency.blocks[item]
            block.lifted = False
            lease.lay[item] = self.residency.lies(block, TIERS) or "host"
            if block.state["host"] is At.HERE:
                self.residency.hold(block, "host", 1)
                lease.pinned[item] = None
            else:
                lease.waiting[item] = None
                block.joins[lease.name] = None
                self.residency.mark(block)
                if block.state["host"] is At.ABSENT:
                    lease.unsent[item] = None
                if block.state["host"] is At.UNWANTED:
                    self.residency.turn(block, "host", "want", self._now)
        for want in self.paths.returned(event.items):
            self.tally.wants_late += bool(lease.waiting)
            self.tally.wants_met += not lease.waiting
            self.told.drop(want.item, self._now)
        self._landed([lease])

    def _grant(self, lease: Lease) -> None:
        """Answer with what is there; what it still waits for goes on for others, or is unwanted."""
        self._stop_waiting(lease)
        self.demands.answered(lease)
        answer = lease.grant(self.residency)
        given = [span.size_bytes for span in answer.spans if span is not None]
        self.tally.granted(len(given), len(answer.spans) - len(given), answer.lay)
        self.tally.moved("host", "engine", sum(given))
        self._out.append(answer)

    def _stop_waiting(self, lease: Lease) -> None:
        for item in lease.waiting:
            block = self.residency.blocks[item]
            block.joins.pop(lease.name, None)
            self.residency.mark(block)
            self.told.cancel(item, self._now)
        lease.waiting.clear()
        lease.unsent.clear()

    def _release(self, client: int, request: int) -> None:
        lease = self.demands.released((client, request))
        if lease is None:
            why = f"lease {request} is not open: it was released before, or never asked for"
            self._out.append(ev.Refuse(client, 0, why))
            return
        for item in lease.pinned:
            self.residency.hold(self.residency.blocks[item], "host", -1)
        self._stop_waiting(lease)

    def _prepare(self, event: ev.Prepared) -> None:
        spans: list[ev.Span | None] = []
        for item in event.items:
            known = item in self.residency.blocks  # stored, or another writer was first
            start = None if known else self.traffic.find("host", event.size_bytes)
            if start is not None:
                self.residency.draft(item, event.size_bytes, start, now=self._now)
                self.demands.drafted(event.client, item)
            self.tally.refused_blocks += start is None and not known
            spans.append(None if start is None else ev.Span(start, event.size_bytes))
        self._out.append(ev.Offer(event.client, event.request, tuple(spans)))

    def _not_drafted(self, client: int, request: int, items: tuple[str, ...]) -> bool:
        """Refuse a request about blocks that this client does not write, before anything is changed."""
        for item in items:
            if not self.demands.writes(client, item) or items.count(item) > 1:
                why = f"block {item} was not prepared by this client, or was completed or abandoned before"
                self._out.append(ev.Refuse(client, request, why))
                return True
        return False

    def _complete(self, event: ev.Completed) -> None:
        if len(event.checksums) != len(event.items):
            self._out.append(ev.Refuse(event.client, event.request, "complete needs one checksum a block"))
            return
        if self._not_drafted(event.client, event.request, event.items):
            return
        for item, checksum in zip(event.items, event.checksums, strict=True):
            block = self.residency.blocks[item]
            block.checksum = checksum
            self.residency.turn(block, "host", "complete", self._now)
            self.demands.written(event.client, item)
            self.tally.moved("engine", "host", block.size_bytes)
            self.traffic.published(block)
        self.room.touch(event.items)
        self._owe(event.client, event.request, event.items if event.durable else ())

    def _abandon(self, client: int, request: int, items: tuple[str, ...]) -> None:
        if self._not_drafted(client, request, items):
            return
        for item in items:
            self.demands.written(client, item)
            self.residency.leave(self.residency.blocks[item], "host", "abandon", self._now)
        self._out.append(ev.Acknowledge(client, request))

    def _owe(self, client: int, request: int, items: Iterable[str]) -> None:
        """Acknowledge once all of `items` are on disk, or cannot be."""
        debt = Debt(client, request)
        self.demands.owe(debt)
        for item in items:
            block = self.residency.blocks[item]
            if "disk" not in self.residency.places:
                debt.failed[item] = None
            elif block.state["disk"] is At.HERE:
                debt.done[item] = None
            else:
                block.must = True
                self.residency.mark(block)
                debt.open[item] = None
                if block.state["disk"] is At.ABSENT:
                    self.traffic.dirty["disk"].add(item, urgent=True)

    def _above_disk(self) -> list[str]:
        blocks = self.residency.blocks.values()
        return [block.item for block in blocks if self.residency.lies(block, ("host", "hybrid"))]

    def _leave(self, client: int) -> None:
        leases, drafts = self.demands.leave(client)
        for lease in leases:
            self._release(client, lease.request)
        for item in drafts:
            self.residency.leave(self.residency.blocks[item], "host", "abandon", self._now)

    # what moves, and when -------------------------------------------------------------------------------------------

    def _landed(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            if not lease.waiting:
                self._grant(lease)

    def _expire(self) -> None:
        for lease in self.demands.due(self._now):
            self._grant(lease)
        self.tally.wants_expired += self.told.give_up(self.settings.patience_s, self._now)

    def _move(self) -> None:
        self.traffic.load()
        if not self.traffic.flights.any() and self.demands.stuck():
            for lease in self.demands.hungry():  # room will not come: answer with what there is
                self._grant(lease)
        self.traffic.save()

    def _set_timer(self) -> None:
        """Ask for a wake-up at the next moment at which something must happen by itself."""
        moments = [lease.by_s for lease in self.demands.hungry()]
        moments += self.traffic.moments()
        later = [at_s for at_s in moments if at_s > self._now]
        if later and (min(later) < self._wake_at_s or self._wake_at_s <= self._now):
            self._wake_at_s = min(later)
            self._out.append(ev.Wake(self._wake_at_s))
