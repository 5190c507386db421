"""What moves between the tiers: loads, saves, prefetches and evictions, and what each ending means. Pure.

Owned by `policy.py`, which knows who asked and answers them; here the same few rules serve every tier below host:

    load      to host, from the fastest tier that has the block: what leases wait for, then what wants can have in time
    prefetch  into the hybrid device's own cache: wanted blocks whose time has not come, or that find no room in host
    save      written through, to every tier below host, in the background, one batch a tier at a time
"""

from outrider.memory import events as ev
from outrider.memory.demand import Demands, Lease
from outrider.memory.flights import OPEN_END_S, Flights
from outrider.memory.lifts import Lane
from outrider.memory.paths import Paths
from outrider.memory.residency import At, Block, Residency
from outrider.memory.room import Room
from outrider.memory.settings import BELOW, Settings
from outrider.memory.tally import DAMAGE, Tally
from outrider.memory.told import Told, source_of
from outrider.memory.unsaved import Unsaved

COPIES_PER_SAVE = 64
PIN_MARGIN = 2.0  # what is pinned makes way only for what is worth so many times as much: each change costs a read


class Traffic:
    """All copies under way, what is still to be saved, and what the hybrid device was asked to keep in its cache."""

    def __init__(self, settings: Settings, residency: Residency, paths: Paths, demands: Demands, tally: Tally) -> None:
        self.flights = Flights(residency)
        self.room = Room(settings, residency, paths)
        self.told = Told(settings, residency, paths)
        self.dirty = {place: Unsaved() for place in BELOW if place in residency.places}
        self._settings, self._residency, self._paths = settings, residency, paths
        self._demands, self._tally = demands, tally
        self._rest_until_s: dict[str, float] = {}  # of tiers that refused a copy
        self._cached: dict[str, None] = {}  # blocks in the hybrid device's cache, or on their way there
        self._look: dict[str, None] = {}  # those of `_cached` that something happened to
        self._fresh: dict[str, None] = {}  # left host while lifts were sought: not to be lifted in the same go
        self._condemned: dict[tuple[str, str], None] = {}  # (block, place): only waits for its last reader there
        self._generation = 0
        self._out: list[ev.Command] = []
        self._now = 0.0

    def begin(self, out: list[ev.Command], now: float) -> None:
        """A new event, whose commands go to `out`."""
        self._out, self._now = out, now
        self.room.begin(now)

    def moments(self) -> list[float]:
        """When something must move by itself: wants, and rests that end."""
        rests = [self._rest_until_s.get(place, -OPEN_END_S) for place, dirty in self.dirty.items() if dirty]
        return [*self.told.moments(self._now), *rests]

    def file(self) -> None:
        """Put every block to which something happened where it belongs now, in each of the orders kept."""
        for changed in (self._residency.changed, self._paths.changed):
            while changed:
                item, _ = changed.popitem()
                self.room.file(item)
                self.told.file(item)
                if item in self._cached:
                    self._look[item] = None

    def recover(self, blocks: tuple[ev.Found, ...]) -> None:
        """Enter what the disk tier's index holds; what does not fit it any more is erased."""
        newest_first = sorted(blocks, key=lambda found: -found.generation)
        lost = [found.item for found in newest_first if self._residency.recover(found, self._now) is None]
        self.room.touch(tuple(found.item for found in newest_first))
        self._generation = max((found.generation for found in blocks), default=0)
        self._tally.recovered_blocks = len(blocks) - len(lost)
        if lost:
            self._out.append(ev.Erase(tuple(lost)))

    def find(self, place: str, size_bytes: int, below: float | None = None) -> int | None:
        """An extent for `size_bytes` in `place`, evicting blocks worth less than `below` (None: any) to get it.

        None where what is leased, drafted or moving, or worth more, leaves too little room.
        """
        room_bytes, extents = self._residency.room_bytes(place, size_bytes), self._residency.extents[place]
        start = extents.take(room_bytes)
        evicted: list[Block] = []
        while start is None and room_bytes <= extents.capacity_bytes:
            self.file()
            victim = self.room.victim(place)
            if victim is None or (below is not None and victim[0] >= below):
                break
            self._residency.leave(victim[1], place, "evict", self._now)
            evicted.append(victim[1])
            start = extents.take(room_bytes)
        for block in reversed(evicted):
            self._tally.evicted(place)
            self._left(block, place)
        if evicted:
            self.file()
        return start

    def published(self, block: Block) -> None:
        """A client completed it: it is to be saved to every tier below host."""
        for dirty in self.dirty.values():
            dirty.add(block.item)

    # to host ---------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Bring to host what leases wait for, then what wants can have in time and find room for, or near it."""
        self._settle()
        loads: dict[str, list[ev.Copy]] = {}
        for lease in self._demands.hungry():
            for item in list(lease.unsent):
                block = self._residency.blocks[item]
                source = self._residency.source(block)
                if block.state["host"] is At.ABSENT and source is not None:
                    start = self.find("host", block.size_bytes)
                    if start is None:
                        break
                    self._lift(block, source, start, loads)
                del lease.unsent[item]
        self.file()
        self._foreseen(loads)
        for source, copies in loads.items():
            self._out.append(ev.Load(tuple(copies), source))

    def _foreseen(self, loads: dict[str, list[ev.Copy]]) -> None:
        """Lifts and prefetches for wants, in the order of `lifts.py`, until nothing more can be done in any lane."""
        prefetches: list[ev.Copy] = []
        missing = self.told.missing
        full = False  # no room any more in host
        crowded = self._rest_until_s.get("cache", 0.0) > self._now  # nor in the device's cache
        cursors: dict[Lane, tuple[float | str, ...]] = dict.fromkeys(missing.lanes(), ())
        self._fresh.clear()
        while heads := [(entry, lane) for lane, cursor in cursors.items() if (entry := missing.after(lane, cursor))]:
            entry, lane = min(heads)
            cursors[lane] = entry
            by_s, item = entry[0], entry[-1]
            if not missing.first(entry) or item in self._fresh:
                continue
            block, source = self._residency.blocks[item], source_of(lane)
            if not full and self.told.due_s(by_s, lane) <= self._now:
                by_s = by_s if by_s > self._now else OPEN_END_S  # overdue: better late than by a lease
                end_s = self.flights.end_s(block, source, "host", self._now)
                if end_s > by_s:
                    cursors[lane] = (end_s,)  # it would be late, as all before that: asked again at the next event
                    continue
                start = self.find("host", block.size_bytes, below=self.room.worth(block, "host"))
                if start is not None:
                    block.lifted = True
                    self._lift(block, source, start, loads, by_s)
                    self.file()
                    continue
                full = True
            if lane[0] == "hybrid" and "cache" in block.state and not crowded:
                start = self.find("cache", block.size_bytes, below=self.room.worth(block, "cache") / PIN_MARGIN)
                crowded = start is None
                if start is not None:
                    self._cached[item] = None
                    prefetches.append(self.flights.start(block, "hybrid", "cache", start, self._now))
                    self.file()
                    continue
            del cursors[lane]
        if prefetches and self._settings.hybrid is not None:
            self._out.append(ev.Prefetch(tuple(prefetches), self._settings.hybrid.pin))

    def _lift(
        self, block: Block, source: str, start: int, loads: dict[str, list[ev.Copy]], by_s: float = OPEN_END_S
    ) -> None:
        copy = self.flights.start(block, source, "host", start, self._now, by_s)
        loads.setdefault(tier_of(source), []).append(copy)

    def _settle(self) -> None:
        """Let go of what need not stay in the device's cache, and of condemned copies that nobody reads any more."""
        self.file()
        look, self._look = self._look, {}
        for item in look:
            if item not in self._cached:
                continue
            block = self._residency.blocks[item]
            state = block.state["cache"]
            wanted = item in self._paths.told or block.joins
            useful = wanted and block.state["host"] is not At.HERE and block.state["hybrid"] is At.HERE
            if state is At.COMING and not useful:
                self._residency.turn(block, "cache", "cancel", self._now)
            elif state is At.UNWANTED and useful:
                self._residency.turn(block, "cache", "want", self._now)
            elif state is At.HERE and not useful and not block.holds["cache"]:
                self._unpin(block)
                self._residency.leave(block, "cache", "evict", self._now)
        for item, place in list(self._condemned):
            block = self._residency.blocks[item]
            if not block.holds[place] and (place != "hybrid" or item not in self._cached):
                del self._condemned[item, place]
                self._residency.leave(block, place, "evict", self._now)

    def _unpin(self, block: Block) -> None:
        """It leaves the device's cache, or may."""
        del self._cached[block.item]
        self._out.append(ev.Unpin((ev.Span(block.at["hybrid"], block.size_bytes),)))

    # from host -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write through to each tier, one batch at a time: what somebody waits for, then the oldest."""
        for place, dirty in self.dirty.items():
            if dirty and not self.flights.bound_for(place) and self._now >= self._rest_until_s.get(place, 0.0):
                self._save(place, dirty)

    def _save(self, place: str, dirty: Unsaved) -> None:
        batches: dict[str, list[ev.Copy]] = {}
        copies = batch_bytes = 0
        while (
            batch_bytes < self._settings.save_bytes and copies < COPIES_PER_SAVE and (item := dirty.pop()) is not None
        ):
            block = self._residency.blocks[item]
            if block.state[place] is not At.ABSENT:
                continue
            must = block.must and place == "disk"
            below = None if must else self.room.worth(block, place)
            start = None if block.ended and not must else self.find(place, block.size_bytes, below)
            source = self._origin(block, place)
            if start is None or source is None:  # not worth a place in a full tier
                self._tally.unsaved_blocks += 1
                if place == "disk":
                    self._lost(block)
                continue
            if place == "disk":
                self._generation += 1
                block.generation = self._generation
            batches.setdefault(source, []).append(self.flights.start(block, source, place, start, self._now))
            copies, batch_bytes = copies + 1, batch_bytes + block.size_bytes
        for source, batch in batches.items():
            self._out.append(ev.Save(tuple(batch), source, place))

    def _origin(self, block: Block, place: str) -> str | None:
        """Where a block can be read to be saved to `place`."""
        return self._residency.lies(block, ("host",) if place == "hybrid" else ("host", "hybrid"))

    # endings ---------------------------------------------------------------------------------------------------------

    def copied(self, number: int) -> list[Lease]:
        """A copy ended well; the leases that waited for it, which now hold it."""
        block, move = self.flights.end(number)
        self._tally.moved(tier_of(move.src), move.dst, block.size_bytes)
        if move.dst == "cache" and block.state["cache"] is At.UNWANTED:
            self._unpin(block)
        landed = self._residency.end(block, move, "land", self._now)
        if move.dst == "disk":
            block.must = False
            self._residency.mark(block)
            self._demands.saved(block.item)
        if move.dst != "host":
            return []
        if not landed:
            self._count_waste(block)
            return []
        if move.src == "disk" and block.state.get("hybrid") is At.ABSENT:
            self.dirty["hybrid"].add(block.item)  # next time it comes from there
        leases = self._joined(block)
        for lease in leases:
            self._residency.hold(block, "host", 1)
            lease.pinned[block.item] = None
        return leases

    def failed(self, number: int, reason: str) -> list[Lease]:
        """A copy ended badly; the leases that wait for it in vain, if no other tier has it."""
        block, move = self.flights.end(number)
        source = tier_of(move.src)
        damaged = reason in DAMAGE and source != "host"
        blamed = source if move.dst == "host" or damaged else move.dst
        self._tally.failure(reason, tier_of(blamed))
        self._residency.end(block, move, "fail", self._now)
        if move.dst == "cache":  # if the device cannot read it at all, its load will say so
            del self._cached[block.item]
            self._rest(move.dst)
            return []
        if blamed == move.dst:
            self._rest(blamed)
        waiting = self._condemn(block, source) if blamed == source else []
        if move.dst in self.dirty:
            if move.dst == "disk":
                self._lost(block)
            if self._origin(block, move.dst) is not None:
                self.dirty[move.dst].add(block.item)  # it stays where it is, and is tried again after a rest
        return waiting

    def _rest(self, place: str) -> None:
        self._rest_until_s[place] = self._now + self._settings.retry_s

    def _condemn(self, block: Block, place: str) -> list[Lease]:
        """What lies there is not what was stored: nobody may read it again (law 1)."""
        if block.state[place] is not At.HERE:
            return []  # another reader found out before
        waiting: list[Lease] = []
        self._residency.turn(block, place, "condemn", self._now)
        if not self._residency.published(block.item):
            waiting = self._joined(block)
        for name in block.joins:
            lease = self._demands.leases[name]
            lease.unsent = {item: None for item in lease.waiting if item in lease.unsent or item == block.item}
        self._condemned[block.item, place] = None
        self._left(block, place)
        self._settle()
        return waiting

    def _joined(self, block: Block) -> list[Lease]:
        """The leases that waited for this block, which now no longer do."""
        leases = [self._demands.leases[name] for name in block.joins]
        block.joins.clear()
        self._residency.mark(block)
        for lease in leases:
            del lease.waiting[block.item]
            lease.unsent.pop(block.item, None)
        return leases

    def _left(self, block: Block, place: str) -> None:
        """What follows from a block having left a place, or being about to."""
        item = block.item
        if place == "cache":
            self._unpin(block)
            return
        if place == "disk":
            self._out.append(ev.Erase((item,)))
            self._lost(block)
        elif place == "host":
            self._count_waste(block)
        for dst, dirty in self.dirty.items():
            if self._origin(block, dst) is None:
                dirty.drop(item)
        if place == "host":
            self._fresh[item] = None
        if self._residency.lies(block, self._residency.places) is None:
            self._lost(block)

    def _lost(self, block: Block) -> None:
        """It is not on disk, and will not be soon: whoever waits for that hears so."""
        block.must = False
        self._residency.mark(block)
        self._demands.lost(block.item)

    def _count_waste(self, block: Block) -> None:
        self._tally.wasted_bytes += block.size_bytes * block.lifted
        block.lifted = False


def tier_of(place: str) -> str:
    """The tier that a place belongs to: what lies in the hybrid device's cache lies in `hybrid`."""
    return "hybrid" if place == "cache" else place
