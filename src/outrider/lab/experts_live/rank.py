"""One rank of a live run: `python -m outrider.lab.experts_live.rank DIRECTORY RANK RANKS`, started by `run.py`.

DIRECTORY/case.json says what to run; DIRECTORY/rankN.json gets what this rank saw (`Seen`). Every arm is the same
random Qwen3-MoE-shaped model with the same tokens and routes, in a step of a recompute pass (forward only) of all
micro-batches, then an update pass (forward and backward) of all, then gradients home. Weights never change, so every
round is the same work. Arms take turns, from a barrier each; the first round is not counted.

    arm            what it is
    static         nothing is balanced
    outrider       foreseen: host memory for recompute, rank to rank for update; room for all layers' copies
    ring           the same with room for the copies of `case.ring` layers: more is carried, in time
    ring, at once  the same transfers, each waited for where it starts: no overlap
    reactive       nothing foreseen: each layer is planned and fetched when its live gate has decided
    even gate      nothing is balanced and nothing need be: other routes, the limit
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter, sleep
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from outrider.experts.balanced import Balanced, Run, balance
from outrider.experts.bank import Bank
from outrider.experts.events import Stage
from outrider.experts.lane import Job, Lane, Span
from outrider.lab.experts_live.routes import Case, counted, even, routed
from outrider.lab.experts_live.timeline import ABOVE, Figures, figures


class Way(msgspec.Struct, frozen=True):
    """What an arm does."""

    balanced: bool = True
    foreseen: bool = True
    ring: bool = False
    at_once: bool = False
    even: bool = False


ARMS = MappingProxyType(
    {
        "static": Way(balanced=False),
        "outrider": Way(),
        "ring": Way(ring=True),
        "ring, at once": Way(ring=True, at_once=True),
        "reactive": Way(foreseen=False),
        "even gate": Way(balanced=False, even=True),
    }
)
VOCABULARY, HEADS, WATCHDOG_S = 256, 2, 120.0


class Step(msgspec.Struct, frozen=True):
    """One step of one arm, as this rank saw it.

    kept_s        that it was ready and stood in line for a core
    first_ticket  of the lane's jobs in this step
    tickets       that compute waited for on the lane, and when it began and ended to
    """

    arm: str
    turn: int
    seconds: float
    kept_s: float
    figures: Figures
    copies: int
    sent_bytes: int
    spans: list[Span]
    first_ticket: int
    tickets: list[tuple[int, float, float]]


class Seen(msgspec.Struct, frozen=True):
    """What a rank saw.

    loads  by arm [forward passes, layers, ranks]: token-slots computed; losses: summed over ranks, of the update pass
    apart  by arm: the largest difference of a gradient from the static arm's, over that tensor's largest value
    """

    steps: list[Step]
    loads: dict[str, Any]
    losses: dict[str, list[float]]
    apart: dict[str, float]
    expert_bytes: int


class PacedLane(Lane):
    """at_once: no overlap, who puts a job waits for it. job_s: EMULATED, a job sleeps so long besides."""

    def __init__(self, lane: Lane, at_once: bool, job_s: float) -> None:
        super().__init__(torch.device("cpu"), lane.watchdog_s, lane.spans)
        self._at_once, self._job_s = at_once, job_s

    def put(self, what: str, job: Job, layer: int = -1) -> int:
        ticket, begin_s = super().put(what, partial(self._slow, job), layer), perf_counter()
        if self._at_once:
            self.wait(ticket)
            if self.spans is not None:
                self.spans.append(Span("wait", layer, begin_s, perf_counter()))
        return ticket

    def _slow(self, job: Job) -> None:
        job()
        sleep(self._job_s)


class Emulated:
    """EMULATED cost of a bank's experts: asleep for `row_s` a row before its turn is over, twice that in backward."""

    def __init__(self, bank: Bank, row_s: float) -> None:
        self.row_s, self.rows, self._leave = row_s, 0, bank.leave
        bank.register_forward_pre_hook(self._note)
        bank.leave = self.leave

    def leave(self, backward: bool) -> None:
        sleep(self.row_s * self.rows * (2 if backward else 1))
        self._leave(backward)

    def _note(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        self.rows = len(arguments[0])


class Arm:
    """A model of its own, and what it runs in each step."""

    def __init__(self, name: str, case: Case, rank: int, ranks: int) -> None:
        self.name, self.case, way = name, case, ARMS[name]
        self.model = built(case)
        slots, ring = case.slots * way.balanced, case.ring * way.ring
        self.balanced: Balanced = balance(self.model, slots=slots, ring=ring, timeout_s=WATCHDOG_S, timeline=True)
        mover = self.balanced.mover
        mover.lane = PacedLane(mover.lane, way.at_once, case.job_s)
        for block in self.balanced.blocks if case.row_s else ():
            Emulated(block.experts, case.row_s)
        routes = even(case, ranks) if way.even else routed(case, ranks)
        self.counts = counted(routes, case.experts) if way.foreseen else None
        self.routes = torch.from_numpy(routes[:, rank])
        generator = torch.Generator().manual_seed(case.seed + 1 + rank)
        shape = (case.batches, case.tokens // case.length, case.length)
        self.ids = torch.randint(VOCABULARY, shape, generator=generator)
        self.targets = case.batches * ranks * case.tokens
        self.losses = torch.zeros(case.batches)
        self.tickets: list[tuple[int, float, float]] = []
        self._jobs = 0
        self._lane_wait = mover.lane.wait
        mover.lane.wait = self._wait  # type: ignore[method-assign]

    def step(self, turn: int) -> Step:
        """One step, from a barrier on."""
        mover = self.balanced.mover
        assert mover.spans is not None
        self.model.zero_grad()
        mover.spans.clear()
        self.tickets.clear()
        copies, sent_bytes = mover.copies_moved, mover.sent_bytes
        dist.barrier()
        begin_s, before_s = perf_counter(), kept_s()
        with self.balanced.step(self.counts) as run:
            with torch.no_grad():
                self._passes(run, "recompute", lambda _: None)
            self._passes(run, "update", Tensor.backward)
            run.finish_gradients()
        took = perf_counter() - begin_s, kept_s() - before_s
        moved, first = (mover.copies_moved - copies, mover.sent_bytes - sent_bytes), self._jobs + 1
        self._jobs += sum(span.what not in ABOVE for span in mover.spans)
        spans, tickets = list(mover.spans), list(self.tickets)
        return Step(self.name, turn, *took, figures(spans), *moved, spans, first, tickets)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def _passes(self, run: Run, stage: Stage, then: Callable[[Tensor], None]) -> None:
        for m, (ids, routes) in enumerate(zip(self.ids, self.routes, strict=True)):
            with run.micro_step(m, stage, routes=routes):
                logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / self.targets
                then(loss)
            self.losses[m] = loss.detach()

    def _wait(self, ticket: int) -> None:
        begin_s = perf_counter()
        self._lane_wait(ticket)
        if ticket:
            self.tickets.append((ticket, begin_s, perf_counter()))


def built(case: Case) -> Any:
    """A random model of the case's shape, the same on every rank; its dense part is small."""
    torch.manual_seed(case.seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": case.hidden, "moe_intermediate_size": case.inner,
        "num_hidden_layers": case.layers, "num_experts": case.experts, "num_experts_per_tok": case.top_k,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 32,
        "max_position_embeddings": case.length, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).train()


def kept_s() -> float:
    """Seconds that this thread was ready and stood in line for a core (Linux)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def in_line(step: Sequence[Step]) -> float:
    """The largest share of its time that a rank stood in line for a core: behind others, and its own lane."""
    return max(one.kept_s / one.seconds for one in step)


def live(case: Case, rank: int, ranks: int) -> Seen:
    """All arms in turns, once and then until each has enough quiet steps. The group must be there."""
    arms = [Arm(name, case, rank, ranks) for name in ARMS]
    steps: list[Step] = []
    turn, left_s, until_s = 0, case.budget_s, monotonic() + case.budget_s
    calm = dict.fromkeys(ARMS, 0)
    while min(calm.values()) < case.rounds and (turn < 2 or left_s > 0):
        mine = [arm.step(turn) for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]]
        steps += mine if turn else []
        for name in _quiet(mine, case, ranks) if turn else ():
            calm[name] += 1
        turn, left_s = turn + 1, _agreed(until_s - monotonic())
    one, losses, apart = arms[0].gradients(), {}, {}
    for arm in arms:
        dist.all_reduce(arm.losses)
        losses[arm.name], other = arm.losses.tolist(), arm.gradients()
        far = [float((other[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for n, g in one.items()]
        apart[arm.name] = max(far)
    loads = {arm.name: np.stack(arm.balanced.mover.computed_MLR).tolist() for arm in arms}
    copies = arms[0].balanced.mover.copies
    for arm in arms:
        arm.balanced.close()
    return Seen(steps, loads, losses, apart, copies.numel * copies.frames.element_size())


def _quiet(mine: Sequence[Step], case: Case, ranks: int) -> list[str]:
    """The arms to whose step other processes left the machine."""
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, [msgspec.structs.replace(step, spans=[], tickets=[]) for step in mine])
    return [step[0].arm for step in zip(*everyone, strict=True) if in_line(step) <= case.quiet]


def _agreed(mine: float) -> float:
    """What rank 0 has: clocks are read at different moments."""
    said = torch.tensor(mine, dtype=torch.float64)
    dist.broadcast(said, 0)
    return float(said)


def main(directory: Path, rank: int, ranks: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # threads that come later inherit it
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    case = msgspec.json.decode((directory / "case.json").read_bytes(), type=Case)
    begin = partial(dist.init_process_group, "gloo", init_method=f"file://{directory / 'rendezvous'}")
    begin(rank=rank, world_size=ranks, timeout=timedelta(seconds=WATCHDOG_S))
    seen = live(case, rank, ranks)
    (directory / f"rank{rank}.json").write_bytes(msgspec.json.encode(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
