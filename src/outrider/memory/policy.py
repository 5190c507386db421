"""Every decision of memory: who gets room, what is lifted, saved and evicted, who waits and who is answered. Pure.

Live it is driven by `move.py`, simulated by its twin; both send the events of `events.py` and carry out the commands.
Goals in order: never serve a wrong byte, never lose what was acknowledged as durable, answer every request in bounded
time, save the most expected seconds per byte-second held (`foresee.py`).
"""

from collections.abc import Iterable
from typing import Any, assert_never

from outrider.memory import events as ev
from outrider.memory.demand import Debt, Demands, Lease
from outrider.memory.flights import OPEN_END_S, Flights
from outrider.memory.paths import Paths
from outrider.memory.residency import At, Block, Residency
from outrider.memory.room import Room
from outrider.memory.settings import Settings
from outrider.memory.tally import Tally
from outrider.memory.told import Told

COPIES_PER_SAVE = 64


class Policy:
    """The state of one memory server. `handle` is its only door that changes anything."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.residency = Residency(settings.topology(), settings.grain_bytes, {"disk": settings.header_bytes})
        self.paths = Paths(settings.paths_max, settings.paths_max)
        self.demands = Demands()
        self.flights = Flights(self.residency)
        self.room = Room(settings, self.residency, self.paths)
        self.told = Told(self.residency, self.paths)
        self.tally = Tally()
        self._dirty: dict[str, None] = {}  # published in host, to be saved, oldest first
        self._generation = 0
        self._save_after_s = self._wake_at_s = -OPEN_END_S
        self._out: list[ev.Command] = []
        self._now = 0.0

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take one event at time `now` [s]; return what the shell must do, in order."""
        self._out, self._now = [], now
        self.room.begin(now)
        match event:
            case ev.Recovered(blocks):
                self._recover(blocks)
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
                self._owe(client, request, self._in_host())
            case ev.Left(client):
                self._leave(client)
            case ev.Copied(copies):
                for number in copies:
                    self._copied(number)
            case ev.CopyFailed(copy, reason):
                self._copy_failed(copy, reason)
            case ev.Woke():
                self._wake_at_s = -OPEN_END_S
            case _:
                assert_never(event)
        self._expire()
        self._load()
        self._save()
        self._out.extend(self.demands.settled())
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
        return self.tally.report(self.residency, open_wants=len(self.paths.wants), dirty_blocks=len(self._dirty))

    # what clients ask for ------------------------------------------------------------------------------------------

    def _lease(self, event: ev.Leased) -> None:
        run = event.items[: self.lookup(event.items)]
        lease = Lease(event.client, event.request, event.items, event.by_s)
        if lease.name in self.demands.leases:
            self._out.append(ev.Refuse(event.client, event.request, f"request {event.request} is open. Count upwards."))
            return
        self.demands.leases[lease.name] = lease
        self.room.touch(run)
        for item in dict.fromkeys(run):
            block = self.residency.blocks[item]
            block.lifted = False
            if block.state["host"] is At.HERE:
                block.holds["host"] += 1
                lease.pinned[item] = None
            else:
                lease.waiting[item] = None
                block.joins[lease.name] = None
                if block.state["host"] is At.UNWANTED:
                    self.residency.turn(block, "host", "want", self._now)
        for want in self.paths.returned(event.items):
            self.tally.wants_late += bool(lease.waiting)
            self.tally.wants_met += not lease.waiting
            self.told.drop(want.item, self._now)
        self._grant_if_whole(lease)

    def _grant_if_whole(self, lease: Lease) -> None:
        if not lease.waiting:
            self._grant(lease)

    def _grant(self, lease: Lease) -> None:
        """Answer with what is there; what it still waits for goes on for others, or is unwanted."""
        self._stop_waiting(lease)
        answer = lease.grant(self.residency)
        for span in answer.spans:
            self.tally.hit_blocks += span is not None
            self.tally.miss_blocks += span is None
            self.tally.moved("host", "engine", span.size_bytes if span else 0)
        self._out.append(answer)

    def _stop_waiting(self, lease: Lease) -> None:
        for item in lease.waiting:
            self.residency.blocks[item].joins.pop(lease.name, None)
            self.told.cancel(item, self._now)
        lease.waiting.clear()

    def _release(self, client: int, request: int) -> None:
        lease = self.demands.leases.pop((client, request), None)
        if lease is None:
            why = f"lease {request} is not open: it was released before, or never asked for"
            self._out.append(ev.Refuse(client, 0, why))
            return
        for item in lease.pinned:
            self.residency.blocks[item].holds["host"] -= 1
        self._stop_waiting(lease)

    def _prepare(self, event: ev.Prepared) -> None:
        spans: list[ev.Span | None] = []
        for item in event.items:
            known = item in self.residency.blocks  # stored, or another writer was first
            start = None if known else self._room("host", event.size_bytes)
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
            if "disk" in self.residency.places:
                self._dirty[item] = None
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
                debt.open[item] = None
                if block.state["disk"] is At.ABSENT:
                    self._dirty[item] = None

    def _in_host(self) -> list[str]:
        return [block.item for block in self.residency.blocks.values() if block.state["host"] is At.HERE]

    def _leave(self, client: int) -> None:
        leases, drafts = self.demands.leave(client)
        for lease in leases:
            self._release(client, lease.request)
        for item in drafts:
            self.residency.leave(self.residency.blocks[item], "host", "abandon", self._now)

    # what moves ----------------------------------------------------------------------------------------------------

    def _recover(self, blocks: tuple[ev.Found, ...]) -> None:
        newest_first = sorted(blocks, key=lambda found: -found.generation)
        lost = [found.item for found in newest_first if self.residency.recover(found, self._now) is None]
        self.room.touch(tuple(found.item for found in newest_first))
        self._generation = max((found.generation for found in blocks), default=0)
        self.tally.recovered_blocks = len(blocks) - len(lost)
        if lost:
            self._out.append(ev.Erase(tuple(lost)))

    def _expire(self) -> None:
        for lease in self.demands.due(self._now):
            self._grant(lease)
        self.tally.wants_expired += self.told.give_up(self.settings.patience_s, self._now)

    def _load(self) -> None:
        """Bring to host what leases wait for, then what wants can have in time and find room for."""
        copies: list[ev.Copy] = []
        for lease in self.demands.hungry():
            for item in lease.waiting:
                block = self.residency.blocks[item]
                if block.state["host"] is At.ABSENT:
                    start = self._room("host", block.size_bytes)
                    if start is None:
                        break
                    copies.append(self._lift(block, start))
        for want, item in self.told.queue():
            block = self.residency.blocks[item]
            by_s = want.by_s if want.by_s > self._now else OPEN_END_S  # overdue: better late than by the engine's lease
            if self.flights.end_s(block, "disk", "host", self._now) > by_s:
                continue  # would be late: asked again at the next event
            start = self._room("host", block.size_bytes, below=self.room.worth(block, "host"))
            if start is None:
                break
            block.lifted = True
            copies.append(self._lift(block, start, by_s))
        if copies:
            self._out.append(ev.Load(tuple(copies)))
        if not self.flights.bound_for("host") + self.flights.bound_for("disk") and self.demands.stuck():
            for lease in self.demands.hungry():  # room will not come: answer with what there is
                self._grant(lease)

    def _lift(self, block: Block, start: int, by_s: float = OPEN_END_S) -> ev.Copy:
        self.told.missing.pop(block.item, None)
        return self.flights.start(block, "disk", "host", start, self._now, by_s)

    def _save(self) -> None:
        """Write host blocks through to disk, one batch at a time: those that somebody waits for, then the oldest."""
        if not self._dirty or self.flights.bound_for("disk") or self._now < self._save_after_s:
            return
        copies: list[ev.Copy] = []
        batch_bytes = 0
        for item in sorted(self._dirty, key=lambda item: not self.residency.blocks[item].must):
            block = self.residency.blocks[item]
            if batch_bytes >= self.settings.save_bytes or len(copies) >= COPIES_PER_SAVE:
                break
            del self._dirty[item]
            below = None if block.must else self.room.worth(block, "disk")
            start = None if block.ended and not block.must else self._room("disk", block.size_bytes, below)
            if start is None:  # not worth a place on a full disk
                self.tally.unsaved_blocks += 1
                self._lost(block)
                continue
            self._generation += 1
            block.generation = self._generation
            copies.append(self.flights.start(block, "host", "disk", start, self._now))
            batch_bytes += block.size_bytes
        if copies:
            self._out.append(ev.Save(tuple(copies)))

    def _copied(self, number: int) -> None:
        block, move = self.flights.end(number)
        self.tally.moved(move.src, move.dst, block.size_bytes)
        landed = self.residency.end(block, move, "land", self._now)
        if move.dst == "disk":
            block.must = False
            self.demands.saved(block.item)
        elif landed:
            for lease in self._joined(block):
                block.holds["host"] += 1
                lease.pinned[block.item] = None
                self._grant_if_whole(lease)
        else:
            self._count_waste(block)

    def _copy_failed(self, number: int, reason: str) -> None:
        block, move = self.flights.end(number)
        self.tally.failure(reason)
        self.residency.end(block, move, "fail", self._now)
        if move.dst == "disk":
            self._lost(block)
            self._dirty[block.item] = None  # it stays in host, and is tried again after a rest
            self._save_after_s = self._now + self.settings.retry_s
        else:  # the disk's copy is not what was stored: nobody may read it again (law 1)
            waiting = self._joined(block)
            self.residency.leave(block, "disk", "evict", self._now)
            self._left(block, "disk")
            for lease in waiting:
                self._grant_if_whole(lease)

    def _joined(self, block: Block) -> list[Lease]:
        """The leases that waited for this block, which now no longer do."""
        leases = [self.demands.leases[name] for name in block.joins]
        block.joins.clear()
        for lease in leases:
            del lease.waiting[block.item]
        return leases

    def _lost(self, block: Block) -> None:
        block.must = False
        self.demands.lost(block.item)

    # room and time -------------------------------------------------------------------------------------------------

    def _room(self, place: str, size_bytes: int, below: float | None = None) -> int | None:
        start = self.room.find(place, size_bytes, below)
        while self.room.evicted:
            block, left = self.room.evicted.pop()
            self.tally.evicted(left)
            self._left(block, left)
        return start

    def _left(self, block: Block, place: str) -> None:
        """What follows from a block having left a tier."""
        if place == "disk":
            self._out.append(ev.Erase((block.item,)))
            self.told.missing.pop(block.item, None)
            self._lost(block)
            return
        self._count_waste(block)
        self._dirty.pop(block.item, None)
        if not self.residency.published(block.item):
            self._lost(block)
        elif block.item in self.paths.told:
            self.told.missing[block.item] = None

    def _count_waste(self, block: Block) -> None:
        self.tally.wasted_bytes += block.size_bytes * block.lifted
        block.lifted = False

    def _set_timer(self) -> None:
        """Ask for a wake-up at the next moment at which something must happen by itself."""
        moments = [lease.by_s for lease in self.demands.hungry()]
        moments += self.told.moments(self.settings.patience_s, self.settings.disk_read)
        moments += [self._save_after_s] * bool(self._dirty)
        later = [at_s for at_s in moments if at_s > self._now]
        if later and (min(later) < self._wake_at_s or self._wake_at_s <= self._now):
            self._wake_at_s = min(later)
            self._out.append(ev.Wake(self._wake_at_s))
