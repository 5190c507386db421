"""Laws 1-5 and 10 of the policy, by a state machine that plays all clients, the arena, the tiers below and the clock.

The model writes real names into a model arena and model tiers, whenever a command says so, as late as it likes. So
a late copy that lands in a reused slot, a leased block that is rewritten, or a draft that is read all show as a wrong
name. It runs over every combination of tiers: host with disk, with hybrid, with both.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Hybrid, Settings
from outrider.wants import Want

ITEMS = [f"{number:032x}" for number in range(10)]
DISK = Settings(
    64, 112, grain_bytes=8, header_bytes=8, disk_read=32.0, disk_write=32.0, recompute=4.0, save_bytes=24,
    paths_max=3, patience_s=20.0, retry_s=3.0,
)  # fmt: skip
DEVICE = Hybrid(96, cache_bytes=32, line_bytes=16, read=32.0, hit_read=128.0, write=32.0)
HYBRID = msgspec.structs.replace(DISK, host_bytes=40, disk_bytes=0, hybrid=DEVICE)
BOTH = msgspec.structs.replace(DISK, host_bytes=40, hybrid=DEVICE)
CLIENTS = st.integers(1, 3)
CHAINS = st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4, unique=True)


@dataclass
class Flying:
    copy: ev.Copy
    src: str
    dst: str

    def ends(self) -> list[tuple[str, int]]:
        """What it reads and what it writes: (tier, address)."""
        return [(self.src, self.copy.src_at)] + [(self.dst, self.copy.dst_at)] * (self.dst != "cache")


class Memory(RuleBasedStateMachine):
    settings: Settings

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(self.settings)
        self.now = 100.0
        self.request = 0
        self.wake_s: float | None = None
        self.journal: list[tuple[float, bytes, bytes]] = []
        self.arena: dict[int, tuple[int, str, str]] = {}  # at -> (bytes, item, "draft" | "here")
        self.disk: dict[str, ev.Copy] = {}  # durable blocks: the save that made them so
        self.slots: dict[tuple[str, int], tuple[int, str]] = {}  # (tier, at) -> (bytes, what was written there last)
        self.cached: dict[str, ev.Span] = {}  # what the hybrid device was told to keep, where it lies there
        self.flying: list[Flying] = []
        self.drafts: dict[tuple[int, str], ev.Span] = {}
        self.asked: dict[tuple[int, int], tuple[str, tuple[str, ...], float]] = {}
        self.leases: dict[tuple[int, int], dict[str, ev.Span]] = {}

    @initialize(count=st.integers(0, 7), written=st.integers(0, 7))
    def begin(self, count: int, written: int) -> None:
        """After a restart some blocks are on disk and nowhere else; others were written since, more than host holds."""
        if self.settings.disk_bytes:
            found = tuple(ev.Found(item, at * 16, 8, 1000 + at, at + 1) for at, item in enumerate(ITEMS[:count]))
            for block in found:
                copy = ev.Copy(0, block.item, block.size_bytes, 0, block.at, block.checksum, block.generation)
                self.disk[block.item], self.slots["disk", block.at] = copy, (block.size_bytes, copy.item)
            assert self.feed(ev.Recovered(found)) == []
        for item in ITEMS[::-1][:written]:
            self.prepare(1, [item], 8)
            self.finish(1, durable=False)
            while self.flying:
                self.end(self.flying[:1])

    # the shell: what move.py and server.py do ------------------------------------------------------------------

    def feed(self, event: ev.Event) -> list[ev.Command]:
        commands = self.policy.handle(event, self.now)
        encode = msgspec.json.encode
        self.journal.append((self.now, encode(event), encode(commands)))
        for command in commands:
            self.carry_out(command)
        self.policy.residency.check()
        return commands

    def carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Grant(client, request, spans):
                kind, items, _ = self.asked.pop((client, request))
                assert kind == "lease" and len(spans) == len(items)
                held = {item: span for item, span in zip(items, spans, strict=True) if span is not None}
                for item, span in held.items():
                    assert self.arena[span.at] == (span.size_bytes, item, "here")  # laws 1 and 3
                self.leases[client, request] = held
            case ev.Offer(client, request, spans):
                kind, items, _ = self.asked.pop((client, request))
                assert kind == "prepare"
                for item, span in zip(items, spans, strict=True):
                    if span is not None:
                        self.write_arena(span.at, span.size_bytes, item, "draft")
                        self.drafts[client, item] = span
            case ev.Acknowledge(client, request, failed):
                kind, items, _ = self.asked.pop((client, request))
                if kind in ("durable", "flush"):  # law 5: acknowledged means on disk, now
                    for item in items:
                        assert item in failed or item in self.disk, f"{item} is not durable"
            case ev.Refuse():
                raise AssertionError(f"nothing here breaks the rules: {command}")
            case ev.Load(copies, src):
                for copy in copies:
                    assert self.slots[src, copy.src_at] == (copy.size_bytes, copy.item)
                    assert src != "disk" or self.disk[copy.item].checksum == copy.checksum
                    self.write_arena(copy.dst_at, copy.size_bytes, copy.item, "flying")
                    self.flying.append(Flying(copy, src, "host"))
            case ev.Save(copies, src, dst):
                for copy in copies:
                    if src == "host":
                        assert self.arena[copy.src_at] == (copy.size_bytes, copy.item, "here")
                    else:
                        assert self.slots[src, copy.src_at] == (copy.size_bytes, copy.item)
                    self.no_one_at(dst, copy.dst_at, copy.size_bytes)
                    self.slots[dst, copy.dst_at] = (copy.size_bytes, copy.item)
                    self.flying.append(Flying(copy, src, dst))
            case ev.Erase(items):
                for item in items:
                    self.disk.pop(item, None)
            case ev.Prefetch(copies, pin):
                assert pin
                for copy in copies:
                    assert self.slots["hybrid", copy.src_at] == (copy.size_bytes, copy.item)
                    assert copy.item not in self.cached
                    self.flying.append(Flying(copy, "hybrid", "cache"))
                    self.cached[copy.item] = ev.Span(copy.src_at, copy.size_bytes)
                taken = sum(-(-span.size_bytes // 16) * 16 for span in self.cached.values())
                assert taken <= 32, "more is to be pinned than the device can keep"
            case ev.Unpin(spans):
                for span in spans:
                    (item,) = (item for item, kept in self.cached.items() if kept == span)
                    assert not any(f.dst == "cache" and f.copy.item == item for f in self.flying), "still coming"
                    del self.cached[item]
            case ev.Wake(at_s):
                assert at_s > self.now
                self.wake_s = at_s

    def write_arena(self, at: int, size_bytes: int, item: str, state: str) -> None:
        """Bytes are written here now: nobody may hold, write or move anything that overlaps them."""
        held = [(span, "lease") for spans in self.leases.values() for span in spans.values()]
        held += [(span, "draft") for span in self.drafts.values()]
        for f in self.flying:
            held += [(ev.Span(at, f.copy.size_bytes), "copy") for tier, at in f.ends() if tier == "host"]
        for span, what in held:
            assert at + size_bytes <= span.at or span.at + span.size_bytes <= at, f"{item} overwrites a {what}"
        room_bytes = -(-size_bytes // 8) * 8
        self.arena = {a: entry for a, entry in self.arena.items() if a + entry[0] <= at or at + room_bytes <= a}
        self.arena[at] = (size_bytes, item, state)

    def no_one_at(self, tier: str, at: int, size_bytes: int) -> None:
        """A slot is written now: nothing reads or writes it, nothing durable or pinned lies there."""
        head = 8 if tier == "disk" else 0
        end = at + size_bytes + head
        for f in self.flying:
            for other, begin in f.ends():
                apart = other != tier or end <= begin or begin + f.copy.size_bytes + head <= at
                assert apart, "a slot in use is written"
        held = [(copy.item, copy.dst_at, copy.size_bytes) for copy in self.disk.values()]
        if tier == "hybrid":
            held = [(item, span.at, span.size_bytes) for item, span in self.cached.items()]
            blocks = self.policy.residency.blocks.values()
            here = [block for block in blocks if block.state["hybrid"] is At.HERE]
            held += [(block.item, block.at["hybrid"], block.size_bytes) for block in here]
        for item, begin, length in held:
            assert end <= begin or begin + length + head <= at, f"{item} lies there and is overwritten"
        taken = {(t, a): entry for (t, a), entry in self.slots.items() if t != tier or a + entry[0] <= at or end <= a}
        self.slots = taken

    def ask(self, kind: str, client: int, items: tuple[str, ...], by_s: float = 0.0) -> int:
        self.request += 1
        self.asked[client, self.request] = (kind, items, by_s)
        return self.request

    # what may happen -------------------------------------------------------------------------------------------

    @rule(client=CLIENTS, chain=CHAINS, size_bytes=st.sampled_from([8, 8, 13, 30, 80]))
    def prepare(self, client: int, chain: list[str], size_bytes: int) -> None:
        items = tuple(chain)
        request = self.ask("prepare", client, items)
        self.feed(ev.Prepared(client, request, items, size_bytes))
        assert (client, request) not in self.asked

    @precondition(lambda self: self.drafts)
    @rule(data=st.data(), durable=st.booleans())
    def complete(self, data: st.DataObject, durable: bool) -> None:
        client, _ = data.draw(st.sampled_from(sorted(self.drafts)))
        self.finish(client, durable)

    def finish(self, client: int, durable: bool) -> None:
        items = tuple(item for c, item in self.drafts if c == client)
        for item in items:
            span = self.drafts.pop((client, item))
            self.arena[span.at] = (span.size_bytes, item, "here")
        request = self.ask("durable" if durable else "complete", client, items)
        checksums = tuple(len(self.journal) * 100 + at for at in range(len(items)))
        self.feed(ev.Completed(client, request, items, checksums, durable))
        assert durable or (client, request) not in self.asked
        assert not any(self.policy.residency.state(item, "host") is At.DRAFT for item in items)

    @precondition(lambda self: self.drafts)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        client, item = data.draw(st.sampled_from(sorted(self.drafts)))
        del self.drafts[client, item]
        request = self.ask("abandon", client, (item,))
        self.feed(ev.Abandoned(client, request, (item,)))
        assert (client, request) not in self.asked
        assert not self.policy.residency.published(item)

    @rule(client=CLIENTS, chain=CHAINS, wait_s=st.sampled_from([0.0, 0.5, 4.0]))
    def lease(self, client: int, chain: list[str], wait_s: float) -> None:
        items = tuple(chain)
        by_s = self.now + wait_s
        request = self.ask("lease", client, items, by_s)
        count = self.policy.lookup(items)
        in_host = [self.policy.residency.state(item, "host") is At.HERE for item in items[:count]]
        self.feed(ev.Leased(client, request, items, by_s))
        if all(in_host):
            assert list(self.leases[client, request]) == list(items[:count])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client, request = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[client, request]
        self.feed(ev.Released(client, request))

    @rule(client=CLIENTS)
    def leave(self, client: int) -> None:
        for table in (self.leases, self.asked, self.drafts):
            for name in [name for name in table if name[0] == client]:
                del table[name]  # type: ignore[attr-defined]
        self.feed(ev.Left(client))

    @rule(path=st.sampled_from("abcd"), chain=CHAINS)
    def remember(self, path: str, chain: list[str]) -> None:
        self.feed(ev.Remembered(path, tuple(chain)))

    @rule(
        item=st.sampled_from([*"abcd", *ITEMS[:3], *ITEMS[-4:]]),
        ahead_s=st.sampled_from([-1.0, 0.2, 2.0, 9.0, 30.0, 31.0]),
        saved_s=st.sampled_from([-1.0, 0.1, 5.0]),
    )
    def want(self, item: str, ahead_s: float, saved_s: float) -> None:
        self.feed(ev.Wanted(Want(item, "host", self.now + ahead_s, saved_s)))

    @precondition(lambda self: self.below_host())
    @rule(data=st.data(), ahead_s=st.sampled_from([0.5, 4.0, 30.0]))
    def want_what_lies_below(self, data: st.DataObject, ahead_s: float) -> None:
        item = data.draw(st.sampled_from(self.below_host()))
        self.feed(ev.Wanted(Want(item, "host", self.now + ahead_s, 5.0)))

    @precondition(lambda self: self.below_host())
    @rule(data=st.data(), client=CLIENTS, wait_s=st.sampled_from([0.5, 4.0]))
    def lease_what_lies_below(self, data: st.DataObject, client: int, wait_s: float) -> None:
        self.lease(client, [data.draw(st.sampled_from(self.below_host()))], wait_s)

    def below_host(self) -> list[str]:
        blocks = self.policy.residency.blocks.values()
        return [b.item for b in blocks if b.state["host"] is At.ABSENT and self.policy.residency.published(b.item)]

    @rule(item=st.sampled_from([*"abcd", *ITEMS[:3], *ITEMS[-4:]]))
    def withdraw(self, item: str) -> None:
        self.feed(ev.Withdrawn(item))

    @rule(client=CLIENTS)
    def flush(self, client: int) -> None:
        blocks = self.policy.residency.blocks.values()
        here = tuple(block.item for block in blocks if block.state["host"] is At.HERE)
        self.feed(ev.Flushed(client, self.ask("flush", client, here)))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def copy_ends(self, data: st.DataObject) -> None:
        done = data.draw(st.lists(st.sampled_from(range(len(self.flying))), min_size=1, max_size=3, unique=True))
        self.end([self.flying[index] for index in done])

    def end(self, ended: list[Flying]) -> None:
        self.flying = [f for f in self.flying if f not in ended]
        for f in ended:
            if f.src == "host":
                assert self.arena[f.copy.src_at] == (f.copy.size_bytes, f.copy.item, "here")
            else:
                assert self.slots[f.src, f.copy.src_at][1] == f.copy.item, "the slot was reused under a read"
            if f.dst == "host":
                assert self.arena[f.copy.dst_at] == (f.copy.size_bytes, f.copy.item, "flying")
                self.arena[f.copy.dst_at] = (f.copy.size_bytes, f.copy.item, "here")
            elif f.dst == "disk":
                self.disk[f.copy.item] = f.copy
        self.feed(ev.Copied(tuple(f.copy.number for f in ended)))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), reason=st.sampled_from(["checksum", "stale", "EIO", "ENOSPC"]))
    def copy_fails(self, data: st.DataObject, reason: str) -> None:
        failed = self.flying.pop(data.draw(st.sampled_from(range(len(self.flying)))))
        block = self.policy.residency.blocks[failed.copy.item]
        if failed.dst == "host":
            del self.arena[failed.copy.dst_at]
        elif failed.dst == "cache":
            del self.cached[failed.copy.item]  # the device keeps nothing of what it could not fetch
        self.feed(ev.CopyFailed(failed.copy.number, reason))
        if failed.dst == "host":  # law 1: what was found damaged is not read again
            assert block.state[failed.src] is not At.HERE
            others = [place for place, state in block.state.items() if state is At.HERE]
            assert self.policy.residency.published(failed.copy.item) == bool(others)

    @rule(step_s=st.sampled_from([0.1, 1.0, 5.0]))
    def time_passes(self, step_s: float) -> None:
        end_s = self.now + step_s
        while self.wake_s is not None and self.wake_s <= end_s:
            self.now, self.wake_s = max(self.now, self.wake_s), None
            self.feed(ev.Woke())
        self.now = end_s

    # what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def every_lease_is_answered_in_time(self) -> None:
        for (client, request), (kind, _, by_s) in self.asked.items():
            assert kind != "lease" or by_s > self.now, f"lease {request} of client {client} is not answered"

    @invariant()
    def debts_are_open_only_while_saves_are_due(self) -> None:
        waiting = [kind for kind, _, _ in self.asked.values() if kind in ("durable", "flush")]
        if waiting and not any(f.dst == "disk" for f in self.flying):
            assert self.wake_s is not None, "someone waits for the disk, and nothing moves"

    @invariant()
    def everything_read_is_held(self) -> None:
        for block in self.policy.residency.blocks.values():
            holds = dict.fromkeys(self.policy.residency.places, 0)
            holds["host"] += sum(block.item in lease.pinned for lease in self.policy.demands.leases.values())
            for f in self.flying:
                if f.copy.item == block.item:
                    holds[f.src] += 1
            if "cache" in holds:  # a load from the device's cache holds it there, a load past it in the tier
                assert block.holds["cache"] + block.holds["hybrid"] == holds["hybrid"]
                holds |= {place: block.holds[place] for place in ("cache", "hybrid")}
            assert block.holds == holds

    @invariant()
    def the_device_keeps_what_the_books_say(self) -> None:
        blocks = self.policy.residency.blocks.values()
        booked = {b.item for b in blocks if b.state.get("cache", At.ABSENT) is not At.ABSENT}
        assert booked == set(self.cached)

    @invariant()
    def only_wanted_blocks_stay_in_the_devices_cache(self) -> None:
        for item in self.cached:
            block = self.policy.residency.blocks[item]
            if block.state["cache"] is At.HERE and not block.holds["cache"]:
                assert (item in self.policy.paths.told or block.joins) and block.state["hybrid"] is At.HERE

    @invariant()
    def leases_are_in_place(self) -> None:
        for held in self.leases.values():
            for item, span in held.items():
                assert self.arena[span.at] == (span.size_bytes, item, "here")
                assert self.policy.residency.state(item, "host") is At.HERE

    def teardown(self) -> None:
        """Law 10: the same events give the same commands, byte for byte; and in the end nothing is held."""
        again = Policy(msgspec.json.decode(msgspec.json.encode(self.settings), type=Settings))
        decode = msgspec.json.Decoder(ev.Event).decode
        for now, event, commands in self.journal:
            assert msgspec.json.encode(again.handle(decode(event), now)) == commands
        for f in list(self.flying):
            self.policy.handle(ev.CopyFailed(f.copy.number, "EIO"), self.now)
        for client in (1, 2, 3):
            self.policy.handle(ev.Left(client), self.now)
        for block in self.policy.residency.blocks.values():
            assert not block.joins and At.DRAFT not in block.state.values()


def machine(tiers: Settings, examples: int, laws: type[Memory] = Memory) -> Any:
    """The same laws over other tiers."""
    test: Any = type("Memory", (laws,), {"settings": tiers}).TestCase
    test.settings = hypothesis_settings(
        max_examples=examples, stateful_step_count=50, deadline=None, derandomize=True, database=None
    )
    return test


TestHostAndDisk = machine(DISK, 100)
TestHostAndHybrid = machine(HYBRID, 130)
TestHostHybridAndDisk = machine(BOTH, 150)
