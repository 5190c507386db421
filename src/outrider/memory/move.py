"""Carries out memory's commands and reports how each copy ended; decides nothing. Live; driven by `server.py`.

The server's one thread calls `feed` with an event: the policy decides, the journal is written, then the commands are
carried out. Copies run on worker threads, READERS and one writer a tier below host; their endings queue up, poke
`poke_fd`, and come back in by `drain`.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, assert_never

from outrider.errors import LawBroken
from outrider.journal import Journal
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.tiers.arena import Arena
from outrider.memory.tiers.disk import Disk
from outrider.memory.tiers.tier import Cached, Damaged, Tier, name_of

READERS = 2
LOADS_PER_REPORT = 8  # copies whose endings come back as one event

T = TypeVar("T")
Answer = ev.Grant | ev.Offer | ev.Acknowledge | ev.Refuse
Loads = SimpleQueue[tuple[ev.Copy, ...] | None]
Writes = SimpleQueue[ev.Save | ev.Erase | None]
log = logging.getLogger("outrider.memory")


class Mover:
    """The policy's hands: one policy object, its journal, and the threads that touch the tiers below host."""

    def __init__(
        self,
        policy: Policy,
        arena: Arena,
        disk: Disk | None,
        journal: Journal | None,
        answer: Callable[[Answer], None],
        clock: Callable[[], float],
        hybrid: Cached | None = None,
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.wake_at_s: float | None = None
        self.poke_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arena, self._disk, self._hybrid, self._journal, self._answer = arena, disk, hybrid, journal, answer
        self._endings: SimpleQueue[ev.Copied | ev.CopyFailed | BaseException] = SimpleQueue()
        tiers: dict[str, Tier | None] = {"hybrid": hybrid, "disk": disk}
        self._tiers = {name: tier for name, tier in tiers.items() if tier is not None}
        self._loads: dict[str, Loads] = {name: SimpleQueue() for name in self._tiers}
        self._writes: dict[str, Writes] = {name: SimpleQueue() for name in self._tiers}
        self._failing = dict.fromkeys(self._tiers, "")
        self._threads: list[threading.Thread] = []
        for name, tier in self._tiers.items():
            jobs: list[Callable[[], None]] = [partial(self._read_all, name, tier)] * READERS
            jobs.append(partial(self._write_all, name, tier))
            self._threads += [threading.Thread(target=job, name=f"outrider-{name}", daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()
        if disk is not None:
            self.feed(ev.Recovered(disk.found()))

    def feed(self, event: ev.Event) -> None:
        """One event in, its commands out."""
        now = self.clock()
        commands = self.policy.handle(event, now)
        if self._journal is not None:
            self._journal.write(now, event, commands)
        for command in commands:
            match command:
                case ev.Grant() | ev.Offer() | ev.Acknowledge() | ev.Refuse():
                    self._answer(command)
                case ev.Load(copies, src):
                    for start in range(0, len(copies), LOADS_PER_REPORT):
                        self._queue(self._loads, src).put(copies[start : start + LOADS_PER_REPORT])
                case ev.Save(dst=dst):
                    self._queue(self._writes, dst).put(command)
                case ev.Erase():
                    self._queue(self._writes, "disk").put(command)
                case ev.Prefetch(copies, pin):
                    self._cache().prefetch(copies, pin, self._prefetched)
                case ev.Unpin(spans):
                    self._cache().unpin(spans)
                case ev.Wake(at_s):
                    self.wake_at_s = at_s
                case _:
                    assert_never(command)

    def drain(self) -> None:
        """Feed every ending that has come in, and the wake-up that is due."""
        while not self._endings.empty():
            ending = self._endings.get()
            if isinstance(ending, BaseException):
                raise ending
            self.feed(ending)
        if self.wake_at_s is not None and self.clock() >= self.wake_at_s:
            self.wake_at_s = None
            self.feed(ev.Woke())

    def close(self) -> None:
        """End the threads after what is queued, and the tiers; what was acknowledged as durable is on disk already."""
        for name in self._tiers:
            for _ in range(READERS):
                self._loads[name].put(None)
            self._writes[name].put(None)
        for thread in self._threads:
            thread.join()
        for tier in self._tiers.values():
            tier.close()
        os.close(self.poke_fd)
        if self._journal is not None:
            self._journal.close()

    def _report(self, ending: ev.Copied | ev.CopyFailed | BaseException) -> None:
        self._endings.put(ending)
        os.eventfd_write(self.poke_fd, 1)

    def _failed(self, name: str, copy: ev.Copy, reason: str) -> None:
        """Report it; one line when a tier begins to refuse, not one a block."""
        if reason != self._failing[name]:
            self._failing[name] = reason
            where = self._tiers[name].where
            log.warning("tiers.%s: %s in %s; blocks stay in host or are dropped, none is served.", name, reason, where)
        self._report(ev.CopyFailed(copy.number, reason))

    def _done(self, name: str, copies: list[ev.Copy]) -> None:
        if copies:
            self._failing[name] = ""
            self._report(ev.Copied(tuple(copy.number for copy in copies)))

    def _prefetched(self, copy: ev.Copy, why_not: str) -> None:
        if why_not:
            self._failed("hybrid", copy, why_not)
        else:
            self._done("hybrid", [copy])

    def _read_all(self, name: str, tier: Tier) -> None:
        while (copies := self._loads[name].get()) is not None:
            try:
                self._read(name, tier, copies)
            except BaseException as error:
                self._report(error)

    def _read(self, name: str, tier: Tier, copies: tuple[ev.Copy, ...]) -> None:
        done: list[ev.Copy] = []
        for copy in copies:
            try:
                tier.read(copy, self._padded(copy, copy.dst_at))
                done.append(copy)
            except Damaged as damage:
                self._failed(name, copy, str(damage))
            except OSError as error:
                self._failed(name, copy, name_of(error.errno))
        self._done(name, done)

    def _write_all(self, name: str, tier: Tier) -> None:
        while (command := self._writes[name].get()) is not None:
            try:
                if isinstance(command, ev.Save):
                    self._save(name, tier, command)
                elif self._disk is not None:
                    self._disk.erase(command.items)
            except OSError as error:  # of an erasure: a block that comes back after a crash is verified when it is read
                log.warning("tiers.disk: the index refused a record: %s.", error.strerror)
            except BaseException as error:
                self._report(error)

    def _save(self, name: str, tier: Tier, save: ev.Save) -> None:
        written: list[ev.Copy] = []
        for copy in save.copies:
            try:
                padded = self._padded(copy, copy.src_at) if save.src == "host" else self._fetched(copy, save.src)
                tier.write(copy, padded)
                written.append(copy)
            except Damaged as damage:
                self._failed(save.src, copy, str(damage))
            except OSError as error:
                self._failed(name, copy, name_of(error.errno))
        try:
            if written:
                tier.commit(written)
            self._done(name, written)
        except OSError as error:
            for copy in written:
                self._failed(name, copy, name_of(error.errno))

    def _fetched(self, copy: ev.Copy, src: str) -> memoryview:
        """A block of the tier `src`, verified, in a buffer that direct I/O accepts. A read that fails is damage too."""
        buffer = memoryview(mmap.mmap(-1, self.policy.residency.room_bytes("host", copy.size_bytes)))
        try:
            self._tiers[src].read(copy, buffer)
        except OSError as error:
            raise Damaged("short") from error
        return buffer

    def _padded(self, copy: ev.Copy, start: int) -> memoryview:
        """The block's extent in the arena, whole pages."""
        return self._arena.view(start, self.policy.residency.room_bytes("host", copy.size_bytes))

    def _queue(self, queues: Mapping[str, "SimpleQueue[T]"], name: str) -> "SimpleQueue[T]":
        if name not in queues:
            raise LawBroken(2, f"a copy was asked for without a {name} tier")
        return queues[name]

    def _cache(self) -> Cached:
        if self._hybrid is None:
            raise LawBroken(2, "a prefetch was asked for without a hybrid tier")
        return self._hybrid
