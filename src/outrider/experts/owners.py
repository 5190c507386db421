"""Masters change their homes between two steps: weights and optimizer state go along, rank to rank. Not pure.

Parameters and state stay the tensors that the optimizer knows wherever a rank has as many experts as before; rows are
by expert id. State that has a row for each expert moves (Adam's moments, momentum); state that has none (the number of
steps) is the same everywhere and stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.layer import SpreadBlock


def check(blocks: Sequence[SpreadBlock], optimizer: torch.optim.Optimizer | None, group: dist.ProcessGroup) -> None:
    """Can the masters of these blocks move? All ranks ask before anything changes; no blocks, no question.

    CallerError, on all ranks, where a rank has no optimizer to take state from, gradients that are not zero, or state
    that does not lie by expert or is of another form than the others'.
    """
    if not blocks:
        return
    problem, form = _form(blocks, optimizer)
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, (problem, form), group=group)
    for rank, (words, theirs) in enumerate(said):
        if words or theirs != said[0][1]:
            raise CallerError(f"relocation, rank {rank}: {words or 'optimizer state of another form than on rank 0'}.")


def relocate(
    blocks: Sequence[SpreadBlock],
    rows: Array,
    homes_LE: Array,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup,
) -> None:
    """Move masters, of which `check` found that they can. rows [n, 4]: layer, expert, old home, new home."""
    for layer in sorted(set(rows[:, 0].tolist())):
        _move_layer(blocks[layer], rows[rows[:, 0] == layer], homes_LE[layer], optimizer, group)


def _form(blocks: Sequence[SpreadBlock], optimizer: torch.optim.Optimizer | None) -> tuple[str, Any]:
    """What hinders, or "", and how an expert's row of every tensor looks."""
    if optimizer is None:
        return (
            "experts change their homes, and nobody said whose state goes along. Give step(plan, optimizer=...)",
            None,
        )
    form = []
    for block in blocks:
        for parameter in block.experts.parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                return "gradients are not zero. Call optimizer.zero_grad() before a step that relocates experts", None
            state = optimizer.state.get(parameter, {})
            if whole := lumped(state, len(parameter)):
                return f"the optimizer's {whole} has no row for each expert and cannot go along. Keep homes", None
            form.append([(key, t.dtype, tuple(t.shape[1:])) for key, t in _tensors(parameter, optimizer)])
    return "", form


def by_expert(value: Any, experts: int) -> bool:
    """Does this part of an optimizer's state have a row for each of so many experts?"""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == experts


def lumped(state: Mapping[str, Any], experts: int) -> str:
    """A part of the state that belongs to several experts together, as quantised or factored states may; or ""."""
    parts = (key for key, t in state.items() if isinstance(t, Tensor) and t.numel() > 1 and not by_expert(t, experts))
    return next(parts, "")


def _tensors(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The parameter, and the optimizer's tensors that have a row for each of its experts, by name."""
    state = optimizer.state.get(parameter, {})
    return [
        ("", parameter.detach()),
        *((key, value) for key, value in sorted(state.items()) if by_expert(value, len(parameter))),
    ]


def _move_layer(
    block: SpreadBlock, rows: Array, homes_E: Array, optimizer: torch.optim.Optimizer | None, group: dist.ProcessGroup
) -> None:
    assert optimizer is not None
    bank, me = block.experts, group.rank()
    tensors = [pair for parameter in bank.parameters() for pair in _tensors(parameter, optimizer)]
    ranks = range(group.size())
    send = [rows[(rows[:, 2] == me) & (rows[:, 3] == r), 1].tolist() for r in ranks]
    receive = [rows[(rows[:, 2] == r) & (rows[:, 3] == me), 1].tolist() for r in ranks]
    width = sum(_row_bytes(tensor) for _, tensor in tensors)
    leaving = [_bytes_of(tensor[bank.row_of[e]]) for some in send for e in some for _, tensor in tensors]
    outgoing = torch.cat(leaving) if leaving else torch.empty(0, dtype=torch.uint8)
    arrived = torch.empty(sum(map(len, receive)) * width, dtype=torch.uint8)
    dist.all_to_all_single(
        arrived, outgoing, [width * len(some) for some in receive], [width * len(some) for some in send], group=group
    )
    coming = dict(zip((e for some in receive for e in some), arrived.view(-1, width), strict=True))
    old, mine = dict(bank.row_of), np.flatnonzero(homes_E == me).tolist()
    begin = 0
    for parameter in bank.parameters():
        for key, tensor in _tensors(parameter, optimizer):
            end = begin + _row_bytes(tensor)
            fresh = tensor.new_empty((len(mine), *tensor.shape[1:]))
            for at, expert in enumerate(mine):
                if expert in old:
                    fresh[at] = tensor[old[expert]]
                else:
                    fresh[at] = coming[expert][begin:end].clone().view(tensor.dtype).view(tensor.shape[1:])
            _replace(parameter, key, fresh, optimizer)
            begin = end
        parameter.grad = None
    bank.settle_at(homes_E)
    block.homes = torch.from_numpy(homes_E)


def _replace(parameter: nn.Parameter, key: str, fresh: Tensor, optimizer: torch.optim.Optimizer) -> None:
    target = parameter.data if not key else optimizer.state[parameter][key]
    if target.shape == fresh.shape:
        target.copy_(fresh)
    elif key:
        optimizer.state[parameter][key] = fresh
    else:
        # the gradient's node of an older graph has the old shape: another type makes torch forget it
        parameter.data = fresh.new_empty(0, dtype=torch.float32 if fresh.dtype == torch.bfloat16 else torch.bfloat16)
        parameter.data = fresh


def _row_bytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.element_size()


def _bytes_of(row: Tensor) -> Tensor:
    return row.contiguous().view(-1).view(torch.uint8).cpu()
