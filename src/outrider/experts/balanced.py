"""One call that balances a Hugging Face MoE model on the ranks of a group. Not pure; called by training loops.

    balanced = outrider.experts.balance(model, slots=2)
    optimizer = torch.optim.AdamW(model.parameters())    # after balance: experts that live elsewhere are gone
    with balanced.step(counts_MLRE) as run:              # foreseen; or a plan; or (): the live gate is asked
        for m, batch in enumerate(micro_batches):
            with run.micro_step(m):
                loss(model(batch)).backward()
        run.finish_gradients()                           # copies' gradients home, dense ones summed over ranks
    optimizer.step()

Every rank does the same, also one whose batch is empty (see `real`). The model runs once in a micro-step, or say so.
Several may be in flight: `run.forward(m)` and, later, `run.backward(m)` in any order that all ranks share (1F1B).
Gradients are sums over ranks, so a loss is divided by the tokens of all ranks, not by this rank's.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.events import Array, Pass, Stage
from outrider.experts.layer import SpreadBlock, spread
from outrider.experts.move import Mover
from outrider.experts.plan import contiguous_homes
from outrider.experts.policy import Policy, Settings
from outrider.experts.schedule import StepPlan

BLOCK_ROWS = 32  # token-slots of a block in bitwise mode
TIMEOUT_S = 600.0


class Balanced:
    """A model whose MoE blocks are spread and balanced. blocks: by layer; mover: what was moved and computed."""

    def __init__(self, model: nn.Module, blocks: list[SpreadBlock], mover: Mover, names: list[str]) -> None:
        self.model, self.blocks, self.mover, self._names = model, blocks, mover, names

    @contextmanager
    def step(
        self,
        foreseen: Array | StepPlan | None = None,
        passes: Sequence[Pass] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Iterator["Run"]:
        """One optimizer step.

        foreseen   counts_MLRE: token-slots by micro-batch, layer, source rank and expert; or a plan; None: unknown
        passes     the order in which micro-batches will run, where it is not the plain one: what comes is fetched ahead
        optimizer  whose state goes along, where a plan gives experts new homes
        Raises CallerError at the end if gradients were computed and `finish_gradients` was not called.
        """
        run = Run(self, foreseen is not None)
        if foreseen is None:
            self.mover.begin()
        elif isinstance(foreseen, StepPlan):
            self.mover.follow(foreseen, passes, optimizer)
        else:
            self.mover.foresee(foreseen, passes)
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
        by_rank = torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])
        return by_rank[torch.from_numpy(homes.argsort(kind="stable").argsort())]  # by expert id again


class Run:
    """One step under way."""

    def __init__(self, balanced: Balanced, foreseen: bool) -> None:
        self._balanced, self._foreseen, self.finished = balanced, foreseen, False
        self._replayed: dict[int, tuple[Tensor | None, Tensor | None]] = {}  # of micro-batches in flight

    @contextmanager
    def micro_step(
        self,
        batch: int,
        stage: Stage = "update",
        routes: Tensor | None = None,
        real: Tensor | None = None,
        several: bool = False,
    ) -> Iterator[None]:
        """Forward and backward of micro-batch `batch` go inside.

        stage    "recompute" if it has no backward pass
        routes   [tokens, layers, top_k] recorded expert ids, replayed; rows with a negative id, and None: the live gate
        real     [tokens] bool, False for padding, which experts do not compute; a rank without tokens feeds one such
        several  the model runs more than once inside; what follows is then fetched at the end only
        """
        self._check(batch)
        mover = self._balanced.mover
        self._replay(routes, real)
        with mover.micro_step(stage, batch, several) if self._foreseen else mover.react(stage):
            yield
        self._replay(None, None)

    @contextmanager
    def forward(self, batch: int, routes: Tensor | None = None, real: Tensor | None = None) -> Iterator[None]:
        """The forward pass of an update goes inside; its `backward` follows, other passes may come between."""
        self._check(batch, in_flight=True)
        self._replayed[batch] = routes, real
        self._replay(routes, real)
        with self._balanced.mover.micro_step("forward", batch):
            yield

    @contextmanager
    def backward(self, batch: int) -> Iterator[None]:
        """The backward pass of an earlier `forward` goes inside. CallerError if there was none."""
        self._check(batch, in_flight=True)
        if batch not in self._replayed:
            raise CallerError(f"backward of micro-batch {batch}: it is not in flight. Run its forward first, once.")
        self._replay(*self._replayed.pop(batch))
        with self._balanced.mover.micro_step("backward", batch):
            yield

    def finish_gradients(self, sum_dense: bool = True) -> None:
        """Copies' gradients go home. sum_dense False: something else (DDP) sums the dense ones, not the experts'."""
        self._replay(None, None)
        self._balanced.mover.finish()
        self.finished = True
        if sum_dense:
            self._balanced.sum_dense_gradients()

    def _check(self, batch: int, in_flight: bool = False) -> None:
        if self.finished:
            raise CallerError(f"micro-batch {batch}: the gradients are home already. Begin a new step.")
        if in_flight and not self._foreseen:
            raise CallerError(
                f"micro-batch {batch}: without foresight a micro-step ends before the next begins. Use micro_step."
            )

    def _replay(self, routes: Tensor | None, real: Tensor | None) -> None:
        for layer, block in enumerate(self._balanced.blocks):
            block.replay(None if routes is None else routes[:, layer], real)


def balance(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    slots: int = 2,
    *,
    ring: int = 0,
    recompute: str = "host",
    update: str = "direct",
    bitwise: bool = False,
    block_rows: int = BLOCK_ROWS,
    journal: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    timeline: bool = False,
) -> Balanced:
    """Spread the experts of `model`, which must be equal on all ranks, over `group`, and balance every micro-step.

    group       the ranks; None: all. Tokens, weights and words of control get a group each: nothing comes between
    slots       copies that a rank may use in each layer; 0: nothing is balanced
    ring        layers whose copies are held at once, each `slots` experts' memory; 0: all, and one to fetch ahead
    recompute, update  the path of weights in these stages: direct (rank to rank), host (out of memory that the ranks
                of a machine share: needs no sender); host is direct where a machine's ranks do not stand together
    bitwise     same bits for every plan and number of ranks in experts, routers and their inputs; slower
    block_rows  bitwise mode: token-slots of a block, to be the same in runs that are compared
    timeout_s   of each exchange: a rank that died or keeps silent is a WorldError on all others after so long at most
    timeline    keep mover.spans, what ran and what was carried when
    Raises CallerError for a model without fused experts, and for one whose blocks have parts that cannot be spread.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise CallerError("balance: no process group. Call torch.distributed.init_process_group first.")
    if slots < 0 or block_rows < 1:
        raise CallerError(f"balance: slots {slots}, block_rows {block_rows}. Give 0 or more, and 1 or more.")
    experts = _experts_of(model)
    ranks, limit = dist.get_process_group_ranks(group), timedelta(seconds=timeout_s)
    tokens, control, lane = (dist.new_group(ranks, timeout=limit, use_local_synchronization=True) for _ in range(3))
    blocks = spread(model, contiguous_homes(experts, len(ranks)), tokens, block_rows if bitwise else 0)
    name_of = {id(module): name for name, module in model.named_modules()}
    names = [name_of[id(block)] for block in blocks]
    per_node = _ranks_per_node(control)
    settings = Settings(
        layers=len(blocks),
        experts=experts,
        ranks=len(ranks),
        slots=slots,
        ring=ring,
        ranks_per_node=per_node or 1,
        recompute=recompute if per_node else "direct",
        update=update if per_node else "direct",
    )
    mover = Mover(Policy(settings), blocks, control, lane, journal, watchdog_s=timeout_s, timeline=timeline)
    return Balanced(model, blocks, mover, names)


def _ranks_per_node(group: dist.ProcessGroup) -> int:
    """How many ranks share a machine; 0 where they do not stand together, or not equally many."""
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, platform.node(), group=group)
    runs = [len(list(run)) for _, run in groupby(hosts)]
    return runs[0] if len(set(runs)) == 1 and len(runs) == len(set(hosts)) else 0


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
