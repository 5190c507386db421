"""The experts that a rank holds, homes and copies, and what they compute. Not pure; called by layer.py and move.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.errors import LawBroken
from outrider.experts.canonical import Key, Sums, wide
from outrider.experts.events import Array

Weights = tuple[Tensor, Tensor]  # gate_up [2 * inner, hidden], down [hidden, inner]
Blocks = Mapping[int, Sequence[tuple[int, int]]]  # expert -> (number, rows) of each of its blocks computed here


class Bank(nn.Module):
    """The experts of one layer that this rank holds: homes as parameters, copies as plain tensors in spare slots.

    Only homes are parameters, so optimizers, clipping and state dicts never see a copy.
    """

    def __init__(self, experts: nn.Module, homes_E: Array, rank: int, block_rows: int = 0) -> None:
        super().__init__()
        mine = np.flatnonzero(homes_E == rank)
        self.first, self.rank, self.homes_E, self.block_rows = (
            int(mine[0]) if len(mine) else 0,
            rank,
            homes_E,
            block_rows,
        )
        self.sums = Sums()  # in bitwise mode: gradients by expert, homes and copies alike
        self.act: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
        index = torch.from_numpy(mine)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[index].clone())  # type: ignore[operator]
        self.down_proj = nn.Parameter(experts.down_proj.detach()[index].clone())  # type: ignore[operator]
        self.numel = self.gate_up_proj.shape[1:].numel() + self.down_proj.shape[1:].numel()  # of one expert
        self.computed = 0
        self._slots: list[Weights | None] = []
        self._resident: dict[int, int] = {}  # expert -> slot
        self._returned: dict[tuple[int, int], Tensor] = {}  # (expert, rank of the copy) -> flat gradient, wide

    def resize(self, slots: int) -> None:
        """Empty all slots; from now on there are `slots` of them."""
        self._slots, self._resident = [None] * slots, {}

    def weights_of(self, expert: int) -> Tensor:
        """A home expert's weights, flat, to be sent."""
        at = expert - self.first
        return torch.cat([self.gate_up_proj.detach()[at].reshape(-1), self.down_proj.detach()[at].reshape(-1)])

    def fill(self, slot: int, expert: int, flat: Tensor) -> None:
        """A copy has arrived: it takes the slot, with no gradient yet."""
        up, down = self.gate_up_proj.shape[1:], self.down_proj.shape[1:]
        gate_up, out = torch.split(flat, [up.numel(), down.numel()])
        pair = (gate_up.view(up).requires_grad_(), out.view(down).requires_grad_())
        self._resident = {e: s for e, s in self._resident.items() if s != slot} | {expert: slot}
        self._slots[slot] = pair

    def take_parts(self, expert: int) -> list[tuple[Key, Tensor]]:
        """Bitwise mode: the parts of a copy's gradient, which are this rank's no longer."""
        return sorted(self.sums.nodes.pop(expert, {}).items(), key=lambda item: item[0])

    def take_gradient(self, slot: int) -> Tensor:
        """The slot's gradient, flat, fp32 at least; the slot's own is zero afterwards."""
        flat = []
        for weight in self._pair(slot):
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            flat.append(gradient.detach().reshape(-1))
            weight.grad = None
        return wide(torch.cat(flat))

    def keep_gradient(self, expert: int, rank: int, flat: Tensor) -> None:
        """A copy's gradient is home; it is added up per rank until `settle`."""
        before = self._returned.get((expert, rank))
        self._returned[expert, rank] = flat if before is None else before + flat

    def settle(self) -> None:
        """Home gradients = home's own, then the copies' by rank id, in fp32 at least; then all slots are empty."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for (expert, _), flat in sorted(self._returned.items(), key=lambda item: item[0]):
            self._add_home(expert, flat)
        for expert in np.flatnonzero(self.homes_E == self.rank).tolist() if self.sums.leaves_of else ():
            whole = self.sums.settle(expert)
            if whole is not None:
                self._add_home(expert, whole)
        self.sums.clear()
        self._returned.clear()
        self.resize(len(self._slots))

    def _add_home(self, expert: int, flat: Tensor) -> None:
        at, begin = expert - self.first, 0
        for parameter in (self.gate_up_proj, self.down_proj):
            assert parameter.grad is not None
            part = flat[begin : begin + parameter[at].numel()].view(parameter[at].shape)
            parameter.grad[at] = (wide(parameter.grad[at]) + part).to(parameter.dtype)
            begin += parameter[at].numel()

    def forward(self, rows: Tensor, received_RE: Tensor, blocks: Blocks | None = None, leaves_E: Any = ()) -> Tensor:
        """Apply experts to rows [n, H] that lie by (source, expert); the result lies in the same order.

        blocks  bitwise mode: the blocks that these rows fill, in their order; leaves_E: of how many in all
        """
        sizes_E = received_RE.sum(0)
        if torch.is_grad_enabled() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # a rank without rows must take part in the backward exchange too
        self.computed += int(sizes_E.sum())
        ranks, experts = received_RE.shape
        expert_of_row = torch.arange(experts).repeat(ranks).repeat_interleave(received_RE.view(-1))
        by_expert = expert_of_row.argsort(stable=True)
        if blocks is not None:
            computed: Tensor = _Blocks.apply(rows[by_expert], self, blocks, leaves_E)  # type: ignore[no-untyped-call]
            return computed[by_expert.argsort()]
        up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        results = []
        for expert, some in enumerate(torch.split(rows[by_expert], sizes_E.tolist())):
            if len(some) == 0:
                continue
            if self.homes_E[expert] == self.rank:
                gate_up, out = up[expert - self.first], down[expert - self.first]
            else:
                gate_up, out = self._pair(self._slot_of(expert))
            results.append(F.linear(self.inner(F.linear(some, gate_up)), out))
        if not results:
            return rows  # no rows, but the exchange behind them still has its place in the backward pass
        return torch.cat(results)[by_expert.argsort()]

    def inner(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    def weights(self, expert: int) -> Weights:
        """The weights of an expert that this rank holds, home or copy."""
        if self.homes_E[expert] == self.rank:
            at = expert - self.first
            return self.gate_up_proj.detach()[at], self.down_proj.detach()[at]
        gate_up, down = self._pair(self._slot_of(expert))
        return gate_up.detach(), down.detach()

    def _slot_of(self, expert: int) -> int:
        if expert not in self._resident:
            raise LawBroken(6, f"rank {self.rank} was sent tokens of expert {expert}, which it does not hold")
        return self._resident[expert]

    def _pair(self, slot: int) -> Weights:
        pair = self._slots[slot]
        if pair is None:
            raise LawBroken(6, f"rank {self.rank} was asked for slot {slot}, which is empty")
        return pair


class _Blocks(torch.autograd.Function):
    """Experts in bitwise mode: each block alone, padded to its fixed size; weight gradients go to the bank's sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bank: Bank, blocks: Blocks, leaves_E: list[int]) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.bank, ctx.blocks, ctx.leaves_E = bank, blocks, leaves_E
        ctx.weights = {expert: bank.weights(expert) for expert in blocks}
        results, begin = torch.empty_like(rows), 0
        for expert, mine in blocks.items():
            gate_up, down = (weight.clone() for weight in ctx.weights[expert])  # alignment changes a product's bits too
            for _, size in mine:
                x = _padded(rows[begin : begin + size], bank.block_rows)
                results[begin : begin + size] = F.linear(bank.inner(F.linear(x, gate_up)), down)[:size]
                begin += size
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (rows,), bank = ctx.saved_tensors, ctx.bank
        learns = bank.gate_up_proj.requires_grad
        serial = bank.sums.begin(ctx.leaves_E) if learns else -1
        back, begin = torch.empty_like(rows), 0
        for expert, mine in ctx.blocks.items():
            gate_up, down = (weight.clone() for weight in ctx.weights[expert])
            for number, size in mine:
                x, dy = (_padded(t[begin : begin + size], bank.block_rows) for t in (rows, gradients[0]))
                with torch.enable_grad():
                    hidden = F.linear(x, gate_up).detach().requires_grad_()
                    inner = bank.inner(hidden)
                    (dhidden,) = torch.autograd.grad(inner, hidden, dy @ down)
                back[begin : begin + size] = (dhidden @ gate_up)[:size]
                if learns:
                    parts = wide(dhidden).T @ wide(x), wide(dy).T @ wide(inner.detach())
                    bank.sums.add(expert, serial, 0, number, torch.cat([part.reshape(-1) for part in parts]))
                begin += size
        if learns:
            for expert in np.flatnonzero(bank.homes_E == bank.rank).tolist():
                bank.sums.fold(expert)
        return back, None, None, None


def _padded(rows: Tensor, length: int) -> Tensor:
    whole = rows.new_zeros((length, rows.shape[1]))
    whole[: len(rows)] = rows
    return whole
