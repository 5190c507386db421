"""Move: carries out what the policy of experts says, over torch.distributed, and reports how micro-steps ended.

Decides nothing. Commands are written to the journal and compared between ranks before any byte moves; every exchange
is one all-to-all whose sizes and order follow from the plan alone, in a process group of its own, so that weights
can never interleave with tokens and no rank waits for one that does not come (law 7). A rank that has nothing to
send takes part too. A dead rank ends the exchange with an error on all others, at the latest after the group's
time-out. Without foresight each layer asks for its plan when its gate has decided, in the middle of the forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import assert_never

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from outrider.errors import LawBroken, WorldError
from outrider.experts.canonical import Key
from outrider.experts.events import (
    Array,
    Began,
    Command,
    Event,
    Fetch,
    Finished,
    Foreseen,
    Gated,
    Ran,
    Release,
    ReturnGradients,
    Stage,
    Tally,
    Use,
    UseLayer,
)
from outrider.experts.layer import SpreadBlock
from outrider.experts.policy import Policy
from outrider.journal import Journal, array_digest

KIND = 16  # bytes for an event's name
Part = tuple[int, int, int, Key, Tensor]  # destination, layer, owner, place in the sum, value


@contextmanager
def watched(doing: str) -> Iterator[None]:
    """What gloo says of a rank that died or kept silent for the group's time-out becomes a WorldError."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        reason = str(error).split("] ", 1)[-1].split(". ")[0]
        raise WorldError(
            f"experts: lost another rank while {doing}: {reason}. No weight was changed in this step."
            " Look at the rank that ended first, and start all again from the last checkpoint."
        ) from error


class Mover:
    """One rank's hands.

    blocks   the model's MoE blocks by layer, from `layer.spread`
    group    process group for weights and gradients, used by nothing else
    journal  NAME.jsonl to write; None: no journal
    After a step: computed_MLR token-slots computed by micro-step, layer and rank; sent_bytes of this rank;
    copies_moved over all ranks; unforeseen, absent as in `Tally`.
    """

    def __init__(
        self, policy: Policy, blocks: Sequence[SpreadBlock], group: dist.ProcessGroup, journal: Path | None = None
    ) -> None:
        self.policy, self.blocks, self.group, self.rank = policy, blocks, group, group.rank()
        self.journal = None if journal is None else Journal(journal, "experts", policy.settings, self.rank)
        self.now = 0
        self.sent_bytes = self.copies_moved = self.unforeseen = self.absent = 0
        self.computed_MLR: list[Array] = []
        self._encoder = msgspec.json.Encoder(enc_hook=array_digest)
        self.exact = blocks[0].experts.block_rows > 0
        for block in blocks:
            block.experts.resize(policy.settings.slots)

    def foresee(self, counts_MLRE: Array) -> None:
        """A new RL step begins; its load is known."""
        self.begin()
        self._tell(Foreseen(counts_MLRE))

    def begin(self) -> None:
        """A new RL step begins, and nothing is known of its load: `react` instead of `micro_step`."""
        self.now, self.computed_MLR = 0, []

    @contextmanager
    def micro_step(self, stage: Stage, batch: int) -> Iterator[None]:
        """Forward (and, in the update stage, backward) of one micro-batch goes inside."""
        self._tell(Began(stage, batch))
        self._reset()
        with watched(f"micro-step {self.now}"):
            yield
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
        try:
            with watched(f"micro-step {self.now}"):
                yield
        finally:
            for block in self.blocks:
                block.ask = None
        self._gather_load()
        self.now += 1

    def _reset(self) -> None:
        for block in self.blocks:
            block.seen_E.zero_()
            block.experts.computed = 0

    def _gather_load(self) -> Array:
        mine = torch.stack([torch.cat([b.seen_E, torch.tensor([b.experts.computed])]) for b in self.blocks])
        gathered = [torch.empty_like(mine) for _ in range(self.group.size())]
        with watched("counting what was computed"):
            dist.all_gather(gathered, mine, group=self.group)
        seen_LRE = torch.stack(gathered, dim=1).numpy()
        self.computed_MLR.append(seen_LRE[:, :, -1].copy())
        seen: Array = seen_LRE[:, :, :-1].copy()
        return seen

    def finish(self) -> None:
        """All gradients home; call it before anything reads gradients or changes weights."""
        self._tell(Finished())

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def _tell(self, event: Event) -> None:
        commands = self.policy.handle(event, self.now)
        if self.journal is not None:
            self.journal.write(self.now, event, commands)
        self._agree(event, commands)
        for command in commands:
            with watched(f"carrying out {type(command).__name__}"):
                self._carry_out(command)

    def _agree(self, event: Event, commands: Sequence[Command]) -> None:
        """Law 7, checked on every event: all ranks were told the same and concluded the same, before a byte moves."""
        said = self._encoder.encode((self.now, event, commands))
        kind = type(event).__name__.encode().ljust(KIND)
        mine = torch.frombuffer(bytearray(kind + blake2b(said, digest_size=16).digest()), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
        with watched("agreeing on a plan"):
            dist.all_gather(everyone, mine, group=self.group)
        for rank, other in enumerate(everyone):
            if not torch.equal(other, mine):
                theirs = bytes(other[:KIND].tolist()).decode().strip()
                raise LawBroken(
                    7,
                    f"in micro-step {self.now} rank {self.rank} is at {type(event).__name__}, rank {rank} at {theirs},"
                    " with other tables, micro-batches or plans. Give every rank the same step, and start all again",
                )

    def _carry_out(self, command: Command) -> None:
        match command:
            case ReturnGradients(rows) if self.exact:
                parts = [
                    (home, layer, expert, key, value)
                    for layer, expert, rank, _, home in rows.tolist()
                    if rank == self.rank
                    for key, value in self.blocks[layer].experts.take_parts(expert)
                ]
                for layer, expert, key, value in self._ship_parts(parts):
                    self.blocks[layer].experts.sums.add(expert, *key, value)
            case ReturnGradients(rows):
                hops = [(rank, home, layer, expert, slot) for layer, expert, rank, slot, home in rows.tolist()]
                self._ship(
                    hops,
                    lambda layer, _, slot: self.blocks[layer].experts.take_gradient(slot),
                    lambda layer, expert, _, rank, flat: self.blocks[layer].experts.keep_gradient(expert, rank, flat),
                    self._wide(),
                )
            case Fetch(rows):
                hops = [(src, dst, layer, expert, slot) for layer, expert, src, dst, slot in rows.tolist()]
                self._ship(
                    hops,
                    lambda layer, expert, _: self.blocks[layer].experts.weights_of(expert),
                    lambda layer, expert, slot, _, flat: self.blocks[layer].experts.fill(slot, expert, flat),
                    self._dtype(),
                )
                self.copies_moved += len(hops)
            case Use(_, quotas, _):
                for layer, block in enumerate(self.blocks):
                    block.use(quotas[quotas[:, 0] == layer][:, 1:])
            case UseLayer(layer, _, quotas, _):
                self.blocks[layer].use(quotas[:, 1:])
            case Tally(unforeseen, absent):
                self.unforeseen += unforeseen
                self.absent += absent
            case Release():
                if self.exact:
                    self._settle_routers()
                for block in self.blocks:
                    block.experts.settle()
                    block.use(np.zeros((0, 4), dtype=np.int64))  # outside of a step everything is computed at home
            case _:
                assert_never(command)

    def _ship(
        self,
        hops: Sequence[tuple[int, int, int, int, int]],
        pack: Callable[[int, int, int], Tensor],
        unpack: Callable[[int, int, int, int, Tensor], None],
        dtype: torch.dtype,
    ) -> None:
        """One all-to-all for all hops (src, dst, layer, expert, slot), in their order within each pair of ranks."""
        ranks = range(self.group.size())
        size = [self.blocks[layer].experts.numel for _, _, layer, _, _ in hops]
        send = [sum(n for n, hop in zip(size, hops, strict=True) if hop[:2] == (self.rank, r)) for r in ranks]
        receive = [sum(n for n, hop in zip(size, hops, strict=True) if hop[:2] == (r, self.rank)) for r in ranks]
        parts = [pack(*hop[2:]) for r in ranks for hop in hops if hop[:2] == (self.rank, r)]
        outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
        arrived = torch.empty(sum(receive), dtype=dtype)
        dist.all_to_all_single(arrived, outgoing, receive, send, group=self.group)
        self.sent_bytes += outgoing.nbytes
        begin = 0
        for src, _, layer, expert, slot in (hop for r in ranks for hop in hops if hop[:2] == (r, self.rank)):
            end = begin + self.blocks[layer].experts.numel
            unpack(layer, expert, slot, src, arrived[begin:end].clone())
            begin = end

    def _ship_parts(self, parts: Sequence[Part]) -> list[tuple[int, int, Key, Tensor]]:
        """Bitwise mode: (layer, owner, key, value) from all ranks. How many come is told first; all take part."""
        parts = sorted(parts, key=lambda part: part[0])
        ranks = self.group.size()
        flat = [value.reshape(-1) for *_, value in parts]
        heads = [[layer, owner, *key, len(f)] for (_, layer, owner, key, _), f in zip(parts, flat, strict=True)]
        sizes_R2 = torch.zeros((ranks, 2), dtype=torch.int64)
        for (dst, *_), f in zip(parts, flat, strict=True):
            sizes_R2[dst] += torch.tensor([1, len(f)])
        theirs_R2 = torch.empty_like(sizes_R2)
        dist.all_to_all_single(theirs_R2, sizes_R2, group=self.group)
        arrived = []
        for column, out in enumerate((torch.tensor(heads, dtype=torch.int64).view(-1, 6), _joined(flat, self._wide()))):
            send, receive = sizes_R2[:, column].tolist(), theirs_R2[:, column].tolist()
            arrived.append(out.new_empty((sum(receive), *out.shape[1:])))
            dist.all_to_all_single(arrived[-1], out, receive, send, group=self.group)
        self.sent_bytes += sum(f.nbytes for (dst, *_), f in zip(parts, flat, strict=True) if dst != self.rank)
        rows = arrived[0].tolist()
        values = torch.split(arrived[1], [row[5] for row in rows])
        return [(row[0], row[1], (row[2], row[3], row[4]), v.clone()) for row, v in zip(rows, values, strict=True)]

    def _settle_routers(self) -> None:
        """Router gradients whole on rank 0 and zero elsewhere, so that the sum over ranks is right, to the bit."""
        parts = [
            (0, layer, 0, key, value)
            for layer, block in enumerate(self.blocks)
            for key, value in sorted(block.router_sums.nodes.pop(0, {}).items(), key=lambda item: item[0])
        ]
        for layer, _, key, value in self._ship_parts(parts):
            self.blocks[layer].router_sums.add(0, *key, value)
        for block in self.blocks:
            weight: torch.nn.Parameter = block.gate.weight  # type: ignore[assignment]
            whole = block.router_sums.settle(0) if self.rank == 0 and block.router_sums.leaves_of else None
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                if whole is not None:
                    weight.grad += whole.view(weight.shape).to(weight.dtype)
            block.router_sums.clear()

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._dtype(), torch.float32)

    def _dtype(self) -> torch.dtype:
        return self.blocks[0].experts.gate_up_proj.dtype


def _joined(flat: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([f.to(dtype) for f in flat]) if flat else torch.empty(0, dtype=dtype)
