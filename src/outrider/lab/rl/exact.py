"""The learning of `learn.py` on several ranks, to the bit as on one. Started once a rank; see tests/lab/rl.

Experts and routers keep their bits by Outrider's bitwise mode. Here the rest does:
- every dense part (embedding, norms, attention, head) computes one sequence at a time, in one fixed shape, so a
  sequence's numbers do not depend on what lies beside it, or on which rank;
- each sequence's dense gradients are kept apart, and added up in the order of sequences, whoever computed them;
- rollouts come from a plain copy of the model, the same on every rank, that is given the trained weights after each
  step, as an engine is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from outrider.experts import balance, foresee
from outrider.lab.rl.learn import Engine, Recipe, accumulate, batches_of, model_of, optimizer_of, packed, warm_up
from outrider.lab.rl.micro_batch import MicroBatch
from outrider.lab.rl.rollouts import Rollout


class Rows:
    """The dense parts of a model, sequence by sequence. gradients: flat, by number of the sequence in the step."""

    def __init__(self, model: nn.Module) -> None:
        self.dense: list[nn.Parameter] = []
        self.gradients: dict[int, Tensor] = {}
        self._copies: list[dict[int, Tensor]] = []
        self._wrap(model)

    def _wrap(self, parent: nn.Module) -> None:
        """Replace the largest parts that hold parameters and no experts."""
        for name, child in parent.named_children():
            if is_block(child):
                continue
            if any(map(is_block, child.modules())):
                self._wrap(child)
            elif parameters := list(child.parameters()):
                self.dense += parameters
                setattr(parent, name, Rowwise(child, self))

    @contextmanager
    def micro_batch(self, sequences: Sequence[int]) -> Iterator[None]:
        """Forward and backward of these sequences, one a row, go inside; without any, of one row of padding."""
        self._copies = [
            {id(p): p.detach().clone().requires_grad_() for p in self.dense} for _ in range(max(1, len(sequences)))
        ]
        yield
        for sequence, copies in zip(sequences, self._copies, strict=False):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in copies.values()]
            self.gradients[sequence] = torch.cat([part.flatten() for part in parts])

    def copy(self, row: int, parameter: nn.Parameter) -> Tensor:
        return self._copies[row][id(parameter)]

    def settle(self, sequences: int, group: dist.ProcessGroup) -> None:
        """The dense gradients of the step: those of sequence 0, 1, ... added up in this order, the same everywhere."""
        everyone = torch.zeros(sequences, sum(p.numel() for p in self.dense))
        for sequence, flat in self.gradients.items():
            everyone[sequence] = flat
        dist.all_reduce(everyone, group=group)  # each row is one rank's, and zero elsewhere: nothing is rounded
        total = torch.zeros_like(everyone[0])
        for flat in everyone:
            total += flat
        parts = torch.split(total, [p.numel() for p in self.dense])
        for parameter, part in zip(self.dense, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self.gradients = {}


class Rowwise(nn.Module):
    """A dense part of the model, called row by row, each row with its own copy of the parameters; names stay."""

    def __init__(self, whole: nn.Module, rows: Rows) -> None:
        super().__init__()
        self._parameters, self._modules = whole._parameters, whole._modules
        self._whole, self._rows = [whole], rows  # in a list: no child of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        everything, *rest = args or (kwargs.pop("hidden_states"),)  # Hugging Face's attention is called by name
        outputs = []
        for row, one in enumerate(everything.unbind(0)):
            copies = {name: self._rows.copy(row, p) for name, p in self._whole[0].named_parameters()}
            alone = one[None].clone()  # alignment too changes a product's bits
            outputs.append(functional_call(self._whole[0], copies, (alone, *rest), kwargs))
        if isinstance(outputs[0], tuple):  # attention, with its weights
            return torch.cat([aligned(output[0]) for output in outputs]), None
        return torch.cat([aligned(output) for output in outputs])


def aligned(output: Tensor) -> Tensor:
    """As it is; its gradient arrives in memory of its own."""
    if output.requires_grad:
        output.register_hook(torch.clone)  # type: ignore[no-untyped-call]
    return output


def is_block(module: nn.Module) -> bool:
    return hasattr(module, "gate") and hasattr(module, "experts")


def foreseen(rollouts: Sequence[Rollout], runs: Sequence[Sequence[range]], experts: int) -> Any:
    """counts_MLRE of the step, from the routes that the engine recorded. runs: sequences by micro-batch and rank."""
    lengths = np.array([len(r.tokens) - 1 for r in rollouts])
    whose = [(m, rank) for m, by_rank in enumerate(runs) for rank, run in enumerate(by_rank) for _ in run]
    batch, source = np.repeat(np.array(whose), lengths, axis=0).T
    routes = np.concatenate([r.routes[:-1] for r in rollouts])
    return foresee(routes, batch, source, experts, len(runs[0]), len(runs))


class ExactLearner:
    """One rank of the learning. slots 0: nothing is balanced."""

    def __init__(self, recipe: Recipe, group: dist.ProcessGroup, slots: int) -> None:
        rng, self.recipe, self.group = np.random.default_rng(recipe.seed), recipe, group
        model = model_of(recipe)
        warm_up(model, recipe, rng)  # before it is spread: the same on every rank
        self.engine = Engine(model_of(recipe), recipe, rng)
        self.balanced = balance(model, group, slots, bitwise=True)
        self.rows = Rows(model)
        self.optimizer = optimizer_of(model, recipe.rate)
        self.engine.model.load_state_dict(self.balanced.state_dict())

    def step(self) -> list[Rollout]:
        """One RL step; afterwards weights are trained and the engine has them."""
        rank, ranks, recipe = self.group.rank(), self.group.size(), self.recipe
        rollouts = self.engine.roll_out()
        runs = packed(len(rollouts), recipe, ranks)
        self.optimizer.zero_grad()
        with self.balanced.step(foreseen(rollouts, runs, recipe.experts)) as run:

            @contextmanager
            def replaying(m: int, batch: MicroBatch) -> Iterator[None]:
                routed = run.micro_step(m, "update", batch.routes, batch.real.flatten())
                with routed, self.rows.micro_batch(runs[m][rank]):
                    yield

            batches = batches_of(rollouts, recipe, rank, ranks)
            accumulate(batches, replaying, lambda batch: batch.loss(self.balanced.model))
            run.finish_gradients()
        self.rows.settle(len(rollouts), self.group)
        self.optimizer.step()
        self.engine.model.load_state_dict(self.balanced.state_dict())
        return rollouts
