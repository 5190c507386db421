"""Sums whose bits do not depend on who computed what: the arithmetic of the layer's bitwise mode. Called by layer.py.

Floating-point sums depend on their order, and rows of a matrix product on how many rows it has. So here
- token-slots of an expert stand in one order, (source rank, token, k), and are cut into blocks of a fixed number of
  rows. A block is computed whole, by one rank, padded with zeros: same shapes, same contents, same bits;
- gradients are added up along one binary tree over the blocks, 0 + 1, 2 + 3, ..., wherever its parts were computed;
- what cannot be cut into equal blocks (router, combination) uses elementwise products and additions alone, which
  IEEE 754 fixes for each element, whatever the shape around it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.overrides import TorchFunctionMode

from outrider.errors import LawBroken

CHUNK = 64  # tokens that the router sees at once; a multiple of what vector loops take

Key = tuple[int, int, int]  # backward pass, level, place: leaves [place << level, (place + 1) << level)


def wide(tensor: Tensor) -> Tensor:
    """fp32, or what is wider already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, halves onto halves; elementwise additions alone."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        paired = x[..., : n // 2] + x[..., half:]
        x = paired if n % 2 == 0 else torch.cat([paired, x[..., n // 2 : half]], dim=-1)
    return x[..., 0]


def product(rows_TK: Tensor, matrix_NK: Tensor) -> Tensor:
    """rows @ matrix.T with a tree over K: each result depends on its own row and column alone."""
    parts = [tree_sum(wide(some[:, None]) * wide(matrix_NK)[None]) for some in torch.split(rows_TK, CHUNK)]
    return torch.cat(parts).to(rows_TK.dtype) if parts else rows_TK.new_empty((0, len(matrix_NK)))


class Sums:
    """Gradients of several owners (a block's experts; its router), as trees over the leaves of each backward pass.

    A rank that computed some leaves of an owner holds the nodes of its tree that they fill, few as they are; at home
    all nodes come together. `leaves_of` holds, by backward pass, how many leaves each owner has over all ranks.
    """

    def __init__(self) -> None:
        self.leaves_of: list[list[int]] = []
        self.nodes: dict[int, dict[Key, Tensor]] = {}  # owner -> its nodes
        self._sum: dict[int, tuple[int, Tensor | None]] = {}  # owner -> passes folded so far, their sum

    def begin(self, leaves_of: Sequence[int]) -> int:
        """A backward pass of all ranks begins; its number."""
        self.leaves_of.append(list(leaves_of))
        return len(self.leaves_of) - 1

    def add(self, owner: int, serial: int, level: int, place: int, value: Tensor) -> None:
        """A node is known; neighbours become their parent, left + right."""
        nodes = self.nodes.setdefault(owner, {})
        while (beside := nodes.pop((serial, level, place ^ 1), None)) is not None:
            value = beside + value if place % 2 else value + beside
            level, place = level + 1, place // 2
        if (serial, level, place) in nodes:
            raise LawBroken(6, f"part {place} (level {level}) of the gradient of {owner} came twice")
        nodes[serial, level, place] = value

    def add_run(self, owner: int, serial: int, first: int, leaves: Tensor) -> None:
        """Leaves [n, ...] from `first` on, level by level at once."""
        level = 0
        while len(leaves):
            if first % 2:
                self.add(owner, serial, level, first, leaves[0].clone())
                first, leaves = first + 1, leaves[1:]
            if len(leaves) % 2:
                self.add(owner, serial, level, first + len(leaves) - 1, leaves[-1].clone())
                leaves = leaves[:-1]
            leaves, first, level = leaves[0::2] + leaves[1::2], first // 2, level + 1

    def fold(self, owner: int) -> None:
        """At home: add up whole passes, in their order, as far as they have come in."""
        done, total = self._sum.get(owner, (0, None))
        nodes = self.nodes.get(owner, {})
        while done < len(self.leaves_of):
            n = self.leaves_of[done][owner]
            mine = sorted((key for key in nodes if key[0] == done), key=lambda key: key[2] << key[1], reverse=True)
            if sum(min((place + 1) << level, n) - (place << level) for _, level, place in mine) < n:
                break
            whole: Tensor | None = None
            for key in mine:  # from the right: an odd end waits for what stands to its left
                node = nodes.pop(key)
                whole = node if whole is None else node + whole
            total = whole if total is None else total if whole is None else total + whole
            done += 1
        self._sum[owner] = done, total

    def settle(self, owner: int) -> Tensor | None:
        """The owner's gradient over all passes; None if it had no leaf. LawBroken if a part is missing."""
        self.fold(owner)
        done, total = self._sum.pop(owner)
        if done < len(self.leaves_of) or self.nodes.get(owner):
            raise LawBroken(6, f"the gradient of {owner} is not whole: backward pass {done} lacks parts")
        return None if total is None else total + 0.0  # -0 becomes 0, as in any sum with a zero

    def clear(self) -> None:
        """A new step. LawBroken if parts of a gradient were left behind."""
        left = sorted(owner for owner, nodes in self.nodes.items() if nodes)
        if left:
            raise LawBroken(6, f"gradients of {left} were computed after they had gone home")
        self.leaves_of, self.nodes, self._sum = [], {}, {}


class ExactRouter(TorchFunctionMode):
    """While it is entered, products with the router's weight are exact, and its gradient goes to `sums` (owner 0).

    Made for one pass; `rows` are those of this call, CHUNK of them, of which the first `real` are no padding and start
    at token `first` of `tokens` over all ranks. The fixed shape keeps exponentials off the scalar ends of vector loops.
    """

    def __init__(self, weight: Tensor, sums: Sums, tokens: int) -> None:
        super().__init__()
        self.shape, self.dtype, self.learns = weight.shape, wide(weight[:0]).dtype, weight.requires_grad
        self.sums, self.tokens = sums, tokens
        self.first = self.real = 0
        self.serial: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) == 2 and args[1].shape == self.shape:
            return _Linear.apply(*args, self)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, router: ExactRouter) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.router, ctx.first, ctx.real = router, router.first, router.real
        return product(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        rows, weight = ctx.saved_tensors
        router, gradient = ctx.router, gradients[0]
        if router.learns:
            if router.serial is None:
                router.serial = router.sums.begin([router.tokens])
            left, right = gradient[: ctx.real, :, None].to(router.dtype), rows[: ctx.real, None, :].to(router.dtype)
            router.sums.add_run(0, router.serial, ctx.first, left * right)
        return product(gradient, weight.T), None, None


class Dispatch(torch.autograd.Function):
    """rows[i] = tokens[order[i] // top_k]; backward adds a token's gradients in the order of k."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.order, ctx.top_k = order, top_k
        return tokens[order // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        by_slot = torch.empty_like(gradients[0])
        by_slot[ctx.order] = gradients[0]
        by_token = by_slot.view(len(by_slot) // ctx.top_k, ctx.top_k, by_slot.shape[1])
        total = by_token[:, 0]
        for k in range(1, ctx.top_k):
            total = total + by_token[:, k]
        return total, None, None


class Combine(torch.autograd.Function):
    """Sum over k of results [T, k, H] times weights [T, k], in the order of k."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(results, weights)
        total = results[:, 0] * weights[:, 0, None]
        for k in range(1, results.shape[1]):
            total = total + results[:, k] * weights[:, k, None]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        results, weights = ctx.saved_tensors
        gradient = gradients[0][:, None]
        of_weights = tree_sum(wide(gradient) * wide(results)).to(weights.dtype)
        return (gradient * weights[:, :, None]).to(results.dtype), of_weights
