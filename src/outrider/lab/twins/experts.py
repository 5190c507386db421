"""The twin of `experts/move.py`: the same policy, turns, copies and journal; modelled ranks; the virtual clock.

    step -> Foreseen, Began, ... -> [policy] -> Carry -> batches on the lanes of all ranks -> copies that turns wait for

Decides nothing. A layer's turn begins for all ranks when all have ended the one before (tokens are exchanged there);
each waits for its own copies, then takes what the cost model says (ranks.py). What ranks tell each other takes no time.

An expert is two numbers that name it and the step. So frames and gradients are the live mover's own, and it is checked
that a turn computes with the right weights of this step; gradients count token-slots, and at the end of a step each
must be at home (law 6). Not here: bitwise mode, models that run several times in a pass.
"""
# ruff: noqa: N803, N806 - array names end in a legend of their axes

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import groupby
from typing import assert_never

import numpy as np
import torch

from outrider.errors import LawBroken
from outrider.experts import events as ev
from outrider.experts.copies import Copies
from outrider.experts.cost import Cost
from outrider.experts.events import CANCEL, HOST, RETURN, WANT, Array, Pass, Stage
from outrider.experts.exchange import Hop
from outrider.experts.frames import Copy
from outrider.experts.lane import Span
from outrider.experts.move import WORDS
from outrider.experts.policy import Policy
from outrider.experts.schedule import StepPlan
from outrider.experts.turns import Batch, Turns
from outrider.journal import Journal
from outrider.lab.clock import Clock
from outrider.lab.twins.ranks import BACKWARD, Do, Host, Lanes, Outcome, Parcels, Timed, Work, divided, work

Flow = Generator[None, None, None]  # one thing after another; yields where all ranks must have come to that point
MOVED = 3  # a master that changes its home takes two more tensors along: Adam's moments, in the weights' width


class ExpertsTwin:
    """All ranks of one group. `run(step(...))` simulates an RL step; `outcome` tells of the last one.

    overlap   False: a turn waits for everything that its rank's lane has been given
    timeline  whether `spans` gets, for each rank, what happened when, as the live mover's does
    """

    def __init__(
        self,
        policy: Policy,
        cost: Cost,
        clock: Clock,
        host: Host | None = None,
        journal: Journal | None = None,
        *,
        overlap: bool = True,
        timeline: bool = False,
    ) -> None:
        shape = policy.settings
        self.policy, self.cost, self.clock, self.overlap = policy, cost, clock, overlap
        self.nodes_R, self.ranks, self.layers = shape.nodes, range(shape.ranks), range(shape.layers)
        self.homes_LE = policy.homes_LE.copy()
        self.now = 0
        self.spans: list[list[Span]] | None = [[] for _ in self.ranks] if timeline else None
        self.lanes = Lanes(clock, self.nodes_R, cost, host or Host(), self.spans)
        self.turns = [Turns(shape.layers) for _ in self.ranks]
        number = torch.zeros(1, dtype=torch.float64)
        self.copies = [Copies(shape.frames, [torch.Size([1, 1])] * 2, number) for _ in self.ranks]
        self._journal = journal
        self._steps = 0  # steps that are over: weights change with each
        self.seen_MLRE: Array | None = None
        self._works: dict[int, Work] = {}
        self._quotas = np.zeros((0, 5), dtype=np.int64)
        self._shared: dict[tuple[int, int, int], float] = {}  # node, layer, expert: weights
        self._used: dict[int, set[int]] = {}  # rank: frames
        self._owed: dict[int, set[tuple[int, int]]] = {}  # rank: layer, expert
        self._trained_LE, self._home_LE = np.zeros((2, *self.homes_LE.shape), dtype=np.int64)  # gradients, in tokens
        self._flow: Flow | None = None
        self._open = 0

    @property
    def outcome(self) -> Outcome:
        return self.lanes.outcome

    # -- what a training loop does

    def run(self, flow: Flow) -> None:
        """Let a flow, and all that it set going, happen. LawBroken where ranks wait for each other for ever."""
        self._flow = flow
        self._resume()
        self.clock.run()
        if self._flow is not None:
            raise LawBroken(7, f"in pass {self.now} {self._open} ranks wait for what never comes")

    def step(self, load: Array | StepPlan, passes: Sequence[Pass], seen_MLRE: Array | None = None) -> Flow:
        """One RL step.

        load       what is foreseen, counts_MLRE, or a plan
        seen_MLRE  what the micro-batches turn out to send, if it is something else
        """
        began_s = self.clock.now
        yield from self.foresee(load, passes)
        self.seen_MLRE = seen_MLRE
        self.outcome.before_s = self.clock.now - began_s
        for stage, batch in passes:
            yield from self.micro_step(stage, batch)
        ended_s = self.clock.now
        yield from self.finish()
        self.outcome.after_s, self.outcome.seconds = self.clock.now - ended_s, self.clock.now - began_s

    def foresee(self, load: Array | StepPlan, passes: Sequence[Pass] = ()) -> Flow:
        """A new RL step begins, with this load or this plan."""
        self.begin()
        if isinstance(load, StepPlan):
            homes, quota = load.homes.astype(np.int64), load.quota.astype(np.int64)
            yield from self._tell(ev.Planned(homes, quota, load.most.astype(np.int64), tuple(passes)))
        else:
            yield from self._tell(ev.Foreseen(load, tuple(passes)))

    def begin(self) -> None:
        """A new RL step begins, and nothing is known of its load: `react` instead of `micro_step`."""
        self.now, self._works, self.seen_MLRE = 0, {}, None
        self.lanes.begin()
        for rank in self.ranks:
            self.turns[rank].begin()
            self._used[rank], self._owed[rank] = set(), set()

    def micro_step(self, stage: Stage, batch: int) -> Flow:
        """A pass over one micro-batch."""
        told_s = self.clock.now
        self.outcome.passes.append(timed := Timed(stage, batch))
        yield from self._tell(ev.Began(stage, batch))
        began_s = self.clock.now
        self.outcome.before_s += began_s - told_s
        if batch not in self._works:
            assert self.policy.counts_MLRE is not None
            seen_MLRE = self.policy.counts_MLRE if self.seen_MLRE is None else self.seen_MLRE
            self._works[batch] = self._work(seen_MLRE[batch])
        mine = self._works[batch]
        if stage != "backward":
            for layer in self.layers:
                yield from self._turn(mine, layer, False, timed)
        if stage in ("update", "backward"):
            for layer in reversed(self.layers):
                yield from self._turn(mine, layer, True, timed)
        for rank in self.ranks:
            self.turns[rank].end_pass()
            self._start(rank)
        if stage != "backward":
            yield from self._tell(ev.Ran(batch, mine.seen_LRE, mine.computed_LR))
        self.now += 1
        timed.seconds = self.clock.now - began_s

    def react(self, stage: Stage, counts_LRE: Array) -> Flow:
        """A pass over a micro-batch that nobody foresaw: each layer is planned from its live gate."""
        began_s = self.clock.now
        self.outcome.passes.append(timed := Timed(stage, self.now))
        works = []
        for layer in self.layers:
            yield from self._tell(ev.Gated(stage, layer, counts_LRE[layer]))
            only_LRE = np.zeros_like(counts_LRE)
            only_LRE[layer] = counts_LRE[layer]
            works.append(self._work(only_LRE))
            yield from self._turn(works[layer], layer, False, timed)
        if stage == "update":
            for layer in reversed(self.layers):
                yield from self._turn(works[layer], layer, True, timed)
        self.now += 1
        timed.seconds = self.clock.now - began_s

    def finish(self) -> Flow:
        """All gradients home."""
        yield from self._tell(ev.Finished())

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    # -- events and commands

    def _tell(self, event: ev.Event) -> Flow:
        commands = self.policy.handle(event, self.now)
        if self._journal is not None:
            self._journal.write(self.now, event, commands)
        for command in commands:
            yield from self._carry_out(event, command)

    def _carry_out(self, event: ev.Event, command: ev.Command) -> Flow:
        match command:
            case ev.Carry(rows):
                self._queue(rows)
                if isinstance(event, ev.Gated):  # the layer waits for it
                    yield from self._drain()
            case ev.Use(visit, expected, quotas, _):
                assert isinstance(event, ev.Began)
                self._quotas = quotas
                for rank in self.ranks:
                    self.turns[rank].begin_pass(event.stage, visit, expected)
                    self._start(rank)
            case ev.UseLayer(_, quotas, _):
                self._quotas = quotas
            case ev.Relocate(rows, homes_LE):
                yield from self._relocate(rows)
                self.homes_LE = homes_LE.copy()
            case ev.Share(rows):
                yield from self._share(rows)
            case ev.Tally(unforeseen, absent):
                self.outcome.unforeseen += unforeseen
                self.outcome.absent += absent
            case ev.Release():
                yield from self._drain(everything=True)
                self._release()
            case _:
                assert_never(command)

    def _queue(self, rows: Array) -> None:
        """As in the live mover, for all ranks."""
        for (after, by, kind), group in groupby(rows.tolist(), key=lambda row: row[:3]):
            some = [row[3:] for row in group]
            copies: list[list[Copy]] = [[] for _ in self.ranks]
            for layer, expert, _, dst, frame in some:
                if kind in (CANCEL, WANT):
                    self.copies[dst].turn(layer, expert, "cancel" if kind == CANCEL else "want")
                elif kind != RETURN:
                    copies[dst].append(self.copies[dst].plan(layer, expert, frame))
            if kind not in (CANCEL, WANT):
                for rank in self.ranks:
                    self.turns[rank].queue(Batch(after, by, kind, some, copies[rank]))
                self.outcome.copies += len(some) * (kind != RETURN)

    def _start(self, rank: int, everything: bool = False) -> None:
        """Put on the lane what may start by now."""
        for batch in self.turns[rank].ready(everything):
            if batch.kind != HOST or batch.copies:
                layer = -1 if batch.kind == RETURN else batch.rows[0][0]
                ticket = self.lanes.put(rank, WORDS[batch.kind], partial(self._carry, rank, batch), layer)
                self.turns[rank].started(batch, ticket)

    def _drain(self, everything: bool = False) -> Flow:
        """Every rank waits for everything that is on its lane."""
        for rank in self.ranks:
            self._start(rank, everything)
        yield from self._together(lambda rank, done: self.lanes.wait(rank, None, -1, done))

    # -- a turn

    def _turn(self, mine: Work, layer: int, backward: bool, timed: Timed) -> Flow:
        began_s = self.clock.now
        yield from self._together(partial(self._enter, mine, layer, backward))
        least_s = float(mine.forward_s[layer].max()) * (BACKWARD if backward else 1.0)
        timed.compute_s += least_s
        timed.exposed_s.append(max(0.0, self.clock.now - began_s - least_s))
        if backward:
            self._trained_LE[layer] += mine.load_LE[layer]
            self._home_LE[layer] += mine.home_LE[layer]

    def _enter(self, mine: Work, layer: int, backward: bool, rank: int, done: Do) -> None:
        """A rank waits for its copies."""
        ticket = self.turns[rank].enter(layer, backward)
        go_on = partial(self._compute, mine, layer, backward, rank, done)
        self.lanes.wait(rank, ticket if self.overlap else None, layer, go_on)

    def _compute(self, mine: Work, layer: int, backward: bool, rank: int, done: Do) -> None:
        now, times = self.clock.now, BACKWARD if backward else 1.0
        for expert, _ in mine.by_copies.get((layer, rank), ()):
            for weights in self.copies[rank].enter(layer, expert):
                if float(weights) != self._weights(layer, expert):
                    raise LawBroken(6, f"rank {rank} computes layer {layer}, expert {expert} with other weights")
        until_s = now + float(mine.forward_s[layer, rank]) * times
        if self.cost.shared_links:
            near_s, far_s = (mine.tokens_s[layer, rank] * times / 2).tolist()
            self.lanes.take(rank, near_s, far_s, until_s)
        self.clock.at(until_s, partial(self._leave, mine, layer, backward, rank, done, now))

    def _leave(self, mine: Work, layer: int, backward: bool, rank: int, done: Do, since_s: float) -> None:
        """The turn is over: what waited for that may start."""
        if backward:
            for expert, tokens in mine.by_copies.get((layer, rank), ()):
                self.copies[rank].add_gradient(layer, expert, *[torch.full((1, 1), float(tokens))] * 2)
                self._owed[rank].add((layer, expert))
            self.outcome.gradients = max(self.outcome.gradients, len(self._owed[rank]))
        self.copies[rank].leave(layer)
        self.lanes.note(rank, "backward" if backward else "forward", layer, since_s)
        self.turns[rank].leave(layer, backward)
        self._start(rank)
        done()

    # -- what the lanes carry

    def _carry(self, rank: int, batch: Batch, over: Callable[[], None]) -> None:
        """On a rank's lane."""
        frames = [self.copies[rank].start(copy) for copy in batch.copies]
        self._used[rank].update(copy.frame for copy in batch.copies)
        self.outcome.frames = max(self.outcome.frames, len(self._used[rank]))
        hops: list[Hop] = [(src, dst, layer, expert) for layer, expert, src, dst, _ in batch.rows]

        def arrived(parcels: Parcels) -> None:
            for copy, frame in zip(batch.copies, frames, strict=True):
                frame.fill_(parcels[int(self.homes_LE[copy.layer, copy.expert]), rank, copy.layer, copy.expert])
                self.copies[rank].end(copy)
            over()

        def at_home(parcels: Parcels) -> None:
            for (_, dst, layer, expert), tokens in parcels.items():
                self._home_LE[layer, expert] += round(tokens) if dst == rank else 0
            self.copies[rank].returned()
            over()

        name, what, size = (batch.after, batch.by, batch.kind), WORDS[batch.kind], self.cost.shape.expert_bytes
        if batch.kind == HOST:
            node = int(self.nodes_R[rank])
            mine = {hop: self._shared[node, hop[2], hop[3]] for hop in hops if hop[1] == rank}
            pulls_s = self.lanes.host_s(size, [dst for _, dst, *_ in hops])
            self.lanes.pull(rank, what, size * len(mine), float(pulls_s[rank]), partial(arrived, mine))
        elif batch.kind == RETURN:  # in fp32 at least
            size *= max(4, self.cost.shape.width) // self.cost.shape.width
            self.lanes.exchange(rank, name, what, hops, size, partial(self._gradient, rank), at_home)
        else:
            self.lanes.exchange(rank, name, what, hops, size, partial(self._master, rank), arrived)

    def _master(self, rank: int, layer: int, expert: int) -> float:
        if self.homes_LE[layer, expert] != rank:
            raise LawBroken(6, f"rank {rank} sends layer {layer}, expert {expert}, which is not at home there")
        return self._weights(layer, expert)

    def _gradient(self, rank: int, layer: int, expert: int) -> float:
        self._owed[rank].discard((layer, expert))
        return float(self.copies[rank].take_gradient(layer, expert)[0])

    def _weights(self, layer: int, expert: int) -> float:
        """What an expert's numbers are in this step."""
        return float((self._steps * len(self.layers) + layer) * self.homes_LE.shape[1] + expert + 1)

    # -- begin and end of a step

    def _relocate(self, rows: Array) -> Flow:
        """Layer by layer, as `owners.relocate`."""
        seconds, size = 0.0, self.cost.shape.expert_bytes * MOVED
        for _, group in groupby(rows.tolist(), key=lambda row: row[0]):
            hops: list[Hop] = [(old, new, layer, expert) for layer, expert, old, new in group]
            self.lanes.count("masters", size * len(hops))
            seconds += self.cost.links.latency_s + max(part_s for _, part_s in self.lanes.parts(hops, size))
        yield from self._together(lambda _, done: self.clock.at(self.clock.now + seconds, done))

    def _share(self, rows: Array) -> Flow:
        """Homes put experts into the shared memory of each node that pulls them; beyond theirs a rank there does it."""
        own, far = list[Hop](), list[Hop]()
        self._shared = {}
        for layer, expert, home, node, dst in rows.tolist():
            (own if dst == home else far).append((home, dst, layer, expert))
            self._shared[node, layer, expert] = self._weights(layer, expert)
        size, what = self.cost.shape.expert_bytes, "weights into shared memory"
        own_s, far_s = (self.lanes.host_s(size, [dst for _, dst, *_ in some]) for some in (own, far))

        def put(rank: int, over: Callable[[], None]) -> None:
            def arrived(_: Parcels) -> None:
                self.lanes.busy(rank, float(far_s[rank]), over)

            def exchange() -> None:
                self.lanes.exchange(rank, what, what, far, size, partial(self._master, rank), arrived)

            self.lanes.busy(rank, float(own_s[rank]), exchange if far else over)

        for rank in self.ranks:
            self.lanes.put(rank, what, partial(put, rank))
        yield from self._drain()

    def _release(self) -> None:
        lost_LE = self._home_LE != self._trained_LE
        if lost_LE.any():
            at = layer, expert = tuple(np.argwhere(lost_LE)[0].tolist())
            said = f"gradients of {self._home_LE[at]} token-slots out of {self._trained_LE[at]} came home"
            raise LawBroken(6, f"layer {layer}, expert {expert}: {said}")
        for copies in self.copies:
            copies.clear()
        self._trained_LE[:] = self._home_LE[:] = 0
        self._steps += 1

    def _work(self, seen_LRE: Array) -> Work:
        return work(divided(self._quotas, seen_LRE, self.homes_LE), seen_LRE, self.homes_LE, self.nodes_R, self.cost)

    def _together(self, begin: Callable[[int, Do], object]) -> Flow:
        """Every rank begins something, and calls what it is given when it is done; until all are."""
        self._open = len(self.ranks)
        for rank in self.ranks:
            begin(rank, self._arrive)
        yield

    def _arrive(self) -> None:
        self._open -= 1
        if not self._open:
            self.clock.at(self.clock.now, self._resume)

    def _resume(self) -> None:
        assert self._flow is not None
        try:
            next(self._flow)
        except StopIteration:
            self._flow = None
