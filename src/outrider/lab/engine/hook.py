"""The engine's side of memory: look up, load, save, remember. vLLM's KV connector in small.

The four calls are for the engine's thread and never block. Two loader threads and one saver copy the bytes; each job
ends with one message to the engine's thread, whatever happens: a memory server that dies costs time, never an answer.

| call | job | message at its end |
|---|---|---|
| look_up | how many leading keys does memory have? | `request.external`, 0 if memory is gone |
| load | lease the keys, copy their bytes into the pool | loaded: from the first failed block on, compute |
| save | prepare, copy out of the pool, complete | the pool may reuse the blocks |
| remember | offer what was not saved yet, name the chain for the wants of others | none |
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from outrider.errors import OutriderError
from outrider.lab.engine.forward import Forward
from outrider.lab.engine.request import Request
from outrider.lab.engine.scheduler import Scheduler
from outrider.memory import Store

T = TypeVar("T")
Job = Callable[[], object]
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 3.0
LEASE_S = 2.0  # a load that takes longer is given up: the request computes


class Hook:
    """`connect` gives a Store or raises; `tell` takes a function that the engine's thread calls soon."""

    def __init__(
        self, connect: Callable[[], Store], forward: Forward, scheduler: Scheduler, tell: Callable[[Job], None]
    ) -> None:
        self.connect, self.forward, self.scheduler, self.tell = connect, forward, scheduler, tell
        self.blocks = scheduler.blocks
        self.store: Store | None = None
        self.lock = threading.Lock()
        self.retry_s, self.retry_at_s = FIRST_RETRY_S, 0.0
        self.reads: SimpleQueue[Job | None] = SimpleQueue()
        self.writes: SimpleQueue[Job | None] = SimpleQueue()
        for name, jobs in (("load-0", self.reads), ("load-1", self.reads), ("save", self.writes)):
            threading.Thread(target=work, args=(jobs,), name=name, daemon=True).start()

    # -- the engine's thread

    def look_up(self, request: Request) -> None:
        """Ask for the blocks beyond those that are here; until the answer the scheduler parks the request."""
        keys = request.keys[: self.scheduler.reusable(request)]
        here = len(self.blocks.match(keys))
        if here == len(keys):
            return

        def found(count: int) -> None:
            request.external = here + count

        request.external = None
        self.start(self.reads, lambda store: store.lookup(keys[here:]), 0, found)

    def load(self, request: Request) -> None:
        """Fetch what the scheduler took blocks for; those of a request closed meanwhile are let go at the end."""
        start = request.computed // self.blocks.block_tokens
        stop = min(request.external or 0, self.scheduler.reusable(request))
        keys, blocks = request.keys[start:stop], request.blocks[start:stop]
        self.start(
            self.reads, lambda store: self.copy_in(store, keys, blocks), 0, lambda good: self.loaded(request, good)
        )

    def loaded(self, request: Request, good: int) -> None:
        self.scheduler.loaded(request, good)
        if request.closed:
            self.scheduler.remove(request)

    def save(self, pairs: Sequence[tuple[bytes, int]]) -> None:
        """The blocks are held until memory has copied them, so that the pool cannot reuse them before."""
        if pairs:
            keys, blocks = zip(*pairs, strict=True)
            self.blocks.hold(blocks)
            self.start(
                self.writes,
                lambda store: self.copy_out(store, keys, blocks),
                None,
                lambda _: self.blocks.release(blocks),
            )

    def remember(self, request: Request) -> None:
        """At the request's end. Blocks that it found here are offered too: memory may have dropped them since."""
        whole = request.computed // self.blocks.block_tokens
        own, keys = min(request.own_blocks, whole), request.keys[:whole]
        self.save(list(zip(keys[:own], request.blocks[:own], strict=True)))
        self.start(self.writes, lambda store: store.remember(request.id, keys), None, lambda _: None)

    def close(self) -> None:
        for jobs in (self.reads, self.reads, self.writes):
            jobs.put(None)
        if self.store is not None:
            self.store.close()

    # -- the copying threads

    def start(
        self, jobs: "SimpleQueue[Job | None]", call: Callable[[Store], T], gone: T, done: Callable[[T], None]
    ) -> None:
        """Queue `call`; its result, or `gone` if it failed, reaches `done` in the engine's thread."""

        def job() -> None:
            result = gone
            try:
                store = self.reach()
                result = gone if store is None else call(store)
            except OutriderError:
                return  # the server is gone or has no room; a Store looks for its server again by itself
            finally:
                self.tell(lambda: done(result))

        jobs.put(job)

    def copy_in(self, store: Store, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Blocks copied before the first that failed."""
        rows, routes = self.forward.rows, self.forward.route_rows
        with store.lease(keys, timeout_s=LEASE_S) as lease:
            for good, (view, block) in enumerate(zip(lease.views, blocks, strict=True)):
                if view is None or len(view) != self.forward.block_bytes:
                    return good
                data = np.frombuffer(view, np.uint8)
                rows[block], routes[block] = data[: rows.shape[1]], data[rows.shape[1] :]
        return len(blocks)

    def copy_out(self, store: Store, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        rows, routes = self.forward.rows, self.forward.route_rows
        slots = store.prepare(keys, self.forward.block_bytes)
        for slot, block in zip(slots, blocks, strict=True):
            if slot is not None:
                data = np.frombuffer(slot.view, np.uint8)
                data[: rows.shape[1]], data[rows.shape[1] :] = rows[block], routes[block]
        store.complete(slots)

    def reach(self) -> Store | None:
        """The store, connected at the first need; a server that is not there yet is tried with growing pauses."""
        with self.lock:
            if self.store is None and time.monotonic() >= self.retry_at_s:
                try:
                    self.store = self.connect()
                except (OutriderError, OSError):
                    self.retry_at_s = time.monotonic() + self.retry_s
                    self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)
            return self.store


def work(jobs: "SimpleQueue[Job | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:  # a bug; the job's `finally` has answered the engine, and the next jobs go on
            traceback.print_exc()
