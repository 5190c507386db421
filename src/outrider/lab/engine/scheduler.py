"""Which requests compute how many tokens in the next step. No clock, no tensors; engine.py calls it once a step.

    submitted -> waiting -> (loading: its blocks come from memory ->) running -> finished
                    ^------- preempted: blocks given back, all to be computed again -------'

Order is (priority, arrival) everywhere, so nobody starves: the first in order always gets its tokens, its seat next,
and the blocks of those behind it. Prompt blocks are taken on admission, all or none; only decoding grows.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider.lab.engine.blocks import Blocks
from outrider.lab.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """Compute tokens[start : start + count] of a request; `last` = the next token can be sampled from it."""

    request: Request
    start: int
    count: int
    last: bool


@dataclass
class Plan:
    """One step: what to compute, what to load from memory, who lost its blocks."""

    chunks: list[Chunk] = field(default_factory=list)
    loads: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Continuous batching with chunked prefill; at least one token a seat fits in a batch (the engine checks)."""

    def __init__(
        self, blocks: Blocks, chain: Callable[[Sequence[int]], list[bytes]], max_batch_tokens: int, max_num_seqs: int
    ) -> None:
        self.blocks, self.chain = blocks, chain
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.waiting: list[Request] = []  # both lists in order
        self.running: list[Request] = []
        self.loading: list[Request] = []

    def schedule(self) -> Plan:
        """Decodes first, then prompts in chunks, then newcomers, until the batch is full."""
        plan, budget = Plan(), self.max_batch_tokens
        for request in sorted(self.running, key=lambda r: (r.left > 1, r.order)):
            budget -= self.give(request, budget, plan)
        for request in list(self.waiting):
            if plan.preempted or len(self.running) + len(self.loading) >= self.max_num_seqs:
                break
            if request.external is None or self.joins(request):
                continue  # memory has not answered yet, or another is just computing the same prefix
            if not self.admit(request, plan):
                break  # no overtaking: the next may be smaller, but this one would starve
            if request in self.running:
                budget -= self.give(request, budget, plan)
        return plan

    def give(self, request: Request, budget: int, plan: Plan) -> int:
        """Plan the request's next chunk; returns its tokens, 0 if it was preempted, has no room or finds no budget."""
        count = min(request.left, budget)
        if count == 0 or request not in self.running or not self.grow(request, request.computed + count, plan):
            return 0
        plan.chunks.append(Chunk(request, request.computed, count, count == request.left))
        return count

    def grow(self, request: Request, tokens: int, plan: Plan) -> bool:
        """Have blocks for so many tokens, taking them from the last in order if need be. False: wait a step."""
        missing = self.blocks.count_for(tokens) - len(request.blocks)
        while missing > len(self.blocks.free):
            victim = self.running[-1]
            if victim is request:
                return False
            self.preempt(victim)
            plan.preempted.append(victim)
        request.blocks += self.blocks.take(missing)
        return True

    def admit(self, request: Request, plan: Plan) -> bool:
        """Reuse what is here, take blocks for the rest of the prompt, leave each running request one to grow into."""
        hit = self.blocks.match(request.keys[: self.reusable(request)])
        self.blocks.hold(hit)
        missing = self.blocks.count_for(len(request.tokens)) - len(hit)
        if missing + len(self.running) > len(self.blocks.free):
            self.blocks.release(hit)
            return False
        request.blocks = hit + self.blocks.take(missing)
        request.computed = len(hit) * self.blocks.block_tokens
        if not request.admitted:
            request.own_blocks = len(hit)
        self.waiting.remove(request)
        if min(request.external or 0, self.reusable(request)) > len(hit):
            self.loading.append(request)
            plan.loads.append(request)
        else:
            request.admitted = True
            bisect.insort(self.running, request, key=lambda r: r.order)
        return True

    def joins(self, request: Request) -> bool:
        """True if a request ahead of this one (or one that is loading) is about to have its next block."""
        keys = request.keys[: self.reusable(request)]
        here = len(self.blocks.match(keys))
        return here < len(keys) and any(
            len(other.keys) > here and other.keys[here] == keys[here]
            for other in self.loading + [r for r in self.running if r.order < request.order]
        )

    def reusable(self, request: Request) -> int:
        """Blocks that may come from a cache: one token at least is left to compute, or there is nothing to sample."""
        return (len(request.tokens) - 1) // self.blocks.block_tokens

    def add(self, request: Request) -> None:
        request.keys = self.chain(request.tokens)
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def loaded(self, request: Request, good: int) -> None:
        """`good` blocks arrived; from the first failed one on, the request computes for itself."""
        if not request.admitted:
            request.external_blocks = good
        request.admitted = True
        self.loading.remove(request)
        bisect.insort(self.running, request, key=lambda r: r.order)
        self.advance(request, good * self.blocks.block_tokens)

    def advance(self, request: Request, count: int) -> list[tuple[bytes, int]]:
        """`count` more tokens are in the pool. Names the blocks that they filled and returns them as (key, block)."""
        full = range(
            request.computed // self.blocks.block_tokens, (request.computed + count) // self.blocks.block_tokens
        )
        request.computed += count
        if len(request.keys) < full.stop:
            request.keys = self.chain(request.tokens)
        for i in full:
            request.blocks[i] = self.blocks.name(request.blocks[i], request.keys[i])
        return [(request.keys[i], request.blocks[i]) for i in full]

    def preempt(self, request: Request) -> None:
        """Give its blocks back and queue it again at its old place; what it generated is kept and computed again."""
        self.remove(request)
        self.add(request)

    def remove(self, request: Request) -> None:
        """Out of the books, blocks released. Not while it is loading: a copy in flight cannot be un-sent (law 4)."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.blocks.release(request.blocks)
        request.blocks, request.computed = [], 0
