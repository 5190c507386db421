"""Carries out memory's commands and reports how each copy ended; decides nothing. Live; driven by `server.py`.

The server's one thread calls `feed` with an event: the policy decides, the journal is written, then the commands are
carried out. Disk copies run on worker threads; their endings queue up, poke `poke_fd`, and come back in by `drain`.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import assert_never

from outrider.errors import LawBroken
from outrider.journal import Journal
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.tiers.arena import Arena
from outrider.memory.tiers.disk import Damaged, Disk

READERS = 2
LOADS_PER_REPORT = 8  # copies whose endings come back as one event

Answer = ev.Grant | ev.Offer | ev.Acknowledge | ev.Refuse
log = logging.getLogger("outrider.memory")


class Mover:
    """The policy's hands: one policy object, its journal, and the threads that touch the disk."""

    def __init__(
        self,
        policy: Policy,
        arena: Arena,
        disk: Disk | None,
        journal: Journal | None,
        answer: Callable[[Answer], None],
        clock: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.wake_at_s: float | None = None
        self.poke_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arena, self._disk, self._journal, self._answer = arena, disk, journal, answer
        self._endings: SimpleQueue[ev.Copied | ev.CopyFailed | BaseException] = SimpleQueue()
        self._loads: SimpleQueue[tuple[ev.Copy, ...] | None] = SimpleQueue()
        self._writes: SimpleQueue[ev.Save | ev.Erase | None] = SimpleQueue()
        self._failing = ""
        jobs = [("read", self._read_all)] * READERS + [("write", self._write_all)] if disk else []
        self._threads = [threading.Thread(target=job, name=f"outrider-disk-{name}", daemon=True) for name, job in jobs]
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
                case ev.Load(copies):
                    for start in range(0, len(copies), LOADS_PER_REPORT):
                        self._loads.put(copies[start : start + LOADS_PER_REPORT])
                case ev.Save() | ev.Erase():
                    self._writes.put(command)
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
            self._say_once(ending)
            self.feed(ending)
        if self.wake_at_s is not None and self.clock() >= self.wake_at_s:
            self.wake_at_s = None
            self.feed(ev.Woke())

    def close(self) -> None:
        """End the threads after what is queued; what was acknowledged as durable is on disk already."""
        for _ in range(READERS):
            self._loads.put(None)
        self._writes.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.poke_fd)
        if self._journal is not None:
            self._journal.close()

    def _say_once(self, ending: ev.Copied | ev.CopyFailed) -> None:
        """One line when the disk begins to refuse, not one a block."""
        reason = ending.reason if isinstance(ending, ev.CopyFailed) else ""
        if reason and reason != self._failing and self._disk is not None:
            where = self._disk.directory
            log.warning("tiers.disk: %s in %s; blocks stay in host or are dropped, none is served.", reason, where)
        self._failing = reason

    def _report(self, ending: ev.Copied | ev.CopyFailed | BaseException) -> None:
        self._endings.put(ending)
        os.eventfd_write(self.poke_fd, 1)

    def _read_all(self) -> None:
        while (copies := self._loads.get()) is not None:
            try:
                self._read(copies)
            except BaseException as error:
                self._report(error)

    def _read(self, copies: tuple[ev.Copy, ...]) -> None:
        disk, done = self._disk_of(), []
        for copy in copies:
            try:
                disk.read(copy, self._padded(copy, copy.dst_at))
                done.append(copy.number)
            except Damaged as damage:
                self._report(ev.CopyFailed(copy.number, str(damage)))
            except OSError as error:
                self._report(ev.CopyFailed(copy.number, _name(error)))
        if done:
            self._report(ev.Copied(tuple(done)))

    def _write_all(self) -> None:
        while (command := self._writes.get()) is not None:
            try:
                if isinstance(command, ev.Save):
                    self._save(command.copies)
                else:
                    self._disk_of().erase(command.items)
            except OSError as error:  # of an erasure: a block that comes back after a crash is verified when it is read
                log.warning("tiers.disk: the index refused a record: %s.", error.strerror)
            except BaseException as error:
                self._report(error)

    def _save(self, copies: tuple[ev.Copy, ...]) -> None:
        disk, written = self._disk_of(), []
        for copy in copies:
            try:
                disk.write(copy, self._padded(copy, copy.src_at))
                written.append(copy)
            except OSError as error:
                self._report(ev.CopyFailed(copy.number, _name(error)))
        try:
            if written:
                disk.commit(written)
                self._report(ev.Copied(tuple(copy.number for copy in written)))
        except OSError as error:
            for copy in written:
                self._report(ev.CopyFailed(copy.number, _name(error)))

    def _padded(self, copy: ev.Copy, start: int) -> memoryview:
        """The block's extent in the arena, whole pages."""
        return self._arena.view(start, self.policy.residency.room_bytes("host", copy.size_bytes))

    def _disk_of(self) -> Disk:
        if self._disk is None:
            raise LawBroken(2, "a disk copy was asked for without a disk tier")
        return self._disk


def _name(error: OSError) -> str:
    """`ENOSPC`, `EIO`, ..."""
    return errno.errorcode.get(error.errno or 0, "EIO")
