"""Checkpoints that know nothing of plans: model and optimizer state as the plain model has it. Not pure.

Called by balanced.py. Rows are by expert id, wherever experts live, and the optimizer numbers parameters as it would
for the plain model. So a run goes on with other homes, other slots, another number of ranks, or without Outrider.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.layer import SpreadBlock
from outrider.experts.owners import by_expert, lumped

PARTS = ("gate_up_proj", "down_proj")


class Gather:
    """Brings experts' rows together. only: None, whole on every rank; or the rank that keeps them, in host memory."""

    def __init__(self, only: int | None) -> None:
        self.only = only

    def keeps(self, block: SpreadBlock) -> bool:
        return self.only in (None, block.group.rank())

    def experts(self, mine: Tensor, block: SpreadBlock) -> Tensor:
        """By expert id; all ranks call it."""
        homes, ranks = block.experts.homes_E, range(block.group.size())
        sizes = [int((homes == rank).sum()) for rank in ranks]
        padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in ranks]
        dist.all_gather(everyone, padded, group=block.group)
        if not self.keeps(block):
            return mine[:0]
        by_rank = torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])
        by_id = by_rank[torch.from_numpy(homes.argsort(kind="stable").argsort()).to(mine.device)]
        return by_id if self.only is None else by_id.cpu()

    def rest(self, value: Any) -> Any:
        """What is whole already: a copy, so that all of a checkpoint is of one moment."""
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(value.device if self.only is None else "cpu", copy=True)


def of_model(model: nn.Module, blocks: Mapping[str, SpreadBlock], gather: Gather) -> dict[str, Tensor]:
    """The plain model's state; blocks by name."""
    state = {name: gather.rest(tensor) for name, tensor in model.state_dict().items()}
    for name, block in blocks.items():
        for part in PARTS:
            state[f"{name}.experts.{part}"] = gather.experts(getattr(block.experts, part).detach(), block)
    return state if gather.keeps(next(iter(blocks.values()))) else {}


def into_model(model: nn.Module, blocks: Mapping[str, SpreadBlock], state: Mapping[str, Any]) -> None:
    """Take a plain model's state: each rank its homes' rows. CallerError where it is no such state."""
    mine = dict(state)
    for name, block in blocks.items():
        at = _mine(block)
        for part in PARTS:
            key = f"{name}.experts.{part}"
            want = (len(at), *getattr(block.experts, part).shape[1:])
            if key not in state or tuple(state[key].shape) != want:
                found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
                raise CallerError(
                    f"state: {key} {found}, the plain model's has {want}. Give what balanced.state_dict() or the plain"
                    " model's state_dict() returned; the spread model's own holds one rank's experts."
                )
            mine[key] = state[key][at]
    model.load_state_dict(mine)


def of_optimizer(optimizer: torch.optim.Optimizer, blocks: Sequence[SpreadBlock], gather: Gather) -> dict[str, Any]:
    """The optimizer's state for the plain model. CallerError where a part of it belongs to several experts together."""
    state = optimizer.state_dict()
    owner = owners(optimizer, blocks)
    whole: dict[Any, Any] = {}
    for index, parts in state["state"].items():
        if index in owner:
            parameter, block = owner[index]
            if what := lumped(parts, len(parameter)):
                raise CallerError(
                    f"optimizer: its {what} has no row for each expert, so it depends on who is at home where. Save the"
                    " model alone, or take an optimizer that works element by element."
                )
            experts = {key for key, value in parts.items() if by_expert(value, len(parameter))}
            whole[index] = {
                key: gather.experts(value, block) if key in experts else gather.rest(value)
                for key, value in parts.items()
            }
        else:
            whole[index] = {key: gather.rest(value) for key, value in parts.items()}
    return {**state, "state": whole} if gather.keeps(blocks[0]) else {}


def into_optimizer(optimizer: torch.optim.Optimizer, blocks: Sequence[SpreadBlock], state: Mapping[str, Any]) -> None:
    """Take the plain model's optimizer state: each rank its homes' rows."""
    owner, mine = owners(optimizer, blocks), {}
    for index, parts in state["state"].items():
        at = _mine(owner[index][1]) if index in owner else torch.ones(0, dtype=torch.bool)
        if index in owner and (what := lumped(parts, len(at))):
            raise CallerError(
                f"optimizer state: {what} of parameter {index} has no row for each of {len(at)} experts. Give what"
                " balanced.optimizer_state_dict() or the plain model's optimizer returned."
            )
        mine[index] = {key: _own(value, at) for key, value in parts.items()}
    optimizer.load_state_dict({**state, "state": mine})


def owners(
    optimizer: torch.optim.Optimizer, blocks: Sequence[SpreadBlock]
) -> dict[int, tuple[nn.Parameter, SpreadBlock]]:
    """Experts' parameters by their number in the optimizer's state, which counts through its groups."""
    block_of = {id(p): block for block in blocks for p in block.experts.parameters()}
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: (p, block_of[id(p)]) for index, p in enumerate(numbered) if id(p) in block_of}


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, blocks: Sequence[SpreadBlock]) -> None:
    """CallerError for an optimizer that was made before the model was balanced: it would never change an expert."""
    known = {id(p) for p in model.parameters()}
    strange = any(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    learning = any(block.experts.learns for block in blocks)
    if strange and learning and not owners(optimizer, blocks):
        raise CallerError(
            "optimizer: it holds experts that balance() has replaced, and none that are there now. Make it after"
            " balance(model), from model.parameters()."
        )


def _own(value: Any, at: Tensor) -> Any:
    """The rows at home here, of what lies by expert; a copy of anything else, which torch would share."""
    if by_expert(value, len(at)):
        return value[at]
    return value.clone() if isinstance(value, Tensor) else value


def _mine(block: SpreadBlock) -> Tensor:
    """[experts] bool: at home on this rank."""
    return torch.from_numpy(block.experts.homes_E == block.group.rank())
