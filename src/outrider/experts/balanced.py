"""One call that balances a Hugging Face MoE model on the ranks of a group. Not pure; called by training loops.

    balanced = outrider.experts.balance(model, slots=2)
    optimizer = torch.optim.AdamW(model.parameters())    # after balance: experts that live elsewhere are gone
    with balanced.step(counts_MLRE) as run:              # foreseen; or step(), and every layer asks its live gate
        for m, batch in enumerate(micro_batches):
            with run.micro_step(m):
                loss(model(batch)).backward()
        run.finish_gradients()                           # copies' gradients home, dense ones summed over ranks
    optimizer.step()

Every rank does the same, also one whose batch is empty (see `real`). A micro-step ends before the next begins.
Gradients are sums over ranks, so a loss is divided by the tokens of all ranks, not by this rank's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.events import Array, Stage
from outrider.experts.layer import SpreadBlock, spread
from outrider.experts.move import Mover
from outrider.experts.plan import contiguous_homes
from outrider.experts.policy import Policy, Settings

BLOCK_ROWS = 32  # token-slots of a block in bitwise mode
TIMEOUT_S = 600.0


class Balanced:
    """A model whose MoE blocks are spread and balanced. blocks: by layer; mover: what was moved and computed."""

    def __init__(self, model: nn.Module, blocks: list[SpreadBlock], mover: Mover, names: list[str]) -> None:
        self.model, self.blocks, self.mover, self._names = model, blocks, mover, names

    @contextmanager
    def step(self, counts_MLRE: Array | None = None) -> Iterator["Run"]:
        """One optimizer step. counts_MLRE: token-slots by micro-batch, layer, source rank and expert; None: unknown.

        Raises CallerError at the end if gradients were computed and `finish_gradients` was not called.
        """
        run = Run(self, counts_MLRE is not None)
        if counts_MLRE is None:
            self.mover.begin()
        else:
            self.mover.foresee(counts_MLRE)
        yield run
        if not run.finished:
            raise CallerError("step: copies still hold gradients. Call run.finish_gradients() after the last backward.")

    def sum_dense_gradients(self) -> None:
        """Add up over ranks the gradients of all that is whole on every rank, in the order of parameters."""
        spread_out = {id(p) for block in self.blocks for p in block.experts.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in spread_out and parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.blocks[0].group)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state as if it had never been spread, whole on every rank; all ranks must call it."""
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        for name, block in zip(self._names, self.blocks, strict=True):
            for part in ("gate_up_proj", "down_proj"):
                state[f"{name}.experts.{part}"] = self._gathered(getattr(block.experts, part).detach(), block)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a whole state, of any plan, number of ranks or of the plain model: each rank keeps its homes."""
        mine = dict(state)
        for name, block in zip(self._names, self.blocks, strict=True):
            at = torch.from_numpy(block.experts.homes_E == block.group.rank())
            for part in ("gate_up_proj", "down_proj"):
                mine[f"{name}.experts.{part}"] = state[f"{name}.experts.{part}"][at]
        self.model.load_state_dict(mine)

    def close(self) -> None:
        """Close the journal."""
        self.mover.close()

    @staticmethod
    def _gathered(mine: Tensor, block: SpreadBlock) -> Tensor:
        homes, ranks = block.experts.homes_E, range(block.group.size())
        sizes = [int((homes == rank).sum()) for rank in ranks]
        padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in ranks]
        dist.all_gather(everyone, padded, group=block.group)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


class Run:
    """One step under way."""

    def __init__(self, balanced: Balanced, foreseen: bool) -> None:
        self._balanced, self._foreseen, self.finished = balanced, foreseen, False

    @contextmanager
    def micro_step(
        self, batch: int, stage: Stage = "update", routes: Tensor | None = None, real: Tensor | None = None
    ) -> Iterator[None]:
        """Forward and backward of micro-batch `batch` go inside.

        stage   "recompute" if it has no backward pass
        routes  [tokens, layers, top_k] recorded expert ids, replayed; rows with a negative id, and None: the live gate
        real    [tokens] bool, False for padding, which experts do not compute; a rank without tokens feeds one such
        """
        if self.finished:
            raise CallerError(f"micro-batch {batch}: the gradients are home already. Begin a new step.")
        for layer, block in enumerate(self._balanced.blocks):
            block.replay(None if routes is None else routes[:, layer], real)
        with self._balanced.mover.micro_step(stage, batch) if self._foreseen else self._balanced.mover.react(stage):
            yield
        for block in self._balanced.blocks:
            block.replay(None, None)

    def finish_gradients(self, sum_dense: bool = True) -> None:
        """Copies' gradients go home. sum_dense False: something else (DDP) sums the dense ones, not the experts'."""
        self._balanced.mover.finish()
        self.finished = True
        if sum_dense:
            self._balanced.sum_dense_gradients()


def balance(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    slots: int = 2,
    *,
    bitwise: bool = False,
    block_rows: int = BLOCK_ROWS,
    journal: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Balanced:
    """Spread the experts of `model`, which must be equal on all ranks, over `group`, and balance every micro-step.

    group       the ranks; None: all. Tokens and weights get a group each, so that nothing else comes between
    slots       copies that a rank may hold in each layer; 0: nothing is balanced
    bitwise     same bits for every plan and number of ranks in experts, routers and their inputs; slower
    block_rows  bitwise mode: token-slots of a block, to be the same in runs that are compared
    timeout_s   of each exchange: a rank that died or keeps silent is a WorldError on all others after so long at most
    Raises CallerError for a model without fused experts, and for one whose blocks have parts that cannot be spread.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise CallerError("balance: no process group. Call torch.distributed.init_process_group first.")
    if slots < 0 or block_rows < 1:
        raise CallerError(f"balance: slots {slots}, block_rows {block_rows}. Give 0 or more, and 1 or more.")
    experts = _experts_of(model)
    ranks, limit = dist.get_process_group_ranks(group), timedelta(seconds=timeout_s)
    tokens_group: Any = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    weights_group: Any = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    blocks = spread(model, contiguous_homes(experts, len(ranks)), tokens_group, block_rows if bitwise else 0)
    name_of = {id(module): name for name, module in model.named_modules()}
    names = [name_of[id(block)] for block in blocks]
    policy = Policy(Settings(layers=len(blocks), experts=experts, ranks=len(ranks), slots=slots))
    return Balanced(model, blocks, Mover(policy, blocks, weights_group, journal), names)


def _experts_of(model: nn.Module) -> int:
    """How many experts each block has. CallerError where blocks differ or there are none."""
    counts = {
        module.gate_up_proj.shape[0]
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "experts" and hasattr(module, "gate_up_proj")
    }
    if len(counts) != 1:
        raise CallerError(
            f"{type(model).__name__}: blocks of {sorted(counts)} fused experts. Give a model with one number."
        )
    return int(counts.pop())
