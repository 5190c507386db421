"""The experts that a rank holds, homes and copies, and what they compute. Not pure; called by layer.py and move.py."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.errors import CallerError, LawBroken
from outrider.experts.canonical import Key, Sums, wide
from outrider.experts.copies import Copies, Weights
from outrider.experts.events import Array

OUTSIDE, BETWEEN = -1, -2  # no step is under way; no micro-step of it is

Blocks = Mapping[int, Sequence[tuple[int, int]]]  # expert -> (number, rows) of each of its blocks computed here


def inside_backward() -> bool:
    """Whether a backward pass runs now: activations are computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


class Bank(nn.Module):
    """The experts of one layer that this rank holds: homes as parameters, by id, and copies in the rank's frames.

    Only homes are parameters, so optimizers, clipping and state dicts never see a copy. `enter` and `leave` are called
    around the layer's computing, with whether it is the backward pass.
    """

    def __init__(self, experts: nn.Module, homes_E: Array, rank: int, block_rows: int = 0) -> None:
        super().__init__()
        self.rank, self.block_rows, self.layer = rank, block_rows, 0
        self.batch = OUTSIDE  # what runs now: a backward pass must find what its forward pass found
        self.ran_backward = False  # in this step
        self.sums = Sums()  # in bitwise mode: gradients by expert, homes and copies alike
        self.act: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
        self.settle_at(homes_E)
        index = torch.from_numpy(np.flatnonzero(homes_E == rank))
        whole: Sequence[nn.Parameter] = (experts.gate_up_proj, experts.down_proj)  # type: ignore[assignment]
        mine = [nn.Parameter(p.detach()[index].clone(), requires_grad=p.requires_grad) for p in whole]
        self.gate_up_proj, self.down_proj = mine
        self.shapes = self.gate_up_proj.shape[1:], self.down_proj.shape[1:]
        self.numel = sum(shape.numel() for shape in self.shapes)  # of one expert
        self.computed = 0
        self.copies: Copies | None = None
        self.enter: Callable[[bool], None] = lambda _: None
        self.leave: Callable[[bool], None] = lambda _: None
        self._returned: dict[tuple[int, int], Tensor] = {}  # (expert, rank of the copy) -> flat gradient, wide

    def settle_at(self, homes_E: Array) -> None:
        """Experts live there from now on; the caller brings parameters along."""
        self.homes_E = homes_E
        self.row_of = {expert: row for row, expert in enumerate(np.flatnonzero(homes_E == self.rank).tolist())}

    def weights_of(self, expert: int) -> Tensor:
        """A home expert's weights, flat, to be sent."""
        return torch.cat([parameter.detach()[self.row_of[expert]].reshape(-1) for parameter in self.parameters()])

    def take_parts(self) -> list[tuple[int, Key, Tensor]]:
        """Bitwise mode: the parts of copies' gradients (expert, key, value), which are this rank's no longer."""
        away = sorted(expert for expert in self.sums.nodes if expert not in self.row_of)
        return [
            (expert, key, value)
            for expert in away
            for key, value in sorted(self.sums.nodes.pop(expert).items(), key=lambda item: item[0])
        ]

    def keep_gradient(self, expert: int, rank: int, flat: Tensor) -> None:
        """A copy's gradient is home; it is added up per rank until `settle`."""
        before = self._returned.get((expert, rank))
        self._returned[expert, rank] = flat if before is None else before + flat

    def settle(self) -> None:
        """Home gradients = home's own, then the copies' by rank id, in fp32 at least and rounded once.

        Frozen parameters get none: an optimizer that was given them would let them decay.
        """
        for parameter in self.parameters():
            if parameter.grad is None and parameter.requires_grad and self.ran_backward:
                parameter.grad = torch.zeros_like(parameter)
        for expert, parts in groupby(sorted(self._returned), key=lambda key: key[0]):
            self._add_home(expert, [self._returned[key] for key in parts])
        for expert in self.row_of if self.sums.leaves_of else ():
            whole = self.sums.settle(expert)
            if whole is not None:
                self._add_home(expert, [whole])
        self.sums.clear()
        self._returned.clear()
        self.ran_backward = False

    def _add_home(self, expert: int, flats: Sequence[Tensor]) -> None:
        at, begin = self.row_of[expert], 0
        for parameter, shape in zip(self.parameters(), self.shapes, strict=True):
            end = begin + shape.numel()
            if parameter.grad is not None and parameter.requires_grad:
                total = wide(parameter.grad[at])
                for flat in flats:
                    total = total + flat[begin:end].view(shape)
                parameter.grad[at] = total.to(parameter.dtype)
            begin = end

    def forward(self, rows: Tensor, received_RE: Tensor, blocks: Blocks | None = None, leaves_E: Any = ()) -> Tensor:
        """Apply experts to rows [n, H] that lie by (source, expert); the result lies in the same order.

        blocks  bitwise mode: the blocks that these rows fill, in their order; leaves_E: of how many in all
        """
        sizes_E = received_RE.sum(0).tolist()
        if torch.is_grad_enabled() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # a rank without rows must take part in the backward exchange too
        ranks, experts = received_RE.shape
        expert_of_row = torch.arange(experts).repeat(ranks).repeat_interleave(received_RE.view(-1))
        by_expert = expert_of_row.argsort(stable=True).to(rows.device)
        again = inside_backward()
        if again and self.batch == BETWEEN:
            raise CallerError(
                f"layer {self.layer}: activations are computed again outside of any micro-step. Call backward inside"
                " the `with run.micro_step(m)` that ran forward, or inside run.backward(m)."
            )
        self.computed += 0 if again else sum(sizes_E)
        self.enter(again)
        if blocks is not None:
            computed: Tensor = _Blocks.apply(rows[by_expert], self, blocks, leaves_E)  # type: ignore[no-untyped-call]
        else:
            runs = [(expert, n) for expert, n in enumerate(sizes_E) if n]
            computed = _Experts.apply(rows[by_expert], self.gate_up_proj, self.down_proj, self, runs)  # type: ignore[no-untyped-call]
        if not again:
            self.leave(False)
        return computed[by_expert.argsort()]

    def inner(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    @property
    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def enter_backward(self, batch: int) -> None:
        """The backward pass of what ran in micro-step `batch` begins. CallerError where that is not under way."""
        self._check(batch)
        self.ran_backward = True
        self.enter(True)

    def _check(self, batch: int) -> None:
        if batch != self.batch:
            ran, runs = (f"in micro-step {n}" if n >= 0 else "outside of any" for n in (batch, self.batch))
            raise CallerError(
                f"layer {self.layer}: forward ran {ran}, its backward runs {runs}, where its copies may be gone."
                " Put both inside one `with run.micro_step(m)`, or into run.forward(m) and run.backward(m)."
            )

    def weights(self, expert: int) -> Weights:
        """The weights of an expert that this rank holds, home or copy."""
        row = self.row_of.get(expert)
        if row is not None:
            return self.gate_up_proj.detach()[row], self.down_proj.detach()[row]
        if self.copies is None:
            raise LawBroken(6, f"tokens of layer {self.layer}, expert {expert} came to a rank that does not hold it")
        return self.copies.enter(self.layer, expert)


class _Experts(torch.autograd.Function):
    """Experts on rows that lie by expert, `runs` (expert, rows). Weights are looked up anew in the backward pass.

    A copy may have left its frame and come back in between. Its gradient goes to the frame, a home's to its parameter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, up: Tensor, down: Tensor, bank: Bank, runs: list[tuple[int, int]]) -> Tensor:
        results, begin, computed_in = torch.empty_like(rows), 0, _computed_in(rows)
        rows = rows.to(computed_in)
        hidden = rows.new_empty((len(rows), up.shape[1]))
        for expert, n in runs:
            gate_up, out = (weight.to(computed_in) for weight in bank.weights(expert))
            some = slice(begin, begin + n)
            hidden[some] = F.linear(rows[some], gate_up)
            results[some] = F.linear(bank.inner(hidden[some]), out)
            begin += n
        ctx.save_for_backward(rows, hidden)
        ctx.bank, ctx.runs, ctx.batch = bank, runs, bank.batch
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (rows, hidden), bank, runs = ctx.saved_tensors, ctx.bank, ctx.runs
        bank.enter_backward(ctx.batch)
        here = any(expert in bank.row_of for expert, _ in runs)
        home = [torch.zeros_like(p) if here and p.requires_grad else None for p in bank.parameters()]
        back, begin = torch.empty_like(gradients[0]), 0
        for expert, n in runs:
            gate_up, down = (weight.to(rows.dtype) for weight in bank.weights(expert))
            some = slice(begin, begin + n)
            x, dy = rows[some], gradients[0][some].to(rows.dtype)
            with torch.enable_grad():
                h = hidden[some].detach().requires_grad_()
                inner = bank.inner(h)
                (dh,) = torch.autograd.grad(inner, h, dy @ down)
            back[some] = dh @ gate_up
            if bank.learns:
                parts = dh.T @ x, dy.T @ inner.detach()
                if expert in bank.row_of:
                    for whole, part in zip(home, parts, strict=True):
                        if whole is not None:
                            whole[bank.row_of[expert]] = part
                else:
                    assert bank.copies is not None
                    bank.copies.add_gradient(bank.layer, expert, *parts)
            begin += n
        bank.leave(True)
        return back, home[0], home[1], None, None


class _Blocks(torch.autograd.Function):
    """Experts in bitwise mode: each block alone, padded to its fixed size; weight gradients go to the bank's sums.

    Products are of the weights' type, whatever autocast says.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bank: Bank, blocks: Blocks, leaves_E: list[int]) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.bank, ctx.blocks, ctx.leaves_E, ctx.batch = bank, blocks, leaves_E, bank.batch
        results, begin = torch.empty_like(rows), 0
        for expert, mine in blocks.items():
            gate_up, down = (weight.clone() for weight in bank.weights(expert))  # alignment changes bits too
            for _, size in mine:
                x = _padded(rows[begin : begin + size], bank.block_rows, gate_up.dtype)
                with _as_weights_are(x):
                    results[begin : begin + size] = F.linear(bank.inner(F.linear(x, gate_up)), down)[:size]
                begin += size
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (rows,), bank = ctx.saved_tensors, ctx.bank
        learns = bank.learns
        bank.enter_backward(ctx.batch)
        serial = bank.sums.begin(ctx.leaves_E) if learns else -1
        back, begin = torch.empty_like(rows), 0
        for expert, mine in ctx.blocks.items():
            gate_up, down = (weight.clone() for weight in bank.weights(expert))
            for number, size in mine:
                x, dy = (_padded(t[begin : begin + size], bank.block_rows, down.dtype) for t in (rows, gradients[0]))
                with torch.enable_grad(), _as_weights_are(x):
                    hidden = F.linear(x, gate_up).detach().requires_grad_()
                    inner = bank.inner(hidden)
                    (dhidden,) = torch.autograd.grad(inner, hidden, dy @ down)
                    back[begin : begin + size] = (dhidden.detach() @ gate_up)[:size]
                if learns:
                    parts = wide(dhidden).T @ wide(x), wide(dy).T @ wide(inner.detach())
                    bank.sums.add(expert, serial, 0, number, torch.cat([part.reshape(-1) for part in parts]))
                begin += size
        if learns:
            for expert in bank.row_of:
                bank.sums.fold(expert)
        bank.leave(True)
        return back, None, None, None


def _computed_in(rows: Tensor) -> torch.dtype:
    """The type of products, as stock layers have it: that of autocast, which lets float64 be, or that of the rows."""
    kind, casts = rows.device.type, rows.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts and torch.is_autocast_enabled(kind) else rows.dtype


def _as_weights_are(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _padded(rows: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    whole = rows.new_zeros((length, rows.shape[1]), dtype=dtype)
    whole[: len(rows)] = rows
    return whole
