"""Experts on a device: the lane's stream, pinned shared memory, frames and their gradients, a whole balanced step."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from outrider.experts.balanced import balance
from outrider.experts.bank import Bank
from outrider.experts.copies import Copies
from outrider.experts.lane import Lane
from outrider.experts.shared import Shared
from outrider.lab.experts_live.overlap import Shape, overlap
from outrider.lab.experts_live.rank import built
from outrider.lab.experts_live.routes import Case, counted, routed

EXPERTS, HIDDEN, INNER, ROWS = 4, 48, 32, 37
TOLERANCE = 1e-4  # fp32, of a tensor's largest value
LONG = 2_000_000_000  # clock cycles that a kernel sleeps: about a second


class Stock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / 5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / 5)
        self.act_fn = nn.functional.silu


def close(one: Tensor, other: Tensor) -> None:
    one, other = one.detach().cpu(), other.detach()
    assert float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max())


def test_a_copy_pulled_by_the_lane_computes_and_learns_as_at_home(device: torch.device, group: Any) -> None:
    """Experts 2 and 3 live elsewhere; this rank pulls them into frames and computes their rows."""
    stock, received = Stock(), torch.tensor([[9, 0, 11, 17]])
    rows, back = (torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    alone = Bank(stock, np.zeros(EXPERTS, dtype=np.int64), 0)  # on the CPU, all at home
    before = rows.clone().requires_grad_()
    expected = alone(before, received)
    expected.backward(back)

    bank = Bank(stock.to(device), np.array([0, 0, 1, 1]), 0)
    copies = bank.copies = Copies(2, bank.shapes, bank.gate_up_proj)
    bank.leave = lambda _: copies.leave(0)
    lane = Lane(device, 60.0)
    shared = Shared(group, np.zeros(1, dtype=np.int64), copies.numel, bank.gate_up_proj)
    shared.begin(np.array([[0, 2, 1, 0], [0, 3, 1, 0]]))
    for expert in (2, 3):
        parts = (stock.gate_up_proj[expert], stock.down_proj[expert])
        shared.put(0, expert, torch.cat([part.detach().reshape(-1) for part in parts]))
    planned = [copies.plan(0, expert, frame) for frame, expert in enumerate((3, 2))]

    def pull() -> None:
        for copy in planned:
            shared.pull(0, copy.expert, copies.start(copy))
            copies.end(copy)

    lane.wait(lane.put("weights, host", pull))
    after = rows.to(device).requires_grad_()
    computed = bank(after, received)
    computed.backward(back.to(device))
    close(computed, expected)
    assert after.grad is not None and before.grad is not None
    close(after.grad, before.grad)
    gradients: dict[int, Tensor] = {}
    lane.put("gradients", lambda: gradients.update({expert: copies.take_gradient(0, expert) for expert in (2, 3)}))
    lane.drain()
    copies.returned()
    for expert in range(EXPERTS):
        flat = torch.cat([p.grad[expert].reshape(-1) for p in alone.parameters() if p.grad is not None])
        mine = [p.grad[expert].reshape(-1) for p in bank.parameters() if p.grad is not None and expert < 2]
        close(gradients[expert] if expert >= 2 else torch.cat(mine), flat)
    assert not expected[:9].equal(torch.zeros(9, HIDDEN)), "nothing was compared"
    copies.clear()
    lane.close()
    shared.close()


def test_a_balanced_step_is_as_on_the_cpu(device: torch.device, group: Any) -> None:
    """One rank, foreseen, recompute and update with replayed routes: losses and gradients of the stock model."""
    case = Case(layers=2, experts=4, top_k=2, hidden=32, inner=16, tokens=32, batches=2, length=16)
    stock, model = built(case), built(case).to(device)
    ids = torch.randint(256, (2, 2, 16), generator=torch.Generator().manual_seed(3))
    routes = routed(case, 1)
    balanced = balance(model, group, slots=1, timeout_s=60.0)
    losses: list[Tensor] = []
    with balanced.step(counted(routes, 4)) as run:
        for stage in ("recompute", "update"):
            for m, some in enumerate(ids):
                with (
                    run.micro_step(m, stage, routes=torch.from_numpy(routes[m, 0])),
                    torch.set_grad_enabled(stage == "update"),
                ):
                    losses.append(model(input_ids=some.to(device), use_cache=False).logits.float().square().mean())
                    if stage == "update":
                        losses[-1].backward()
        run.finish_gradients()
    assert [loss.item() for loss in losses[:2]] == pytest.approx([loss.item() for loss in losses[2:]], rel=1e-5)
    assert balanced.mover.unforeseen == balanced.mover.absent == 0
    balanced.close()

    plain = balance(stock, group, slots=0, timeout_s=60.0)  # the same routes, on the CPU, nothing foreseen
    with plain.step() as run:
        for m, some in enumerate(ids):
            with run.micro_step(m, routes=torch.from_numpy(routes[m, 0])):
                loss = stock(input_ids=some, use_cache=False).logits.float().square().mean()
                loss.backward()
                close(losses[2 + m].detach(), loss.detach())
        run.finish_gradients()
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, theirs[name].grad)
    plain.close()


def test_the_overlap_bench_runs(device: torch.device, group: Any) -> None:
    """Its figures add up; what they are is for the bench to say."""
    found = overlap(device, Shape(hidden=64, inner=32, experts=4, rows=64, copied=3), group)
    assert {(one.products, one.memory) for one in found} == {
        (products, memory) for products in ("loop", "grouped_mm") for memory in ("shared, pinned", "pageable")
    }
    for one in found:
        shorter = min(one.products_s, one.copies_s)
        assert one.hidden == pytest.approx((one.products_s + one.copies_s - one.both_s) / shorter)


@pytest.mark.gpu
def test_a_job_sees_what_compute_had_launched_and_compute_sees_the_job() -> None:
    """Neither blocks the host: all of it is asked for while the first kernel still sleeps."""
    cuda = torch.device("cuda")
    x, y = torch.zeros(1 << 20, device=cuda), torch.zeros(1 << 20, device=cuda)
    torch.cuda.synchronize()
    lane = Lane(cuda, 60.0)
    torch.cuda._sleep(LONG)
    x.fill_(7)
    lane.wait(lane.put("copy", lambda: y.copy_(x) and None))
    z = y + 1
    assert not torch.cuda.current_stream().query(), "the host waited for the device"
    torch.cuda.synchronize()
    assert (z == 8).all()
    lane.close()


@pytest.mark.gpu
def test_pinned_memory_is_pulled_while_compute_is_busy(group: Any) -> None:
    cuda = torch.device("cuda")
    frame = torch.zeros(1 << 22, device=cuda)
    shared = Shared(group, np.zeros(1, dtype=np.int64), frame.numel(), frame)
    shared.begin(np.array([[0, 0, 0, 0]]))
    shared.put(0, 0, torch.full_like(frame, 3))
    torch.cuda.synchronize()
    lane, pulled = Lane(cuda, 60.0), torch.cuda.Event()

    def pull() -> None:
        shared.pull(0, 0, frame)
        pulled.record()

    ticket = lane.put("weights, host", pull)
    torch.cuda._sleep(LONG)
    lane.wait(ticket)
    pulled.synchronize()
    assert not torch.cuda.current_stream().query(), "the copy waited for the kernel that was launched after it"
    torch.cuda.synchronize()
    assert (frame == 3).all()
    lane.close()
    shared.close()
