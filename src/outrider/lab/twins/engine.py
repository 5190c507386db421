"""A modelled engine: the embedded engine's scheduling rules, with a step's duration in place of a forward pass.

    submitted -> waiting -> (loading: its blocks come from memory ->) running -> finished
                    ^------- preempted: blocks given back, all to be computed again -------'

Continuous batching under a token budget, chunked prefill, a prefix cache of whole blocks, preemption of the last in
order. Steps in which nothing is admitted and every request decodes are taken together, up to the next ending; what
arrives meanwhile cuts them off at the end of the step under way. `order` sorts requests; smaller goes first.
"""

import math
from bisect import insort
from dataclasses import dataclass

from outrider.errors import LawBroken
from outrider.lab.clock import Clock, Timer
from outrider.lab.twins.job import Hook, Job, Order, by_arrival
from outrider.lab.twins.pool import Pool
from outrider.lab.twins.speed import Speed


@dataclass(slots=True)
class Stretch:
    """`steps` equal steps under way, each `growth_s` longer than the one before it."""

    begin_s: float
    chunks: list[tuple[Job, int]]
    steps: int
    first_s: float
    growth_s: float
    timer: Timer | None = None

    def lasts_s(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    def steps_by(self, now: float) -> int:
        """The step that is under way at `now` ends as which."""
        passed_s = now - self.begin_s
        half = self.first_s - self.growth_s / 2
        root = math.sqrt(half * half + 2 * self.growth_s * passed_s)
        steps = math.ceil(2 * passed_s / (half + root)) if half + root > 0 else 1
        steps = min(max(steps, 1), self.steps)
        while steps > 1 and self.lasts_s(steps - 1) >= passed_s:
            steps -= 1
        while steps < self.steps and self.lasts_s(steps) < passed_s:
            steps += 1
        return steps


class Engine:
    """One modelled engine. `hook` is set after it is made, where there is memory."""

    def __init__(
        self, clock: Clock, speed: Speed, pool: Pool, block_tokens: int, max_batch_tokens: int, max_num_seqs: int,
        order: Order = by_arrival,
    ) -> None:  # fmt: skip
        self.clock, self.speed, self.pool, self.block_tokens = clock, speed, pool, block_tokens
        self.max_batch_tokens, self.max_num_seqs, self.order = max_batch_tokens, max_num_seqs, order
        self.hook: Hook | None = None
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.loading: list[Job] = []
        self.preemptions = self.steps = self.computed_tokens = 0
        self.busy_s = 0.0
        self.dead = False
        self._arrivals = 0
        self._under_way: Stretch | None = None
        self._busy = False  # scheduling or accounting: what happens now is seen by the next step
        self._settled = True  # the next step will compute for the same requests, if nothing happens

    def fits(self, job: Job) -> bool:
        """Can its prompt and answer ever be in the cache at once?"""
        return self.blocks_for(job.prompt_tokens + job.output_tokens) <= self.pool.capacity

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def reusable(self, job: Job) -> int:
        """Blocks that may come from a cache: one token at least is left to compute."""
        return min((job.prompt_tokens + job.generated - 1) // self.block_tokens, len(job.chain))

    # -- from outside

    def submit(self, job: Job) -> None:
        """Take a request that `fits`."""
        if self.dead:
            job.on_failed("refused", "nothing listens")
            return
        self._arrivals += 1
        job.arrival = self._arrivals
        self._queue(job)
        if self.hook:
            self.hook.look_up(job)
        self.poke()

    def abort(self, job: Job) -> None:
        """Forget it, wherever it is. No effect if it has finished, or never came."""
        if not job.closed and job.arrival:
            self.poke()
            self._close(job)

    def kill(self) -> None:
        """It is gone, with its cache: every open request breaks, and whoever comes is refused."""
        self.dead = True
        if self._under_way and self._under_way.timer:
            self._under_way.timer.cancel()
        self._under_way = None
        broken = [job for job in self.running + self.waiting + self.loading if not job.closed]
        for job in broken:
            self._close(job)
            job.on_failed("reset", "the engine died")

    def loaded(self, job: Job, good: int) -> None:
        """`good` blocks more arrived from memory; from there on it computes for itself."""
        self.loading.remove(job)
        if job.admitted:
            job.lost -= good * self.block_tokens
        else:
            job.external_blocks = good
        job.admitted = True
        insort(self.running, job, key=self.order)
        self._advance(job, good * self.block_tokens, saved=True)
        if job.closed:
            self._let_go(job)
        self.poke()

    def poke(self) -> None:
        """Something changed: what is under way ends with its present step; an idle engine looks at once."""
        stretch = self._under_way
        if stretch is None:
            if not self._busy and not self.dead:
                self._begin()
            return
        steps = stretch.steps_by(self.clock.now)
        if steps < stretch.steps:
            stretch.steps = steps
            assert stretch.timer is not None
            stretch.timer.cancel()
            stretch.timer = self.clock.at(stretch.begin_s + stretch.lasts_s(steps), self._end)

    # -- steps

    def _begin(self) -> None:
        self._busy = True
        chunks = self._schedule()
        self._busy = False
        if not chunks:
            return
        prompt = decodes = 0
        positions = 0.0
        for job, count in chunks:
            positions += count * (job.computed + (count + 1) / 2)
            if count == 1:
                decodes += 1
            else:
                prompt += count
        steps = 1 if prompt else self._steps_alike(chunks)
        first_s = self.speed.step_s(prompt, decodes, positions)
        stretch = Stretch(self.clock.now, chunks, steps, first_s, self.speed.per_position_s * len(chunks))
        stretch.timer = self.clock.at(self.clock.now + stretch.lasts_s(steps), self._end)
        self._under_way = stretch

    def _steps_alike(self, chunks: list[tuple[Job, int]]) -> int:
        """Steps until a request ends or the pool has no block left to grow into: at least the one that has room."""
        if not self._settled or any(job.left > 1 or not job.generated for job, _ in chunks):
            return 1
        steps = min(job.output_tokens - job.generated for job, _ in chunks)
        while steps > 1 and self._growth(chunks, steps) > self.pool.available:
            steps //= 2
        return max(steps, 1)

    def _growth(self, chunks: list[tuple[Job, int]], steps: int) -> int:
        return sum(max(0, self.blocks_for(job.computed + steps) - job.named - job.private) for job, _ in chunks)

    def _end(self) -> None:
        """Book what was computed, tell of tokens and endings; what follows from them comes in the next step but one."""
        stretch, self._under_way = self._under_way, None
        assert stretch is not None
        self.steps += stretch.steps
        self.busy_s += stretch.lasts_s(stretch.steps)
        self._busy = True
        if stretch.steps > 1:
            for job, _ in stretch.chunks:  # all at once: none of them had ended when the others grew
                if not job.closed:
                    self._grow_to(job, job.computed + stretch.steps)
        for job, count in stretch.chunks:
            if job.closed:
                continue
            tokens = count if stretch.steps == 1 else stretch.steps
            sampled = stretch.steps if count == 1 and job.left == 1 else int(job.left == count)
            job.passed += tokens
            self._advance(job, tokens)
            if not sampled:
                continue
            if not job.generated:
                job.on_first()
            job.generated += sampled
            if job.generated >= job.output_tokens:
                self._settle(job)
                self._close(job)
                job.on_finished()
        self._busy = False
        self._begin()

    def _settle(self, job: Job) -> None:
        """Every token of a finished request was computed here or came from a cache, once: nothing else adds up."""
        reused = (job.own_blocks + job.external_blocks) * self.block_tokens
        self.computed_tokens += job.passed
        if job.passed - job.lost != job.prompt_tokens + job.generated - 1 - reused:
            story = [
                f"prompt {job.prompt_tokens}",
                f"generated {job.generated}",
                f"passed {job.passed}",
                f"lost {job.lost}",
            ]
            raise LawBroken(2, f"request {job.id}: tokens do not add up with {reused} reused", story)

    def _grow_to(self, job: Job, tokens: int) -> None:
        missing = self.blocks_for(tokens) - job.named - job.private
        if missing > 0:
            self.pool.take(missing)
            job.private += missing

    def _advance(self, job: Job, count: int, saved: bool = False) -> None:
        """`count` more tokens are in the pool: name the blocks that they filled, offer them to memory."""
        job.computed += count
        whole = min(job.computed // self.block_tokens, len(job.chain))
        if whole > job.named:
            start, job.named = job.named, whole
            self.pool.name(job.chain[start:whole])
            job.private -= whole - start
            if self.hook and not saved:
                self.hook.save(job, start, whole)

    # -- which requests compute how many tokens in the next step

    def _schedule(self) -> list[tuple[Job, int]]:
        """Decodes first, then prompts in chunks, then newcomers, until the batch is full."""
        chunks: list[tuple[Job, int]] = []
        budget, self._settled = self.max_batch_tokens, True
        preempted = self.preemptions
        order = self.order
        for job in sorted(self.running, key=lambda job: (job.left > 1, order(job))):
            budget -= self._give(job, budget, chunks)
        for job in list(self.waiting):
            if self.preemptions > preempted:
                self._settled = False  # newcomers have their turn in the next step
                break
            if len(self.running) + len(self.loading) >= self.max_num_seqs:
                break
            if job.external is None or self._joins(job):
                continue  # memory has not answered yet, or another is just computing the same prefix
            if not self._admit(job):
                break  # no overtaking: the next may be smaller, but this one would starve
            if job in self.running:
                given = self._give(job, budget, chunks)
                budget -= given
                self._settled = self._settled and given > 0  # else its turn may come in the next step
        return chunks

    def _give(self, job: Job, budget: int, chunks: list[tuple[Job, int]]) -> int:
        """Plan its next chunk; returns its tokens, 0 where it was preempted, has no room or finds no budget."""
        count = min(job.left, budget)
        if count <= 0 or job not in self.running:
            return 0
        missing = self.blocks_for(job.computed + count) - job.named - job.private
        while missing > self.pool.available:
            victim = self.running[-1]
            if victim is job:
                return 0
            self._preempt(victim)
        if missing > 0:
            self.pool.take(missing)
            job.private += missing
        chunks.append((job, count))
        return count

    def _admit(self, job: Job) -> bool:
        """Reuse what is here, take blocks for the rest of the prompt, leave each running request one to grow into."""
        reusable = self.reusable(job)
        hit = self.pool.match(job.chain[:reusable])
        self.pool.hold(job.chain[:hit])
        missing = self.blocks_for(job.prompt_tokens + job.generated) - hit
        if missing + len(self.running) > self.pool.available:
            self.pool.release(job.chain[:hit])
            return False
        self.pool.take(missing)
        job.named, job.private, job.computed = hit, missing, hit * self.block_tokens
        if job.admitted:
            job.lost -= job.computed
        else:
            job.own_blocks = hit
        self.waiting.remove(job)
        if self.hook and min(job.external or 0, reusable) > hit:
            self.loading.append(job)
            self.hook.load(job)
        else:
            job.admitted = True
            insort(self.running, job, key=self.order)
        return True

    def _joins(self, job: Job) -> bool:
        """True if a request ahead of this one (or one that is loading) is about to have its next block."""
        chain = job.chain[: self.reusable(job)]
        here = self.pool.match(chain)
        if here == len(chain):
            return False
        key, place = chain[here], self.order(job)
        ahead = self.loading + [other for other in self.running if self.order(other) < place]
        return any(len(other.chain) > here and other.chain[here] == key for other in ahead)

    def _preempt(self, job: Job) -> None:
        """Give its blocks back and queue it again at its old place; what it generated is computed again."""
        self.preemptions += 1
        job.lost += job.computed
        self._let_go(job)
        self._queue(job)
        if self.hook:
            self.hook.look_up(job)

    def _queue(self, job: Job) -> None:
        insort(self.waiting, job, key=self.order)

    def _close(self, job: Job) -> None:
        job.closed = True
        if job in self.loading:
            return  # a copy in flight cannot be un-sent (law 4): `loaded` lets go of its blocks
        if self.hook and job.named + job.private:
            self.hook.remember(job)
        self._let_go(job)

    def _let_go(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)
        self.pool.release(job.chain[: job.named])
        self.pool.give(job.private)
        job.named = job.private = job.computed = 0

    def check(self) -> None:
        """The pool's law, and that its users are the requests that are open here."""
        self.pool.check()
        private = sum(job.private for job in self.running + self.loading)
        if private != self.pool.private:
            raise LawBroken(2, f"KV pool: {self.pool.private} private blocks, requests hold {private}")
