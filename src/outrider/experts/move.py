"""Move: carries out what the policy of experts says, over torch.distributed, and reports how micro-steps ended.

Decides nothing. Commands are written to the journal and compared between ranks before any byte moves; every exchange
is one all-to-all whose sizes and order follow from the plan alone, in a process group of its own, so that weights
can never interleave with tokens and no rank waits for one that does not come (law 7). A rank that has nothing to
send takes part too. A dead rank ends the exchange with an error on all others, at the latest after the group's
time-out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import assert_never

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from outrider.errors import LawBroken
from outrider.experts.events import (
    Array,
    Began,
    Command,
    Event,
    Fetch,
    Finished,
    Foreseen,
    Ran,
    Release,
    ReturnGradients,
    Stage,
    Tally,
    Use,
)
from outrider.experts.layer import SpreadBlock
from outrider.experts.policy import Policy
from outrider.journal import Journal, array_digest


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
        for block in blocks:
            block.experts.resize(policy.settings.slots)

    def foresee(self, counts_MLRE: Array) -> None:
        """A new RL step begins; its load is known."""
        self.now, self.computed_MLR = 0, []
        self._tell(Foreseen(counts_MLRE))

    @contextmanager
    def micro_step(self, stage: Stage, batch: int) -> Iterator[None]:
        """Forward (and, in the update stage, backward) of one micro-batch goes inside."""
        self._tell(Began(stage, batch))
        for block in self.blocks:
            block.seen_E.zero_()
            block.experts.computed = 0
        yield
        mine = torch.stack([torch.cat([b.seen_E, torch.tensor([b.experts.computed])]) for b in self.blocks])
        gathered = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(gathered, mine, group=self.group)
        seen_LRE = torch.stack(gathered, dim=1).numpy()
        self.computed_MLR.append(seen_LRE[:, :, -1].copy())
        self._tell(Ran(batch, seen_LRE[:, :, :-1].copy(), self.computed_MLR[-1]))
        self.now += 1

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
        self._agree(commands)
        for command in commands:
            self._carry_out(command)

    def _agree(self, commands: Sequence[Command]) -> None:
        """Law 7, checked on every event: the commands are the same on all ranks."""
        digest = blake2b(self._encoder.encode(commands), digest_size=16).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        all_digests = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(all_digests, mine, group=self.group)
        for rank, other in enumerate(all_digests):
            if not torch.equal(other, mine):
                raise LawBroken(7, f"ranks {self.rank} and {rank} reached different commands in micro-step {self.now}")

    def _carry_out(self, command: Command) -> None:
        match command:
            case ReturnGradients(rows):
                hops = [(rank, home, layer, expert, slot) for layer, expert, rank, slot, home in rows.tolist()]
                self._ship(
                    hops,
                    lambda layer, _, slot: self.blocks[layer].experts.take_gradient(slot),
                    lambda layer, expert, _, rank, flat: self.blocks[layer].experts.keep_gradient(expert, rank, flat),
                    torch.promote_types(self._dtype(), torch.float32),
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
                mine = quotas[quotas[:, 2] == self.rank]
                for layer, block in enumerate(self.blocks):
                    block.use(mine[mine[:, 0] == layer][:, [1, 3, 4]])
            case Tally(unforeseen, absent):
                self.unforeseen += unforeseen
                self.absent += absent
            case Release():
                for block in self.blocks:
                    block.experts.settle()
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

    def _dtype(self) -> torch.dtype:
        return self.blocks[0].experts.gate_up_proj.dtype
