"""What is whole on every rank, all but the experts: gradients added up, equality watched, one norm. Not pure.

Called by balanced.py. Experts differ from rank to rank, so whoever takes the norm of a rank's own gradients gets
another one on every rank, scales dense gradients by it, and the ranks drift apart without a word. Hence both the norm
here, which knows of all ranks' experts, and the look at equal bits before gradients are added.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.bank import Bank
from outrider.experts.layer import SpreadBlock

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Dense:
    """Parameters of `model` that are not an expert's, on the ranks of the blocks' group."""

    def __init__(self, model: nn.Module, blocks: Sequence[SpreadBlock]) -> None:
        self.model, self.blocks, self.group = model, blocks, blocks[0].group
        self._summed: dict[int, Tensor] = {}  # parameter: its gradient, which is the sum over ranks

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """In the model's order."""
        spread_out = {id(p) for block in self.blocks for p in block.experts.parameters()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) not in spread_out]

    def keep_once(self) -> None:
        """A step begins on gradients of the one before: of those sums only rank 0 keeps one, to add them up once."""
        for _, parameter in self.named() if self.group.rank() else ():
            if parameter.grad is not None and parameter.grad is self._summed.get(id(parameter)):
                parameter.grad.zero_()
        self._summed = {}

    def sum_gradients(self) -> None:
        """Add up gradients over ranks. One that no rank has stays None. CallerError where parameters have drifted."""
        named = self.named()
        equal(named, self.group)
        has = torch.tensor([p.requires_grad and p.grad is not None for _, p in named], dtype=torch.int32)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self.group)
        for (_, parameter), some in zip(named, has.tolist(), strict=True):
            if some:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)
                self._summed[id(parameter)] = parameter.grad

    def norm(self) -> Tensor:
        """2-norm of all gradients, in fp32 at least: the same bits on every rank, and for any homes.

        Each expert's norm is taken for itself and laid where its id says; the sum then runs over one order.
        """
        dense = [p.grad.detach() for _, p in self.named() if p.grad is not None]
        of_experts = [_norms(block.experts) for block in self.blocks]
        whole = torch.cat([torch.zeros(0, device=self._device), *of_experts]).double()
        dist.all_reduce(whole, group=self.group)  # each has one that is not zero: exact
        parts = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in dense]
        total: Tensor = torch.linalg.vector_norm(torch.cat([whole, *(part.double().view(1) for part in parts)]))
        return total

    @property
    def _device(self) -> torch.device:
        return self.blocks[0].experts.gate_up_proj.device


def _norms(bank: Bank) -> Tensor:
    """[2 * experts] the norms of this rank's experts' gradients, zero elsewhere."""
    norms = []
    for parameter in bank.parameters():
        mine = torch.zeros(len(bank.homes_E), dtype=torch.float64, device=parameter.device)
        if parameter.grad is not None:
            for expert, row in bank.row_of.items():
                gradient = parameter.grad[row].detach()
                kind = torch.promote_types(gradient.dtype, torch.float32)
                mine[expert] = torch.linalg.vector_norm(gradient.clone(), dtype=kind)  # where it lies changes bits
        norms.append(mine)
    return torch.cat(norms)


def equal(named: Sequence[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> None:
    """CallerError on all ranks, with the first name, where parameters are not equal to the bit on all of them.

    Compared is the sum of all elements' bits, read as integers: one pass over them, and one number each to tell.
    """
    mine = torch.stack([_bits(p) for _, p in named]).cpu() if named else torch.zeros(0, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        apart = (theirs != everyone[0]).nonzero().view(-1).tolist()
        if apart:
            raise CallerError(
                f"{named[apart[0]][0]} is not the same on ranks 0 and {rank} ({len(apart)} of {len(named)} parameters"
                " differ). Give every rank the same seed or checkpoint, and clip by balanced.clip_grad_norm_, which"
                " knows of the experts on other ranks."
            )


def _bits(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().contiguous().view(-1)
    size = flat.element_size()
    whole_words = flat.nbytes % 8 == 0 and flat.storage_offset() * size % 8 == 0  # some thirty times as fast
    return flat.view(torch.int64 if whole_words else INTEGERS[size]).sum(dtype=torch.int64)
