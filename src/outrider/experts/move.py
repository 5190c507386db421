"""Move: carries out what the policy of experts says, over torch.distributed, and reports how passes ended.

Decides nothing. Commands are written to the journal and compared between ranks before any byte moves. Transfers run on
a lane of their own (lane.py) beside compute, with a process group of their own, so that weights never interleave with
tokens; each exchange is one all-to-all, in an order that follows from the plan alone, and a rank that has nothing to
send takes part too. So no rank waits for one that does not come (law 7): compute waits only for transfers whose start
lies before it in everyone's order of visits. A dead or silent rank ends all others' waits within the time-out.
Without foresight each layer asks for its plan when its gate has decided, in the middle of the forward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import assert_never

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from outrider.errors import CallerError, LawBroken
from outrider.experts.bank import BETWEEN, OUTSIDE
from outrider.experts.copies import Copies
from outrider.experts.events import (
    CANCEL,
    DIRECT,
    HOST,
    RETURN,
    WANT,
    Array,
    Began,
    Carry,
    Command,
    Event,
    Finished,
    Foreseen,
    Gated,
    Pass,
    Planned,
    Ran,
    Release,
    Relocate,
    Share,
    Stage,
    Tally,
    Use,
    UseLayer,
)
from outrider.experts.exchange import Exchange, settle_sums
from outrider.experts.lane import Lane, Span
from outrider.experts.layer import SpreadBlock
from outrider.experts.owners import check, relocate
from outrider.experts.policy import Policy
from outrider.experts.schedule import StepPlan
from outrider.experts.shared import Shared
from outrider.experts.turns import Batch, Turns
from outrider.experts.watched import watched
from outrider.journal import Journal, array_digest

WORDS = {RETURN: "gradients", DIRECT: "weights, rank to rank", HOST: "weights, host"}
KIND = 16  # bytes for an event's name


class Mover:
    """One rank's hands.

    blocks      the model's MoE blocks by layer, from `layer.spread`
    control     process group (gloo for tensors on the host) for what ranks tell each other; used by nothing else
    lane        process group for weights and gradients, used by nothing else
    journal     NAME.jsonl to write; None: no journal
    watchdog_s  no transfer takes longer
    timeline    whether `spans` gets what happened when
    After a step: computed_MLR token-slots computed by forward pass, layer and rank; sent_bytes of this rank;
    copies_moved over all ranks; unforeseen, absent as in `Tally`.
    """

    def __init__(
        self,
        policy: Policy,
        blocks: Sequence[SpreadBlock],
        control: dist.ProcessGroup,
        lane: dist.ProcessGroup,
        journal: Path | None = None,
        *,
        watchdog_s: float = 600.0,
        timeline: bool = False,
    ) -> None:
        self.policy, self.blocks, self.control = policy, blocks, control
        self.rank = control.rank()
        self.journal = None if journal is None else Journal(journal, "experts", policy.settings, self.rank)
        self.now = 0
        self.copies_moved = self.unforeseen = self.absent = 0
        self.computed_MLR: list[Array] = []
        self.spans: list[Span] | None = [] if timeline else None
        self.optimizer: torch.optim.Optimizer | None = None
        self._encoder = msgspec.json.Encoder(enc_hook=array_digest)
        like = blocks[0].experts.gate_up_proj.detach()
        self.exact, self.dtype = blocks[0].experts.block_rows > 0, like.dtype
        self.copies = Copies(policy.settings.frames, blocks[0].experts.shapes, like)
        self.shared = Shared(control, policy.settings.nodes, self.copies.numel, like)
        self.exchange = Exchange(lane, self.copies.numel, like)
        self.lane = Lane(like.device, watchdog_s, self.spans)
        self.turns = Turns(len(blocks))
        self._since_s, self._several = 0.0, False
        for layer, block in enumerate(blocks):
            bank = block.experts
            if bank.shapes != blocks[0].experts.shapes or bank.gate_up_proj.dtype != self.dtype:
                raise CallerError(f"layer {layer}: experts of {bank.shapes}. Give a model with experts of one shape.")
            bank.layer, bank.copies = layer, self.copies
            bank.enter, bank.leave = partial(self._enter, layer), partial(self._leave, layer)

    @property
    def sent_bytes(self) -> int:
        """Weights and gradients that this rank sent to others."""
        return self.exchange.sent_bytes

    def foresee(self, counts_MLRE: Array, passes: Sequence[Pass] = ()) -> None:
        """A new RL step begins; its load is known."""
        self.begin()
        self._tell(Foreseen(counts_MLRE, tuple(passes)))

    def follow(
        self, plan: StepPlan, passes: Sequence[Pass] = (), optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """A new RL step begins, with this plan. optimizer: whose state goes along where experts change their homes."""
        self.begin()
        self.optimizer = optimizer
        homes, quota = plan.homes.astype(np.int64), plan.quota.astype(np.int64)
        event = Planned(homes, quota, plan.most.astype(np.int64), tuple(passes))
        self._agree(event, ())
        if homes.shape == self.policy.homes_LE.shape:
            moved = np.flatnonzero((homes != self.policy.homes_LE).any(axis=1)).tolist()
            check([self.blocks[layer] for layer in moved], optimizer, self.control)
        self._tell(event)

    def begin(self) -> None:
        """A new RL step begins, and nothing is known of its load: `react` instead of `micro_step`."""
        self.now, self.computed_MLR = 0, []
        self.turns.begin()
        self._at(BETWEEN)

    @contextmanager
    def micro_step(self, stage: Stage, batch: int, several: bool = False) -> Iterator[None]:
        """A pass over one micro-batch goes inside.

        several  the model runs more than once inside: nothing is fetched for what follows until the end
        """
        self._several = several
        self._tell(Began(stage, batch))
        if stage != "backward":
            self._reset()
        self._at(batch)
        with watched(f"pass {self.now}"):
            yield
        self.turns.end_pass()
        self._at(BETWEEN)
        self._start()
        if stage != "backward":
            seen_LRE = self._gather_load()
            self._tell(Ran(batch, seen_LRE, self.computed_MLR[-1]))
        self.now += 1

    @contextmanager
    def react(self, stage: Stage) -> Iterator[None]:
        """As `micro_step`, for a micro-batch that nobody foresaw: each layer is planned from its live gate."""
        self._reset()
        for layer, block in enumerate(self.blocks):
            block.asked = False
            block.ask = lambda counts_RE, layer=layer: self._tell(Gated(stage, layer, counts_RE))
        self._at(self.now)
        self.turns.stage = stage
        try:
            with watched(f"pass {self.now}"):
                yield
        finally:
            for block in self.blocks:
                block.ask = None
        self.turns.stage = None
        self._at(BETWEEN)
        self._gather_load()
        self.now += 1

    def finish(self) -> None:
        """All gradients home; call it before anything reads gradients or changes weights."""
        self._tell(Finished())

    def close(self) -> None:
        """Let go of the lane, of shared memory and of the journal."""
        self.lane.close()
        self.shared.close()
        if self.journal is not None:
            self.journal.close()

    def _enter(self, layer: int, backward: bool) -> None:
        """A layer's turn: wait for its copies."""
        self._since_s = perf_counter()
        self.lane.wait(self.turns.enter(layer, backward))
        self._note("wait", layer)

    def _leave(self, layer: int, backward: bool) -> None:
        """The turn is over: what waited for that may start."""
        self.copies.leave(layer)
        self._note("backward" if backward else "forward", layer)
        self.turns.leave(layer, backward)
        self._start()

    def _start(self, everything: bool = False) -> None:
        """Put on the lane what may start by now."""
        for batch in self.turns.ready(everything):
            if batch.kind != HOST or batch.copies:  # nobody waits for a rank that pulls nothing
                layer = -1 if batch.kind == RETURN else batch.rows[0][0]  # gradients go when a frame is needed again
                self.turns.started(batch, self.lane.put(WORDS[batch.kind], partial(self._carry, batch), layer))

    def _drain(self) -> None:
        """Wait for everything that is on the lane."""
        self._since_s = perf_counter()
        self.lane.drain()
        self._note("wait", -1)

    def _note(self, what: str, layer: int) -> None:
        now_s = perf_counter()
        if self.spans is not None:
            self.spans.append(Span(what, layer, self._since_s, now_s))
        self._since_s = now_s

    def _at(self, batch: int) -> None:
        """This micro-step runs from now on. Outside of any, everything is computed at home."""
        for block in self.blocks:
            block.experts.batch = batch
            if batch < 0:
                block.use(np.zeros((0, 4), dtype=np.int64))

    def _reset(self) -> None:
        for block in self.blocks:
            block.seen_E.zero_()
            block.experts.computed = 0

    def _gather_load(self) -> Array:
        mine = torch.stack([torch.cat([b.seen_E, torch.tensor([b.experts.computed])]) for b in self.blocks])
        gathered = [torch.empty_like(mine) for _ in range(self.control.size())]
        with watched("counting what was computed"):
            dist.all_gather(gathered, mine, group=self.control)
        seen_LRE = torch.stack(gathered, dim=1).numpy()
        self.computed_MLR.append(seen_LRE[:, :, -1].copy())
        seen: Array = seen_LRE[:, :, :-1].copy()
        return seen

    def _tell(self, event: Event) -> None:
        commands = self.policy.handle(event, self.now)
        if self.journal is not None:
            self.journal.write(self.now, event, commands)
        self._agree(event, commands)
        for command in commands:
            with watched(f"carrying out {type(command).__name__}"):
                self._carry_out(event, command)

    def _agree(self, event: Event, commands: Sequence[Command]) -> None:
        """Law 7, checked on every event: all ranks were told the same and concluded the same, before a byte moves."""
        said = self._encoder.encode((self.now, event, commands))
        kind = type(event).__name__.encode().ljust(KIND)
        mine = torch.frombuffer(bytearray(kind + blake2b(said, digest_size=16).digest()), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.control.size())]
        with watched("agreeing on a plan"):
            dist.all_gather(everyone, mine, group=self.control)
        for rank, other in enumerate(everyone):
            if not torch.equal(other, mine):
                theirs = bytes(other[:KIND].tolist()).decode().strip()
                raise LawBroken(
                    7,
                    f"in pass {self.now} rank {self.rank} is at {type(event).__name__}, rank {rank} at {theirs},"
                    " with other tables, micro-batches or plans. Give every rank the same step, and start all again",
                )

    def _carry_out(self, event: Event, command: Command) -> None:
        match command:
            case Carry(rows):
                self._queue(rows)
                if isinstance(event, Gated):  # the layer waits for it
                    self._start()
                    self._drain()
            case Use(visit, expected, quotas, _):
                assert isinstance(event, Began)
                self.turns.begin_pass(event.stage, visit, expected, self._several)
                self._start()
                ends = np.searchsorted(quotas[:, 0], np.arange(len(self.blocks) + 1))
                for layer, block in enumerate(self.blocks):
                    block.use(quotas[ends[layer] : ends[layer + 1], 1:])
            case UseLayer(layer, quotas, _):
                self.blocks[layer].use(quotas[:, 1:])
            case Relocate(rows, homes_LE):
                relocate(self.blocks, rows, homes_LE, self.optimizer, self.control)
            case Share(rows):
                self._share(rows)
            case Tally(unforeseen, absent):
                self.unforeseen += unforeseen
                self.absent += absent
            case Release():
                self._release()
            case _:
                assert_never(command)

    def _queue(self, rows: Array) -> None:
        """Batches of a Carry; what this rank will hold is planned, cancelled and wanted at once."""
        for (after, by, kind), group in groupby(rows.tolist(), key=lambda row: row[:3]):
            some = [row[3:] for row in group]
            mine = [row for row in some if row[3] == self.rank]
            if kind in (CANCEL, WANT):
                for layer, expert, *_ in mine:
                    self.copies.turn(layer, expert, "cancel" if kind == CANCEL else "want")
                continue
            fetches = kind in (DIRECT, HOST)
            copies = [self.copies.plan(layer, expert, frame) for layer, expert, _, _, frame in mine if fetches]
            self.turns.queue(Batch(after, by, kind, some, copies))
            self.copies_moved += len(some) * fetches

    def _carry(self, batch: Batch) -> None:
        """On the lane: one exchange."""
        with watched(f"moving {WORDS[batch.kind]}"):
            if batch.kind == HOST:
                for copy in batch.copies:
                    self.shared.pull(copy.layer, copy.expert, self.copies.start(copy))
                    self.copies.end(copy)
            elif batch.kind == RETURN:
                self._bring_home(batch.rows)
            else:
                into = {(copy.layer, copy.expert): self.copies.start(copy) for copy in batch.copies}
                hops = [(src, dst, layer, expert) for layer, expert, src, dst, _ in batch.rows]
                for layer, expert, _, flat in self.exchange.experts(hops, self._weights_of, self.dtype):
                    into[layer, expert].copy_(flat)
                for copy in batch.copies:
                    self.copies.end(copy)

    def _weights_of(self, layer: int, expert: int) -> Tensor:
        return self.blocks[layer].experts.weights_of(expert)

    def _bring_home(self, rows: Sequence[Sequence[int]]) -> None:
        """Gradients of copies that end. Frozen experts have none; in bitwise mode they come home as sums, last."""
        hops = []
        for layer, expert, src, dst, _ in rows:
            if not self.exact and self.blocks[layer].experts.learns:
                hops.append((src, dst, layer, expert))
            elif src == self.rank:
                self.copies.take_gradient(layer, expert)
        for layer, expert, src, flat in self.exchange.experts(hops, self.copies.take_gradient, self.exchange.wide):
            self.blocks[layer].experts.keep_gradient(expert, src, flat)
        self.copies.returned()

    def _share(self, rows: Array) -> None:
        """Homes put experts into the shared memory of each node that pulls them; beyond theirs a rank there does it."""
        self.shared.begin(rows)
        hops = [(home, rank, layer, expert) for layer, expert, home, _, rank in rows.tolist()]

        def put() -> None:
            for _, _, layer, expert in (hop for hop in hops if hop[0] == hop[1] == self.rank):
                self.shared.put(layer, expert, self._weights_of(layer, expert))  # one by one: no room for all at once
            if far := [hop for hop in hops if hop[0] != hop[1]]:
                for layer, expert, _, flat in self.exchange.experts(far, self._weights_of, self.dtype):
                    self.shared.put(layer, expert, flat)

        self.lane.put("weights into shared memory", put)
        self._drain()
        with watched("sharing experts"):
            dist.barrier(group=self.control)

    def _release(self) -> None:
        self._start(everything=True)
        self._drain()
        if self.exact:
            settle_sums(self.blocks, self.exchange)
        self.copies.clear()
        for block in self.blocks:
            block.experts.settle()
        self._at(OUTSIDE)
