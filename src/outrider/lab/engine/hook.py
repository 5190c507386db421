"""The engine's side of memory: look up, load, save, remember. vLLM's KV connector in small.

Four calls for the engine's thread, none of which blocks; two loader threads and one saver do the copying, and each job
ends with exactly one message to the engine, whatever happens: a memory server that dies costs time, never an answer.

| call | job | message at its end |
|---|---|---|
| look_up | how many leading keys does memory have? | (request, blocks), 0 if memory is gone |
| load | lease the keys, copy their bytes into the pool | (request, good): from the first failed block on, compute |
| save | prepare, copy out of the pool, complete | (blocks): the pool may reuse them |
| remember | name the chain for the wants of others | none |
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np

from outrider.errors import OutriderError, StoreGone
from outrider.lab.engine.forward import Forward
from outrider.lab.engine.request import Request

Buffer = memoryview
T = TypeVar("T")
Message = Callable[[], None]
Ended = Callable[[Request, int], None]
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 3.0


class Lease(Protocol):
    """Pinned blocks; `views` has one buffer or None for each key that was asked for."""

    @property
    def views(self) -> Sequence[Buffer | None]: ...


class Slot(Protocol):
    """Room for one block that is being written."""

    @property
    def view(self) -> Buffer: ...


class Store(Protocol):
    """What the engine uses of memory's Store. Every call may raise StoreGone."""

    def lookup(self, keys: Sequence[bytes]) -> int: ...
    def lease(self, keys: Sequence[bytes], timeout_s: float) -> AbstractContextManager[Lease]: ...
    def prepare(self, keys: Sequence[bytes], nbytes: int) -> Sequence[Slot | None]: ...
    def complete(self, slots: Sequence[Slot]) -> None: ...
    def abandon(self, slots: Sequence[Slot]) -> None: ...
    def remember(self, path: str, keys: Sequence[bytes]) -> None: ...
    def close(self) -> None: ...


class Hook:
    """`connect` gives a Store or raises; `tell` takes a function that the engine's thread calls soon."""

    def __init__(self, connect: Callable[[], Store], forward: Forward, tell: Callable[[Message], None]) -> None:
        self.connect, self.forward, self.tell = connect, forward, tell
        self.store: Store | None = None
        self.lock = threading.Lock()
        self.retry_s, self.retry_at_s = FIRST_RETRY_S, 0.0
        self.reads: SimpleQueue[Message | None] = SimpleQueue()
        self.writes: SimpleQueue[Message | None] = SimpleQueue()
        for name, jobs in (("load-0", self.reads), ("load-1", self.reads), ("save", self.writes)):
            threading.Thread(target=work, args=(jobs,), name=name, daemon=True).start()

    def look_up(self, request: Request, keys: Sequence[bytes], done: Ended) -> None:
        def job() -> None:
            found = 0
            try:
                found = self.ask(lambda store: store.lookup(keys), 0)
            finally:
                self.tell(lambda: done(request, found))

        self.reads.put(job)

    def load(self, request: Request, keys: Sequence[bytes], blocks: Sequence[int], done: Ended) -> None:
        def job() -> None:
            good = 0
            try:
                good = self.ask(lambda store: self.copy_in(store, keys, blocks), 0)
            finally:
                self.tell(lambda: done(request, good))

        self.reads.put(job)

    def save(self, keys: Sequence[bytes], blocks: Sequence[int], done: Callable[[Sequence[int]], None]) -> None:
        def job() -> None:
            try:
                self.ask(lambda store: self.copy_out(store, keys, blocks), None)
            finally:
                self.tell(lambda: done(blocks))

        self.writes.put(job)

    def remember(self, path: str, keys: Sequence[bytes]) -> None:
        self.writes.put(lambda: self.ask(lambda store: store.remember(path, keys), None))

    def copy_in(self, store: Store, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Blocks copied before the first that failed."""
        rows, routes = self.forward.rows, self.forward.route_rows
        with store.lease(keys, timeout_s=2.0) as lease:
            for good, (view, block) in enumerate(zip(lease.views, blocks, strict=True)):
                if view is None or len(view) != self.forward.block_bytes:
                    return good
                data = np.frombuffer(view, np.uint8)
                rows[block], routes[block] = data[: rows.shape[1]], data[rows.shape[1] :]
        return len(blocks)

    def copy_out(self, store: Store, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        rows, routes = self.forward.rows, self.forward.route_rows
        slots = store.prepare(keys, self.forward.block_bytes)
        mine = [(slot, block) for slot, block in zip(slots, blocks, strict=True) if slot is not None]
        for slot, block in mine:
            data = np.frombuffer(slot.view, np.uint8)
            data[: rows.shape[1]], data[rows.shape[1] :] = rows[block], routes[block]
        if mine:
            store.complete([slot for slot, _ in mine])

    def ask(self, call: Callable[[Store], T], otherwise: T) -> T:
        """`call` on the store, or `otherwise` while it is gone; it is tried again with growing pauses."""
        store = self.reach()
        if store is None:
            return otherwise
        try:
            return call(store)
        except StoreGone:
            with self.lock:
                if self.store is store:
                    self.store = None
            return otherwise

    def reach(self) -> Store | None:
        with self.lock:
            if self.store is None and time.monotonic() >= self.retry_at_s:
                try:
                    self.store, self.retry_s = self.connect(), FIRST_RETRY_S
                except (OutriderError, OSError):
                    self.retry_at_s = time.monotonic() + self.retry_s
                    self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)
            return self.store

    def close(self) -> None:
        for jobs in (self.reads, self.reads, self.writes):
            jobs.put(None)
        if self.store is not None:
            self.store.close()


def work(jobs: "SimpleQueue[Message | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:  # a bug; the job's `finally` has answered the engine, and the next jobs go on
            traceback.print_exc()
