"""The modelled engine's side of memory: look up, load, save, remember. Twin of `lab/engine/hook.py`.

Two readers and one saver, as there; a message to memory and back takes `EXCHANGE_S`, bytes go over the two links
between host and engine. Memory's blocks may be larger than the engine's: a page is `page_blocks` of them, named by the
last.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from outrider.errors import LawBroken
from outrider.lab.clock import Clock
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.job import Job
from outrider.lab.twins.links import Crew, Lane
from outrider.lab.twins.memory import Answer, MemoryTwin
from outrider.lab.twins.pool import Ids
from outrider.memory import events as ev

LEASE_S = 2.0  # a load that takes longer is given up: the request computes
READERS = 2
EXCHANGE_S = 0.0001  # measured: a lease of 256 blocks over a Unix socket between two cores, 0.10 to 0.15 ms
Over = Callable[[], None]


class MemoryHook:
    """One engine's client of memory."""

    def __init__(
        self, engine: Engine, memory: MemoryTwin, client: int, page_blocks: int, page_bytes: int,
        to_engine: Lane, to_host: Lane,
    ) -> None:  # fmt: skip
        self.engine, self.memory, self.client = engine, memory, client
        self.page_blocks, self.page_bytes = page_blocks, page_bytes
        self.to_engine, self.to_host = to_engine, to_host
        self.clock: Clock = engine.clock
        self.unread_bytes = 0  # granted behind a block that is gone, which nobody can use
        self._requests = 0
        self._reads, self._writes = Crew(READERS), Crew(1)

    # -- called by the engine

    def look_up(self, job: Job) -> None:
        """Ask for the pages beyond what is here; until the answer the engine parks the request."""
        reusable = self.engine.reusable(job)
        here = self.engine.pool.match(job.chain[:reusable])
        start, stop = here // self.page_blocks, reusable // self.page_blocks
        if start >= stop:
            return
        job.external = None
        items = self._items(job.chain, start, stop)
        self._reads.start(lambda over: self._exchange(lambda: self._found(job, start, items, over)))

    def load(self, job: Job) -> None:
        """Fetch what the engine took blocks for."""
        hit = job.computed // self.engine.block_tokens
        start = hit // self.page_blocks
        items = self._items(job.chain, start, min(job.external or 0, self.engine.reusable(job)) // self.page_blocks)
        self._reads.start(lambda over: self._exchange(lambda: self._lease(job, hit, start, items, over)))

    def save(self, job: Job, start: int, stop: int) -> None:
        """Blocks [start, stop) of its chain are full: offer the pages that this completes."""
        self._save(job.chain, start // self.page_blocks, stop // self.page_blocks)

    def remember(self, job: Job) -> None:
        """At the request's end; what it found in the engine is offered too, memory may have dropped it since."""
        self._save(job.chain, 0, min(job.own_blocks, job.named) // self.page_blocks)
        event = ev.Remembered(job.id, self._items(job.chain, 0, job.named // self.page_blocks))

        def tell(over: Over) -> None:
            self.memory.feed(event)
            over()

        self._writes.start(lambda over: self._exchange(partial(tell, over)))

    # -- readers

    def _found(self, job: Job, start: int, items: tuple[str, ...], over: Over) -> None:
        count = self.memory.lookup(items)
        job.external = (start + count) * self.page_blocks if count else 0
        over()
        self.engine.poke()

    def _lease(self, job: Job, hit: int, start: int, items: tuple[str, ...], over: Over) -> None:
        lies = [self.memory.lies(item) for item in items]
        event = ev.Leased(self.client, self._request(), items, self.clock.now + LEASE_S)

        def granted(answer: Answer) -> None:
            assert isinstance(answer, ev.Grant), answer
            good = next((n for n, span in enumerate(answer.spans) if span is None), len(items))
            lay = Counter(place for place, span in zip(lies, answer.spans, strict=True) if span)
            if lay != answer.lay:
                raise LawBroken(2, f"request {job.id}: blocks lay {dict(lay)}, memory granted them from {answer.lay}")
            moved_bytes = sum(span.size_bytes for span in answer.spans[:good] if span)
            self.unread_bytes += sum(span.size_bytes for span in answer.spans[good:] if span)
            self.to_engine.send(moved_bytes, partial(copied, good))

        def copied(good: int) -> None:
            self.memory.feed(ev.Released(self.client, event.request))
            over()
            blocks = max(0, (start + good) * self.page_blocks - hit)
            if not job.admitted:
                self._count(job, lies[:good], start * self.page_blocks, hit)
            self.engine.loaded(job, blocks)

        self.memory.ask(event, granted)

    def _count(self, job: Job, lies: list[str], begin: int, hit: int) -> None:
        """How many of its blocks came out of which tier; those that the engine had before are not counted."""
        for number, place in enumerate(lies):
            first = begin + number * self.page_blocks
            blocks = first + self.page_blocks - max(first, hit)
            job.tiers[place] = job.tiers.get(place, 0) + blocks

    # -- saver

    def _save(self, chain: Ids, start: int, stop: int) -> None:
        """The engine's blocks are held until memory has copied them."""
        if start >= stop:
            return
        blocks = chain[start * self.page_blocks : stop * self.page_blocks]
        items = self._items(chain, start, stop)
        self.engine.pool.hold(blocks)
        self._writes.start(lambda over: self._exchange(lambda: self._prepare(blocks, items, over)))

    def _prepare(self, blocks: Ids, items: tuple[str, ...], over: Over) -> None:
        def offered(answer: Answer) -> None:
            assert isinstance(answer, ev.Offer), answer
            taken = tuple(item for item, span in zip(items, answer.spans, strict=True) if span)
            self.to_host.send(len(taken) * self.page_bytes, partial(copied, taken))

        def copied(taken: tuple[str, ...]) -> None:
            complete = ev.Completed(self.client, self._request(), taken, (0,) * len(taken), False)
            if taken:
                self.memory.ask(complete, done)
            else:
                done(ev.Acknowledge(self.client, 0))

        def done(answer: Answer) -> None:
            if not isinstance(answer, ev.Acknowledge):
                raise LawBroken(3, f"memory would not publish what it offered: {answer}")
            self.engine.pool.release(blocks)
            over()
            self.engine.poke()

        self.memory.ask(ev.Prepared(self.client, self._request(), items, self.page_bytes), offered)

    # -- both

    def _exchange(self, do: Callable[[], object]) -> None:
        self.clock.at(self.clock.now + EXCHANGE_S, do)

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    def _items(self, chain: Ids, start: int, stop: int) -> tuple[str, ...]:
        """Keys of pages [start, stop): the id of the last block, which stands for all before it."""
        last = chain[start * self.page_blocks + self.page_blocks - 1 : stop * self.page_blocks : self.page_blocks]
        return tuple(f"{block:032x}" for block in last.tolist())
