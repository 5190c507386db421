"""Run on each of three ranks by test_spread.py: `python spread_ranks.py DIRECTORY RANK`. Exit code 0: all held.

Seven experts on three ranks (3, 2, 2), float64, weights and inputs on a grid of 2^-4 with relu, so that expert outputs
are exact and the forward pass can be compared bit for bit, whatever the split. Workloads W0 to W7, as in conftest.py.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from conftest import workload
from outrider.errors import LawBroken
from outrider.experts import Policy, Settings, contiguous_homes, foresee
from outrider.experts.layer import SpreadBlock, spread
from outrider.experts.move import Mover

EXPERTS, RANKS, TOP_K, HIDDEN = 7, 3, 2, 16
HOMES = contiguous_homes(EXPERTS, RANKS)
TOKENS = [(9, 0, 14), (5, 6, 7), (0, 0, 4), (20, 1, 3)]  # of each rank, by micro-step: an idle rank, nearly all idle
WORKLOADS = [f"W{number}" for number in range(8)]  # see conftest.py


def grid(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-16, 17, shape) / 16.0)


def make_block(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=8, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, hidden_act="relu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).to(torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(grid(rng, *parameter.shape))
    return block


class Case:
    """Inputs, routes and upstream gradients of all ranks, for every micro-step: equal on all ranks."""

    def __init__(self, name: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.name = name
        heat_MRE = workload(name, EXPERTS, RANKS, micro_steps=len(TOKENS), layers=1, tokens=28)[:, 0]
        self.tokens = heat_MRE.sum(axis=2) // TOP_K if name == "W4" else np.array(TOKENS)  # W4: its sources are ragged
        self.x = [[grid(rng, n, HIDDEN) for n in counts] for counts in self.tokens.tolist()]
        self.up = [[grid(rng, n, HIDDEN) for n in counts] for counts in self.tokens.tolist()]
        self.routes = []
        for counts, heat_RE in zip(self.tokens.tolist(), heat_MRE, strict=True):
            share = heat_RE.sum(axis=0) + 1e-9
            share /= share.sum()
            draw = [rng.choice(EXPERTS, TOP_K, replace=False, p=share) for _ in range(sum(counts))]
            ids = torch.tensor(np.array(draw)).split(list(counts))
            self.routes.append(ids)
        self.routes[1][0][2:4] = -1  # not recorded: the live gate routes them

    def counts(self) -> Any:
        sizes = self.tokens
        routes = np.concatenate([ids.numpy() for row in self.routes for ids in row])[:, None, :]
        batch = np.repeat(np.arange(len(TOKENS)), sizes.sum(axis=1))
        source = np.repeat(np.tile(np.arange(RANKS), len(TOKENS)), sizes.ravel())
        return foresee(routes, batch, source, EXPERTS, RANKS, len(TOKENS))


def plain(block: Any, case: Case) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Outputs and input gradients of the block itself, all ranks' tokens; parameter gradients add up in the block."""
    outputs, input_gradients = [], []
    for x_of, up_of, ids_of in zip(case.x, case.up, case.routes, strict=True):
        x = torch.cat(x_of).requires_grad_()
        ids = torch.cat(list(ids_of))
        probabilities = (x @ block.gate.weight.T).softmax(-1, dtype=torch.float32)
        ids = torch.where((ids >= 0).all(1, keepdim=True), ids, probabilities.topk(TOP_K).indices)
        weights = probabilities.gather(1, ids)
        y = block.experts(x, ids, (weights / weights.sum(-1, keepdim=True)).double())
        (y * torch.cat(up_of)).sum().backward()
        sizes = [len(part) for part in x_of]
        outputs.append(list(y.detach().split(sizes)))
        input_gradients.append(list(x.grad.split(sizes)))
    return outputs, input_gradients


def spread_step(block: SpreadBlock, mover: Mover, case: Case, counts: Any, rank: int) -> Any:
    outputs, input_gradients = [], []
    mover.foresee(counts)
    for m in range(len(TOKENS)):
        with mover.micro_step("recompute", m), torch.no_grad():
            block.replay(case.routes[m][rank], None)
            block(case.x[m][rank][None])
    for m in range(len(TOKENS)):
        with mover.micro_step("update", m):
            padded = torch.cat([case.x[m][rank], torch.ones(2, HIDDEN, dtype=torch.float64)]).requires_grad_()
            real = torch.arange(len(padded)) < len(case.x[m][rank])
            block.replay(torch.cat([case.routes[m][rank], torch.zeros(2, TOP_K, dtype=torch.int64)]), real)
            y = block(padded[None])[0]
            assert (y[~real] == 0).all()
            (y[real] * case.up[m][rank]).sum().backward()
            outputs.append(y[real].detach())
            input_gradients.append(padded.grad[real])
    mover.finish()
    dist.all_reduce(block.gate.weight.grad)
    return outputs, input_gradients


def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    assert torch.allclose(a, b, rtol=0, atol=1e-11 * scale), f"{what}: {float((a - b).abs().max())}"


def check_case(name: str, rank: int, group: Any, control: Any, lane: Any, seed: int) -> None:
    """Two optimizer steps: a copy that outlived the first would be stale in the second."""
    mine = torch.from_numpy(np.flatnonzero(rank == HOMES))
    case, other = Case(name, seed), Case("W6" if name == "W0" else "W0", seed + 1)
    for slots, counts in ((0, case.counts()), (2, case.counts()), (2, other.counts())):
        reference, holder = make_block(seed), torch.nn.Sequential(make_block(seed))
        (block,) = spread(holder, HOMES, group)
        names = {n: tuple(p.shape) for n, p in holder.named_parameters()}
        mover = Mover(Policy(Settings(1, EXPERTS, RANKS, slots)), [block], control, lane)
        for step in range(2):
            reference.zero_grad()
            holder.zero_grad()
            expected, expected_gradients = plain(reference, case)
            outputs, gradients = spread_step(block, mover, case, counts, rank)
            for m in range(len(TOKENS)):
                if step == 0:
                    assert torch.equal(outputs[m], expected[m][rank]), f"{name}: not the same bits in micro-step {m}"
                close(outputs[m], expected[m][rank], "output")
                close(gradients[m], expected_gradients[m][rank], "input gradient")
            close(block.gate.weight.grad, reference.gate.weight.grad, "router gradient")
            close(block.experts.gate_up_proj.grad, reference.experts.gate_up_proj.grad[mine], "gate_up gradient")
            close(block.experts.down_proj.grad, reference.experts.down_proj.grad[mine], "down gradient")
            for model in (reference, holder):
                torch.optim.SGD(model.parameters(), lr=1e-3).step()
        assert {n: tuple(p.shape) for n, p in holder.named_parameters()} == names, "an optimizer would see copies"
        assert set(holder.state_dict()) == set(names)
        live = 2 * 2 * TOP_K * int((case.routes[1][0] < 0).any(dim=1).sum())  # two passes in each of two steps
        if (counts == case.counts()).all():
            assert (mover.unforeseen, mover.absent) == (live, 0)
        else:
            assert mover.unforeseen > live
            assert mover.absent > 0
        assert (mover.copies_moved > 0) == (slots > 0), f"{name}: {mover.copies_moved} copies"


def check_nothing_is_left(rank: int, group: Any, control: Any, lane: Any) -> None:
    """After a step a rank holds its homes alone: copies that owed nothing would be stale, too."""
    case, holder = Case("W2", 6), torch.nn.Sequential(make_block(6))
    (block,) = spread(holder, HOMES, group)
    mover = Mover(Policy(Settings(1, EXPERTS, RANKS, 2)), [block], control, lane)
    mover.foresee(case.counts())
    with mover.micro_step("recompute", 1), torch.no_grad():
        block.replay(case.routes[1][rank], None)
        block(case.x[1][rank][None])
    mover.finish()
    assert mover.copies_moved > 0
    for expert in range(EXPERTS):
        try:
            block.experts.weights(expert)
        except LawBroken as error:
            assert error.law == 6  # noqa: PT017
        else:
            assert HOMES[expert] == rank, f"expert {expert} of the step before could be used"
    mover.close()


def check_broken_laws(rank: int, group: Any, control: Any, lane: Any) -> None:
    case = Case("W2", 5)
    holder = torch.nn.Sequential(make_block(5))
    (block,) = spread(holder, HOMES, group)
    mover = Mover(Policy(Settings(1, EXPERTS, RANKS, 2)), [block], control, lane)
    try:
        mover.foresee(case.counts() if rank != 1 else Case("W6", 5).counts())
        raise AssertionError("ranks with different tables went on")
    except LawBroken as error:
        assert error.law == 7  # noqa: PT017
    dist.barrier()
    block.use(np.array([[e, rank, (HOMES[e] + 1) % RANKS, 99] for e in range(EXPERTS)]))  # no rank has such copies
    block.replay(case.routes[1][rank], None)
    try:
        block(case.x[1][rank][None])
        raise AssertionError("tokens were computed by a rank that does not hold their expert")
    except LawBroken as error:
        assert error.law == 6  # noqa: PT017


def main(directory: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
    group, control, lane = dist.group.WORLD, dist.new_group(timeout=limit), dist.new_group(timeout=limit)
    for seed, name in enumerate(WORKLOADS):
        check_case(name, rank, group, control, lane, seed)
    check_nothing_is_left(rank, group, control, lane)
    check_broken_laws(rank, group, control, lane)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
