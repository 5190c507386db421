"""The worker's half of an engine's connector: blocks out of memory and into it, on threads of its own. Live.

vLLM's worker calls these once a step, and none of them blocks for longer than the copy of one block:

    settle    before the forward pass: saves of blocks that are about to be overwritten end now
    load      lease, copy into the engine's blocks           save   prepare, copy out, complete; after the pass
    results   who is through: requests that received, requests whose saves are over, blocks that could not be loaded

Each copy is a Job with a deadline. Whoever gives a job up takes its lock, so that no thread touches the engine's blocks
after that, however late it comes. What was given up counts as failed: the engine computes.
"""

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from outrider.memory.adapters.orders import Copies, Orders
from outrider.memory.adapters.pages import Pages
from outrider.memory.adapters.reach import Reach
from outrider.memory.store import Slot, Store

LEASE_BYTES = 64 << 20  # held at once by one load: a context may be larger than the host tier
SLOW_BYTES_PER_S = 50e6  # what is slower than this is given up
LOADERS = 2


@dataclass
class Job:
    """One load or save. `good` blocks of a load are in place; `over`: no thread will touch its blocks any more."""

    copies: Copies
    by_s: float
    after: Any = None
    good: int = 0
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Results:
    """What one step may tell the scheduler."""

    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)


class Copying:
    """Belongs to the worker's thread, but for the loops. `patience_s`: what a job may take besides its bytes."""

    def __init__(
        self, pages: Pages, reach: Reach, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pages, self.reach, self.patience_s, self.clock = pages, reach, patience_s, clock
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._loads: list[Job] = []
        self._saves: list[Job] = []
        self._held: set[str] = set()
        self._reads: SimpleQueue[Job | None] = SimpleQueue()
        self._writes: SimpleQueue[Job | None] = SimpleQueue()
        lanes = [(f"outrider-load-{i}", self._reads, self._load) for i in range(LOADERS)]
        for name, jobs, carry_out in [*lanes, ("outrider-save", self._writes, self._save)]:
            threading.Thread(target=self._work, args=(jobs, carry_out), name=name, daemon=True).start()

    # -- the worker's thread

    def settle(self, orders: Orders) -> None:
        """End the saves of requests whose blocks are given to others in this step."""
        for job in self._saves:
            if job.copies.request in orders.freed:
                self._end(job)

    def load(self, orders: Orders) -> None:
        """What was launched before, and may still write to these blocks for their last owner, is behind the fence."""
        fence = self.pages.fence() if orders.loads else None
        for copies in orders.loads:
            job = Job(copies, self._deadline_s(self._loads, copies), fence)
            self._loads.append(job)
            self._reads.put(job)

    def save(self, orders: Orders) -> None:
        """Called when the step's forward pass is launched: what it wrote is behind the fence."""
        self._held.update(orders.held)
        if not orders.saves:
            return
        fence = self.pages.fence()
        for copies in orders.saves:
            job = Job(copies, self._deadline_s(self._saves, copies), fence)
            self._saves.append(job)
            self._writes.put(job)

    def results(self) -> Results:
        """What is through since the last call; jobs whose time is up are given up here."""
        found = Results()
        for job in self._through(self._loads, "late_loads"):
            found.received.add(job.copies.request)
            found.bad_blocks.update(job.copies.blocks[job.good :])
            self._count("loaded_blocks", job.good)
            self._count("failed_blocks", len(job.copies.blocks) - job.good)
        self._through(self._saves, "late_saves")
        busy = {job.copies.request for job in self._saves}
        found.sent = self._held - busy
        self._held &= busy
        return found

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last call."""
        with self._counting:
            counts, self.counts = self.counts, Counter()
        return dict(+counts)

    def close(self) -> None:
        for job in (*self._loads, *self._saves):
            self._end(job)
        for jobs in (*[self._reads] * LOADERS, self._writes):
            jobs.put(None)
        self.reach.close()

    def _through(self, jobs: list[Job], late: str) -> list[Job]:
        """Take out of `jobs` those that are over; count those given up now as `late`."""
        now = self.clock()
        for job in jobs:
            if not job.over and now > job.by_s:
                self._end(job)
                self._count(late, 1)
        over: list[Job] = []
        going: list[Job] = []
        for job in jobs:  # looked at once: it may end between two looks
            (over if job.over else going).append(job)
        jobs[:] = going
        return over

    def _deadline_s(self, before: list[Job], copies: Copies) -> float:
        blocks = len(copies.blocks) + sum(len(job.copies.blocks) for job in before)
        return self.clock() + self.patience_s + blocks * self.pages.block_bytes / SLOW_BYTES_PER_S

    def _count(self, name: str, count: int) -> None:
        with self._counting:
            self.counts[name] += count

    # -- the copying threads

    def _work(self, jobs: "SimpleQueue[Job | None]", carry_out: Callable[[Job], int]) -> None:
        while (job := jobs.get()) is not None:
            good = 0
            try:
                if not job.over:
                    good = carry_out(job)
            except Exception:  # a bug of ours: this job failed, the next ones go on
                traceback.print_exc()
            self._end(job, good)

    def _end(self, job: Job, good: int = 0) -> None:
        """From here on no thread touches its blocks; the first end counts."""
        with job.lock:
            if not job.over:
                job.good, job.over = good, True

    def _load(self, job: Job) -> int:
        """Blocks in place, before the first that failed."""
        step = max(1, LEASE_BYTES // self.pages.block_bytes)
        good = 0
        for start in range(0, len(job.copies.keys), step):
            stop = min(start + step, len(job.copies.keys))
            good += self.reach.ask(partial(self._copy_in, job, slice(start, stop)), 0)
            if good < stop:
                break
        return good

    def _copy_in(self, job: Job, part: slice, store: Store) -> int:
        keys, blocks = job.copies.keys[part], job.copies.blocks[part]
        rest_s = max(0.0, min(job.by_s - self.clock(), self.patience_s))
        with store.lease(keys, timeout_s=rest_s) as lease:  # StoreGone at its end: what was read may be others' bytes
            for good, (view, block) in enumerate(zip(lease.views, blocks, strict=True)):
                if view is None or len(view) != self.pages.block_bytes:
                    return good
                with job.lock:
                    if job.over:
                        return good
                    self.pages.write(block, view, job.after)
        return len(blocks)

    def _save(self, job: Job) -> int:
        return self.reach.ask(partial(self._copy_out, job), 0)

    def _copy_out(self, job: Job, store: Store) -> int:
        slots = store.prepare(job.copies.keys, self.pages.block_bytes)
        written: list[Slot] = []
        try:
            for slot, block in zip(slots, job.copies.blocks, strict=True):
                with job.lock:
                    if job.over:
                        break
                    if slot is not None:
                        self.pages.read(block, slot.view, job.after)
                        written.append(slot)
            self._end(job)  # the engine may have its blocks back: the rest is memory's own
            store.complete(written)
            self._count("saved_blocks", len(written))
        finally:
            store.abandon([slot for slot in slots if slot is not None and slot not in written])
        return len(written)
