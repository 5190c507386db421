"""What ranks send each other: whole experts or their gradients, and in bitwise mode the parts of sums. Not pure."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from outrider.experts.canonical import Key
from outrider.experts.layer import SpreadBlock

HOST_ROUND_BYTES = 24 << 20  # of a rank: beyond 32 MiB malloc takes fresh pages each time, which cost more than copies
CUDA_ROUND_BYTES = 256 << 20  # there memory is kept, and rounds only bound it
Hop = tuple[int, int, int, int]  # src, dst, layer, expert
Part = tuple[int, int, int, Key, Tensor]  # destination, layer, owner, place in the sum, value


class Exchange:
    """All-to-all over `group`, in which every rank takes part. like: where experts lie, and their type."""

    def __init__(self, group: dist.ProcessGroup, numel: int, like: Tensor) -> None:
        self.group, self.rank, self.numel, self.like = group, group.rank(), numel, like
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.round_bytes = CUDA_ROUND_BYTES if like.is_cuda else HOST_ROUND_BYTES
        self.sent_bytes = 0  # to other ranks

    def experts(
        self, hops: Sequence[Hop], pack: Callable[[int, int], Tensor], dtype: torch.dtype
    ) -> list[tuple[int, int, int, Tensor]]:
        """Whole experts, in rounds of bounded size; what arrived as (layer, expert, src, flat).

        hops  of all ranks; each round takes some of every source, in their order
        pack  an expert of this rank, flat
        """
        cut = rounds(hops, self.numel * dtype.itemsize, self.round_bytes)
        return [arrived for some in cut for arrived in self._round(some, pack, dtype)]

    def _round(
        self, hops: Sequence[Hop], pack: Callable[[int, int], Tensor], dtype: torch.dtype
    ) -> list[tuple[int, int, int, Tensor]]:
        ranks = range(self.group.size())
        send = [[hop for hop in hops if hop[:2] == (self.rank, r)] for r in ranks]
        receive = [[hop for hop in hops if hop[:2] == (r, self.rank)] for r in ranks]
        parts = [pack(*hop[2:]).to(dtype) for some in send for hop in some]
        outgoing = torch.cat(parts) if parts else self.like.new_empty(0, dtype=dtype)
        arrived = outgoing.new_empty(sum(map(len, receive)) * self.numel)
        sizes, theirs = ([self.numel * len(some) for some in side] for side in (send, receive))
        dist.all_to_all_single(arrived, outgoing, theirs, sizes, group=self.group)
        self.sent_bytes += outgoing.nbytes - sizes[self.rank] * outgoing.element_size()
        coming = [hop for some in receive for hop in some]
        flats = arrived.view(-1, self.numel)
        return [(layer, expert, src, flat) for (src, _, layer, expert), flat in zip(coming, flats, strict=True)]

    def parts(self, parts: Sequence[Part]) -> list[tuple[int, int, Key, Tensor]]:
        """Bitwise mode: (layer, owner, key, value) from all ranks. How many come is told first."""
        parts = sorted(parts, key=lambda part: part[0])
        flat = [value.reshape(-1).to(self.wide) for *_, value in parts]
        heads = [[layer, owner, *key, len(f)] for (_, layer, owner, key, _), f in zip(parts, flat, strict=True)]
        sizes_R2 = torch.zeros((self.group.size(), 2), dtype=torch.int64)
        for (dst, *_), f in zip(parts, flat, strict=True):
            sizes_R2[dst] += torch.tensor([1, len(f)])
        theirs_R2 = torch.empty_like(sizes_R2)
        dist.all_to_all_single(theirs_R2, sizes_R2, group=self.group)
        values = torch.cat(flat) if flat else self.like.new_empty(0, dtype=self.wide)
        arrived = []
        for column, out in enumerate((torch.tensor(heads, dtype=torch.int64).view(-1, 6), values)):
            send, receive = sizes_R2[:, column].tolist(), theirs_R2[:, column].tolist()
            arrived.append(out.new_empty((sum(receive), *out.shape[1:])))
            dist.all_to_all_single(arrived[-1], out, receive, send, group=self.group)
        self.sent_bytes += sum(f.nbytes for (dst, *_), f in zip(parts, flat, strict=True) if dst != self.rank)
        rows = arrived[0].tolist()
        each = torch.split(arrived[1], [row[5] for row in rows])
        return [(row[0], row[1], (row[2], row[3], row[4]), v.clone()) for row, v in zip(rows, each, strict=True)]


def rounds(hops: Sequence[Hop], expert_bytes: int, round_bytes: int) -> list[list[Hop]]:
    """Hops cut into rounds, in which no source sends more than `round_bytes`, or one expert."""
    each, sent = max(1, round_bytes // expert_bytes), Counter[int]()
    cut = defaultdict[int, list[Hop]](list)
    for hop in hops:
        cut[sent[hop[0]] // each].append(hop)
        sent[hop[0]] += 1
    return [cut[number] for number in sorted(cut)]


def settle_sums(blocks: Sequence[SpreadBlock], exchange: Exchange) -> None:
    """Bitwise mode, at the end of a step: parts of experts' gradients go home, those of routers to rank 0.

    Router gradients are then whole there and zero elsewhere, so that the sum over ranks is right, to the bit.
    """
    parts = [
        (int(block.experts.homes_E[expert]), layer, expert, key, value)
        for layer, block in enumerate(blocks)
        for expert, key, value in block.experts.take_parts()
    ]
    for layer, expert, key, value in exchange.parts(parts):
        blocks[layer].experts.sums.add(expert, *key, value)
    parts = [
        (0, layer, 0, key, value)
        for layer, block in enumerate(blocks)
        for key, value in sorted(block.router_sums.nodes.pop(0, {}).items(), key=lambda item: item[0])
    ]
    for layer, _, key, value in exchange.parts(parts):
        blocks[layer].router_sums.add(0, *key, value)
    for block in blocks:
        weight: torch.nn.Parameter = block.gate.weight  # type: ignore[assignment]
        whole = block.router_sums.settle(0) if exchange.rank == 0 and block.router_sums.leaves_of else None
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if whole is not None:
                weight.grad += whole.view(weight.shape).to(weight.dtype)
        block.router_sums.clear()
