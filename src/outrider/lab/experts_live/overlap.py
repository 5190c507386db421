"""How much of host-to-device copies hides beside expert products: lane, shared memory and frames as the mover has them.

Three wall-clock times, each from an idle device to an idle device: products alone, copies alone, both at once.
hidden = (products + copies - both) / the shorter of them: 1 if one cost nothing beside the other, 0 if they took turns.
On a CPU it runs too, for its tests; a core cannot do both at once, so its figures say nothing. Called by
bench/experts_live.py.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.experts.bank import Bank
from outrider.experts.copies import Copies
from outrider.experts.lane import Lane
from outrider.experts.shared import Shared

ROUNDS, WATCHDOG_S = 7, 60.0


class Shape(msgspec.Struct, frozen=True):
    """A rank's experts, their rows in one forward pass, and how many experts are copied meanwhile (H100: some ms)."""

    hidden: int = 2048
    inner: int = 768
    experts: int = 16
    rows: int = 32768
    copied: int = 32
    dtype: str = "bfloat16"


class Overlap(msgspec.Struct, frozen=True):
    """Seconds of one way to compute and one kind of host memory. gb_s: of the copies alone."""

    products: str
    memory: str
    products_s: float
    copies_s: float
    both_s: float
    hidden: float
    gb_s: float


class Experts(nn.Module):
    """Fused experts with random weights, as Hugging Face has them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": getattr(torch, shape.dtype)}
        self.gate_up_proj = nn.Parameter(torch.randn(shape.experts, 2 * shape.inner, shape.hidden, **like) / 32)
        self.down_proj = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.inner, **like) / 32)
        self.act_fn = F.silu


def overlap(device: torch.device, shape: Shape, group: dist.ProcessGroup) -> list[Overlap]:
    """Products in the bank's loop and as grouped GEMMs; copies from pinned shared memory and from pageable memory.

    group  of this rank alone
    """
    torch.manual_seed(0)
    experts = Experts(shape, device)
    rows = torch.randn(shape.rows, shape.hidden, device=device, dtype=getattr(torch, shape.dtype))
    bank = Bank(experts, np.zeros(shape.experts, dtype=np.int64), 0)
    received = torch.full((1, shape.experts), shape.rows // shape.experts)
    ways = {"loop": partial(_looped, bank, rows, received), "grouped_mm": partial(grouped, experts, rows, received[0])}
    copies = Copies(shape.copied, bank.shapes, rows)
    lane = Lane(device, WATCHDOG_S)
    found = []
    shared = _shared(shape, copies, rows, group)
    plain = torch.randn(copies.numel).to(rows.dtype)

    def pull() -> None:
        for expert, frame in enumerate(copies.frames):
            shared.pull(0, expert, frame)

    def load() -> None:
        for frame in copies.frames:
            frame.copy_(plain, non_blocking=True)

    for memory, job in (("shared, pinned", pull), ("pageable", load)):
        for products, compute in ways.items():
            one_s, other_s, both_s = _timed(device, lane, compute, job)
            hidden = (one_s + other_s - both_s) / min(one_s, other_s)
            gb_s = copies.frames.nbytes / other_s / 1e9
            found.append(Overlap(products, memory, one_s, other_s, both_s, hidden, gb_s))
    shared.close()
    lane.close()
    return found


def _timed(device: torch.device, lane: Lane, compute: Callable[[], Any], job: Callable[[], None]) -> list[float]:
    """Medians: products alone, copies alone, both."""
    seconds: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS + 1):
        for kind in range(3):
            _settle(device)
            begin_s = perf_counter()
            if kind > 0:
                lane.put("weights, host", job)
            if kind != 1:
                compute()
            lane.drain()
            _settle(device)
            seconds[kind].append(perf_counter() - begin_s)
    return [median(took[1:]) for took in seconds]  # the first warmed up


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _looped(bank: Bank, rows: Tensor, received: Tensor) -> Tensor:
    result: Tensor = bank(rows, received)
    return result


@torch.no_grad()
def grouped(experts: Experts, rows: Tensor, rows_of: Tensor) -> Tensor:
    """The same experts on rows that lie by expert, as two grouped GEMMs."""
    ends = rows_of.cumsum(0).to(rows.device, torch.int32)
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)


def _shared(shape: Shape, copies: Copies, like: Tensor, group: dist.ProcessGroup) -> Shared:
    """Shared memory with as many experts in it as are copied."""
    shared = Shared(group, np.zeros(1, dtype=np.int64), copies.numel, like)
    shared.begin(np.array([(0, expert, 0, 0) for expert in range(shape.copied)], dtype=np.int64))
    for expert in range(shape.copied):
        shared.put(0, expert, torch.randn(copies.numel).to(like.dtype))
    return shared
