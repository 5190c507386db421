"""The door to torch: one MoE block spread over ranks, exact under any plan. Not pure; called by training loops.

    hidden [T, H] -> route (recorded ids, live probabilities) -> dispatch (all-to-all) -> experts -> combine -> [T, H]

Each token-slot goes to the rank that the plan's quotas name; those beyond the quotas, which nobody foresaw, go to the
expert's home, so the result is exact for any tokens. Results come back to the place they left from and are summed in
logical top-k order, never in order of arrival. Every rank takes part in every exchange, also with no tokens at all.
Written for Hugging Face's fused experts (Qwen3-MoE): `gate_up_proj` [experts, 2 * inner, hidden], `down_proj`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.errors import CallerError, LawBroken
from outrider.experts.events import Array

Weights = tuple[Tensor, Tensor]  # gate_up [2 * inner, hidden], down [hidden, inner]


class Bank(nn.Module):
    """The experts of one layer that this rank holds: homes as parameters, copies as plain tensors in spare slots.

    Only homes are parameters, so optimizers, clipping and state dicts never see a copy.
    """

    def __init__(self, experts: nn.Module, homes_E: Array, rank: int) -> None:
        super().__init__()
        mine = np.flatnonzero(homes_E == rank)
        self.first, self.rank, self.homes_E = int(mine[0]) if len(mine) else 0, rank, homes_E
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

    def take_gradient(self, slot: int) -> Tensor:
        """The slot's gradient, flat, fp32 at least; the slot's own is zero afterwards."""
        flat = []
        for weight in self._pair(slot):
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            flat.append(gradient.detach().reshape(-1))
            weight.grad = None
        return _wide(torch.cat(flat))

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
            at, begin = expert - self.first, 0
            for parameter in (self.gate_up_proj, self.down_proj):
                assert parameter.grad is not None
                part = flat[begin : begin + parameter[at].numel()].view(parameter[at].shape)
                parameter.grad[at] = (_wide(parameter.grad[at]) + part).to(parameter.dtype)
                begin += parameter[at].numel()
        self._returned.clear()
        self.resize(len(self._slots))

    def forward(self, rows: Tensor, received_RE: Tensor) -> Tensor:
        """Apply experts to rows [n, H] that lie by (source, expert); the result lies in the same order."""
        sizes_E = received_RE.sum(0)
        self.computed += int(sizes_E.sum())
        ranks, experts = received_RE.shape
        expert_of_row = torch.arange(experts).repeat(ranks).repeat_interleave(received_RE.view(-1))
        by_expert = expert_of_row.argsort(stable=True)
        up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        results = []
        for expert, some in enumerate(torch.split(rows[by_expert], sizes_E.tolist())):
            if len(some) == 0:
                continue
            if self.homes_E[expert] == self.rank:
                gate_up, out = up[expert - self.first], down[expert - self.first]
            else:
                gate_up, out = self._pair(self._slot_of(expert))
            gate, inner = F.linear(some, gate_up).chunk(2, dim=-1)
            results.append(F.linear(self.act(gate) * inner, out))
        if not results:
            return rows  # no rows, but the exchange behind them still has its place in the backward pass
        return torch.cat(results)[by_expert.argsort()]

    def _slot_of(self, expert: int) -> int:
        if expert not in self._resident:
            raise LawBroken(6, f"rank {self.rank} was sent tokens of expert {expert}, which it does not hold")
        return self._resident[expert]

    def _pair(self, slot: int) -> Weights:
        pair = self._slots[slot]
        if pair is None:
            raise LawBroken(6, f"rank {self.rank} was asked for slot {slot}, which is empty")
        return pair


class SpreadBlock(nn.Module):
    """A sparse MoE block whose experts are spread over the ranks of `group`; parameters keep their names."""

    def __init__(self, block: nn.Module, homes_E: Array, group: dist.ProcessGroup) -> None:
        super().__init__()
        assert isinstance(block.gate, nn.Module)
        self.gate, self.group, self.homes = block.gate, group, torch.from_numpy(homes_E)
        self.experts = Bank(block.experts, homes_E, group.rank())  # type: ignore[arg-type]
        self.seen_E = torch.zeros(len(homes_E), dtype=torch.int64)
        self.routes: Tensor | None = None
        self.real: Tensor | None = None
        self._upto_ER = torch.zeros((len(homes_E), group.size()), dtype=torch.int64)

    def use(self, quotas: Array) -> None:
        """Take this rank's quotas of this layer, rows (expert, rank, tokens)."""
        quota_ER = np.zeros(tuple(self._upto_ER.shape), dtype=np.int64)
        quota_ER[quotas[:, 0], quotas[:, 1]] = quotas[:, 2]
        self._upto_ER = torch.from_numpy(quota_ER.cumsum(axis=1))

    def replay(self, routes: Tensor | None, real: Tensor | None) -> None:
        """What the next forward pass runs.

        routes  [T, top_k] recorded expert ids; a row with a negative id, or None, is routed by the live gate
        real    [T] bool; tokens that are padding are not computed and get zeros; None: all are real
        """
        self.routes, self.real = routes, real

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        real = torch.arange(len(tokens)) if self.real is None else self.real.nonzero().view(-1)
        chosen, weights = (part[real] for part in self._route(tokens))
        top_k = chosen.shape[1]
        order, sent_RE = self._address(chosen.reshape(-1))
        received_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        send, receive = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()

        rows = tokens[real.repeat_interleave(top_k)[order]]
        arrived = _exchange(rows, send, receive, self.group)
        returned = _exchange(self.experts(arrived, received_RE), receive, send, self.group)
        by_token = returned[order.argsort()].view(len(real), top_k, tokens.shape[1])
        total = by_token[:, 0] * weights[:, 0, None]
        for k in range(1, top_k):
            total = total + by_token[:, k] * weights[:, k, None]
        return torch.zeros_like(tokens).index_copy(0, real, total).view_as(hidden_states)

    def _route(self, tokens: Tensor) -> Weights:
        """Expert ids [T, top_k] and their weights, from the live probabilities (router gradients stay whole)."""
        logits, weights, chosen = self.gate(tokens)
        if self.routes is None:
            return chosen, weights
        recorded = (self.routes >= 0).all(dim=1, keepdim=True)
        chosen = torch.where(recorded, self.routes.to(chosen.dtype), chosen)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, chosen)
        if self.gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights.to(logits.dtype)

    def _address(self, expert: Tensor) -> tuple[Tensor, Tensor]:
        """Order in which the token-slots leave, by (rank, expert, place in the batch), and how many: sent_RE."""
        experts, ranks = self._upto_ER.shape
        by_expert = expert.argsort(stable=True)
        sorted_expert = expert[by_expert]
        count_E = torch.bincount(expert, minlength=experts)
        place = torch.arange(len(expert)) - (count_E.cumsum(0) - count_E)[sorted_expert]
        rank = (self._upto_ER[sorted_expert] <= place[:, None]).sum(1)
        rank = torch.where(rank == ranks, self.homes[sorted_expert], rank)  # beyond the quotas: home
        self.seen_E += count_E
        by_rank = rank.argsort(stable=True)
        sent_RE = torch.bincount(rank * experts + sorted_expert, minlength=ranks * experts).view(ranks, experts)
        return by_expert[by_rank], sent_RE


def spread(model: nn.Module, homes_E: Array, group: dist.ProcessGroup) -> list[SpreadBlock]:
    """Replace every sparse MoE block of a model by one that keeps only this rank's experts; the blocks, by layer.

    Other parameters stay whole on every rank. Raises CallerError for a model without fused MoE experts.
    """
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if hasattr(child, "gate") and hasattr(getattr(child, "experts", None), "gate_up_proj")
    ]
    if not found:
        raise CallerError(f"{type(model).__name__}: no MoE block with fused experts. Give a Qwen3-MoE-shaped model.")
    blocks = []
    for parent, name, child in found:
        blocks.append(SpreadBlock(child, homes_E, group))
        setattr(parent, name, blocks[-1])
    return blocks


def _wide(tensor: Tensor) -> Tensor:
    """fp32, or what is wider already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _AllToAll(torch.autograd.Function):
    """Rows out by `send` counts, rows in by `receive` counts; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        arrived = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0]
        back = gradient.new_empty((sum(ctx.send), gradient.shape[1]))
        dist.all_to_all_single(back, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return back, None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived: Tensor = _AllToAll.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return arrived
