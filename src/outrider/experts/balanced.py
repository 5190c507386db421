"""One call that balances a Hugging Face MoE model on the ranks of a group. Not pure; called by training loops.

    balanced = outrider.experts.balance(model, slots=2)
    optimizer = torch.optim.AdamW(model.parameters())    # after balance: experts that live elsewhere are gone
    with balanced.step(counts_MLRE) as run:              # foreseen; or a plan; or (): the live gate is asked
        for m, batch in enumerate(micro_batches):
            with run.micro_step(m):
                loss(model(batch)).backward()
        run.finish_gradients()                           # copies' gradients home, dense ones summed over ranks
    balanced.clip_grad_norm_(1.0)                        # over all ranks; torch's own sees one rank's experts
    optimizer.step()

Every rank does the same, also one whose batch is empty (see `real`). The model runs once in a micro-step, or say so.
Several may be in flight: `run.forward(m)` and, later, `run.backward(m)` in any order that all ranks share (1F1B).
Gradients are sums over ranks, so a loss is divided by the tokens of all ranks, not by this rank's. Checkpoints are the
plain model's: `balanced.state_dict()`, `balanced.optimizer_state_dict(optimizer)`, and `load_` before either.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from outrider.errors import CallerError
from outrider.experts.checkpoint import (
    PARTS,
    Gather,
    check_optimizer,
    into_model,
    into_optimizer,
    of_model,
    of_optimizer,
)
from outrider.experts.dense import Dense, equal
from outrider.experts.events import Array, Began, Foreseen, Pass, Stage
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
        self.model, self.blocks, self.mover = model, blocks, mover
        self.dense = Dense(model, blocks)
        self.under_way: Run | None = None
        self._by_name = dict(zip(names, blocks, strict=True))

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
        Gradients that are there are added to, as ever: call zero_grad before, or accumulate over several steps.
        Raises CallerError at the end if `finish_gradients` was not called.
        """
        if self.under_way is not None:
            raise CallerError(
                "step: the one before has not ended, and its copies would be stale. Call run.finish_gradients() in it;"
                " after an error in its middle build the model anew and load a checkpoint."
            )
        if optimizer is not None:
            check_optimizer(optimizer, self.model, self.blocks)
        if foreseen is None:
            self.mover.begin()
        elif isinstance(foreseen, StepPlan):
            self.mover.follow(foreseen, passes, optimizer)
        else:
            self.mover.foresee(_table(foreseen), passes)
        self.dense.keep_once()
        run = self.under_way = Run(self, foreseen is not None)
        yield run
        if not run.finished:
            raise CallerError("step: copies still hold gradients. Call run.finish_gradients() after the last backward.")

    @property
    def homes(self) -> Array:
        """[layers, experts] the home rank of each expert now: what a search for the next plan begins from."""
        return self.mover.policy.homes_LE

    def sum_dense_gradients(self) -> None:
        """Add up over ranks the gradients of all that is whole on every rank, in the order of parameters.

        CallerError, naming the first, where such parameters are not the same on all ranks any more.
        """
        self.dense.sum_gradients()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, over the gradients of all ranks: their 2-norm before, the same everywhere.

        Call it after finish_gradients, on all ranks. torch's own sees one rank's experts and lets ranks drift apart.
        """
        self._check_between("clip_grad_norm_")
        total = self.dense.norm()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, total)
        return total

    def state_dict(self, only: int | None = None) -> dict[str, Tensor]:
        """The model's state as if it had never been spread; all ranks must call it.

        only  None: whole on every rank; or the one rank of the group that gets it, in host memory, the others {}
        For Hugging Face's files: `model.save_pretrained(path, state_dict=balanced.state_dict())`.
        """
        return of_model(self.model, self._by_name, Gather(only))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a whole state, of any plan, number of ranks or of the plain model: each rank keeps its homes.

        CallerError where the state is not whole, or in the middle of a step.
        """
        self._check_between("load_state_dict")
        into_model(self.model, self._by_name, state)

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer, only: int | None = None) -> dict[str, Any]:
        """What optimizer.state_dict() would be for the plain model, made with the same parameters in the same order.

        only  as in `state_dict`
        CallerError for an optimizer whose state has no row for each expert (some quantised ones).
        """
        check_optimizer(optimizer, self.model, self.blocks)
        return of_optimizer(optimizer, self.blocks, Gather(only))

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take an optimizer's state of any plan, any number of ranks, or of the plain model; between steps."""
        self._check_between("load_optimizer_state_dict")
        check_optimizer(optimizer, self.model, self.blocks)
        into_optimizer(optimizer, self.blocks, state)

    def close(self) -> None:
        """Let go of threads, of shared memory and of the journal.

        The process groups stay: torch names a new group by how many there are, and one that takes an old one's name
        would find its addresses in the store.
        """
        self.mover.close()

    def _check_between(self, what: str) -> None:
        if self.under_way is not None:
            raise CallerError(f"{what}: a step is under way, and copies would be stale. Call it between two steps.")


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
        if stage not in ("recompute", "update"):
            raise CallerError(
                f"micro_step: no stage {stage!r}. Give recompute or update; a half of an update is run.forward(m) or"
                " run.backward(m)."
            )
        mover = self._balanced.mover
        self._replay(*self._given(routes, real))
        try:
            with mover.micro_step(stage, batch, several) if self._foreseen else mover.react(stage):
                yield
        finally:
            self._replay(None, None)

    @contextmanager
    def forward(self, batch: int, routes: Tensor | None = None, real: Tensor | None = None) -> Iterator[None]:
        """The forward pass of an update goes inside; its `backward` follows, other passes may come between."""
        self._check(batch, in_flight=True)
        if batch in self._replayed:
            raise CallerError(f"forward of micro-batch {batch}: it is in flight already. Run its backward first.")
        self._replayed[batch] = self._given(routes, real)
        self._replay(*self._replayed[batch])
        try:
            with self._balanced.mover.micro_step("forward", batch):
                yield
        finally:
            self._replay(None, None)

    @contextmanager
    def backward(self, batch: int) -> Iterator[None]:
        """The backward pass of an earlier `forward` goes inside. CallerError if there was none."""
        self._check(batch, in_flight=True)
        if batch not in self._replayed:
            raise CallerError(f"backward of micro-batch {batch}: it is not in flight. Run its forward first, once.")
        self._replay(*self._replayed.pop(batch))
        try:
            with self._balanced.mover.micro_step("backward", batch):
                yield
        finally:
            self._replay(None, None)

    def finish_gradients(self, sum_dense: bool = True) -> None:
        """Copies' gradients go home. sum_dense False: something else adds up the dense ones (DDP, by a hook that sums).

        CallerError where a micro-batch is in flight, or where bitwise mode is to leave the sum to something else.
        """
        if self.finished:
            raise CallerError("finish_gradients: the gradients are home already. Call it once a step.")
        if self._replayed:
            raise CallerError(
                f"finish_gradients: micro-batches {sorted(self._replayed)} are in flight. Run their backward first."
            )
        if not sum_dense and self._balanced.mover.exact:
            raise CallerError("finish_gradients: bitwise mode adds up routers' gradients itself. Leave sum_dense out.")
        self._replay(None, None)
        self._balanced.mover.finish()
        self.finished, self._balanced.under_way = True, None
        if sum_dense:
            self._balanced.sum_dense_gradients()

    def _check(self, batch: int, in_flight: bool = False) -> None:
        if self.finished:
            raise CallerError(f"micro-batch {batch}: the gradients are home already. Begin a new step.")
        if in_flight and not self._foreseen:
            raise CallerError(
                f"micro-batch {batch}: without foresight a micro-step ends before the next begins. Use micro_step."
            )

    def _given(self, routes: Any, real: Any) -> tuple[Tensor | None, Tensor | None]:
        """As tensors: routes of this model, real as a flat mask."""
        blocks = self._balanced.blocks
        if routes is not None:
            routes = torch.as_tensor(routes)
            want = (len(blocks), getattr(blocks[0].gate, "top_k", routes.shape[-1] if routes.ndim else 0))
            if routes.ndim != 3 or tuple(routes.shape[1:]) != want or routes.is_floating_point():
                raise CallerError(
                    f"routes: {routes.dtype} of shape {tuple(routes.shape)}. Give ids [tokens, {want[0]}, {want[1]}]"
                    ": of this rank's tokens, for each MoE layer (dense layers left out) its top-k ids."
                )
            experts = len(blocks[0].homes)
            if routes.numel() and int(routes.max()) >= experts:
                raise CallerError(
                    f"routes: holds expert {int(routes.max())}, the limit is {experts - 1}. Is it another model's"
                    " table?"
                )
        return routes, None if real is None else torch.as_tensor(real).reshape(-1).bool()

    def _replay(self, routes: Tensor | None, real: Tensor | None) -> None:
        for layer, block in enumerate(self._balanced.blocks):
            block.replay(None if routes is None else routes[:, layer], real)


def _table(foreseen: Any) -> Array:
    """counts_MLRE, from whatever holds it."""
    table: Array = foreseen.cpu().numpy() if isinstance(foreseen, Tensor) else np.asarray(foreseen)
    if table.dtype.kind not in "iu":
        raise CallerError(
            f"counts: {table.dtype} of shape {table.shape}. Give a plan, or integers [micro-batches, layers, ranks,"
            " experts] as outrider.experts.counts makes them."
        )
    return table


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
    Raises CallerError for a model without fused experts, for one whose blocks have parts that cannot be spread, and for
    one that is not the same on all ranks.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise CallerError("balance: no process group. Call torch.distributed.init_process_group first.")
    if slots < 0 or block_rows < 1:
        raise CallerError(f"balance: slots {slots}, block_rows {block_rows}. Give 0 or more, and 1 or more.")
    if timeout_s <= 0:
        raise CallerError(f"balance: timeout_s {timeout_s}. Give the seconds after which a silent rank counts as lost.")
    if "gloo" not in str(dist.get_backend_config(group)):
        raise CallerError(
            f"balance: a group of {dist.get_backend_config(group)} alone; what ranks tell each other lies on the host."
            ' Call init_process_group("cpu:gloo,cuda:nccl").'
        )
    if any(isinstance(module, SpreadBlock) for module in model.modules()):
        raise CallerError(
            "balance: this model is balanced already. Use what balance returned, or give the plain model."
        )
    experts = _experts_of(model)
    ranks, limit = dist.get_process_group_ranks(group), timedelta(seconds=timeout_s)
    _even_out_groups(group)
    tokens, control, lane = (dist.new_group(ranks, timeout=limit, use_local_synchronization=True) for _ in range(3))
    equal(list(model.named_parameters()), tokens)
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
    _compile(settings)
    mover = Mover(Policy(settings), blocks, control, lane, journal, watchdog_s=timeout_s, timeline=timeline)
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment] # or DDP would give all ranks rank 0's experts
        f"{name}.experts.{part}" for name in names for part in PARTS
    ]
    return Balanced(model, blocks, mover, names)


def _compile(settings: Settings) -> None:
    """Before the first exchange, so that no rank's watchdog counts it."""
    policy = Policy(settings)
    nothing = np.zeros((1, settings.layers, settings.ranks, settings.experts), dtype=np.int64)
    for event in (Foreseen(nothing), Began("update", 0)):
        policy.handle(event, 0)


def _even_out_groups(group: dist.ProcessGroup) -> None:
    """Torch names a new group by how many a rank is in: where that differs, ranks would wait for different ones."""
    made: list[Any] = [None] * group.size()
    dist.all_gather_object(made, len(dist.distributed_c10d._world.pg_names), group=group)
    for _ in range(max(made) - made[group.rank()]):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


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
    if not counts:
        raise CallerError(
            f"{type(model).__name__}: no MoE block with fused experts. Give a Hugging Face model of one of the families"
            " Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V3."
        )
    if len(counts) > 1:
        raise CallerError(
            f"{type(model).__name__}: blocks of {sorted(counts)} experts. Give a model with one number of them."
        )
    return int(counts.pop())
