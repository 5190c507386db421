"""Run on each of four ranks by test_bitwise.py: `python bitwise_ranks.py DIRECTORY RANK RANKS`. Exit code 0: all held.

On the first one, two and four of them: rank 0 draws cases with hypothesis and tells the others; all train the layer
with AdamW, balanced, and rank 0 trains it alone as well, in a group of its own with balancing off. Everything must be
equal to the bit.
"""

import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from outrider.experts import Policy, Settings, contiguous_homes
from outrider.experts.layer import spread
from outrider.experts.move import Mover
from outrider.experts.schedule import StepPlan, assemble

HIDDEN, INNER = 20, 12  # no multiples of a vector register
EXAMPLES = {1: 4, 2: 12, 4: 6}  # ranks: cases
LIMIT = timedelta(seconds=120)

Case = dict[str, Any]
PINNED: Case = {  # twenty steps of everything at once
    "seed": 11, "dtype": "float32", "kind": "qwen3", "layers": 3, "experts": 8, "top_k": 3, "slots": 2,
    "block_rows": 4, "foresight": "plan", "passes": "1f1b", "ring": 2, "update": "host", "node": 1,
    "checkpoint": "not reentrant", "steps": 20, "skew": 2.0, "late_s": 0.0,
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    foresight = draw(st.sampled_from(["right", "wrong", "plan", "none"]))
    layers = draw(st.integers(1, 3))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "kind": draw(st.sampled_from(["qwen3", "deepseek"])),
        "layers": layers,
        "experts": draw(st.sampled_from([8, 12])),
        "top_k": draw(st.integers(1, 4)),
        "slots": draw(st.integers(1, 3)),
        "block_rows": draw(st.sampled_from([1, 4, 8, 16])),
        "tokens": draw(st.lists(st.lists(st.integers(0, 24), min_size=ranks, max_size=ranks), min_size=1, max_size=3)),
        "foresight": foresight,
        "passes": "plain" if foresight == "none" else draw(st.sampled_from(["plain", "1f1b", "out of order"])),
        "ring": 0 if foresight == "none" else draw(st.integers(0, layers)),
        "update": draw(st.sampled_from(["direct", "host"])),
        "node": draw(st.sampled_from([n for n in (1, 2, 4) if n <= ranks])),
        "checkpoint": draw(st.sampled_from(["no", "reentrant", "not reentrant"])),
        "steps": draw(st.sampled_from([2, 3])),
        "late_s": draw(st.sampled_from([0.0, 0.01])),
        "skew": draw(st.floats(0, 3)),
    }


class Stack(torch.nn.Module):
    """Blocks on a residual stream; each may compute its activations again, and start at any time."""

    def __init__(self, blocks: list[Any], again: str, late_s: float) -> None:
        super().__init__()
        self.blocks, self.again, self.late_s = torch.nn.ModuleList(blocks), again, late_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            time.sleep(random.random() * self.late_s)  # another on every rank: no order may depend on it
            y = block(x) if self.again == "no" else checkpoint(block, x, use_reentrant=self.again == "reentrant")
            x = x + y
        return x


def model_of(case: Case) -> Any:
    torch.manual_seed(case["seed"])
    shape = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts_per_tok": case["top_k"]}
    blocks: list[Any] = []
    for _ in range(case["layers"]):
        if case["kind"] == "qwen3":
            blocks.append(Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(num_experts=case["experts"], **shape)))
        else:
            config = DeepseekV3Config(n_routed_experts=case["experts"], n_group=2, topk_group=2, **shape)
            blocks.append(DeepseekV3MoE(config))
            del blocks[-1].shared_experts  # a dense part: not under the bitwise promise
    model = Stack(blocks, case["checkpoint"], case["late_s"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(getattr(torch, case["dtype"]))


class Data:
    """Inputs, recorded routes (some rows missing) and upstream gradients of every micro-step and rank."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(case["seed"])
        draw = lambda n: torch.from_numpy(rng.normal(size=(n, HIDDEN))).to(getattr(torch, case["dtype"]))  # noqa: E731
        popularity = rng.exponential(size=(case["layers"], case["experts"])) ** case["skew"] + 1e-3
        self.x = [[draw(n) for n in row] for row in case["tokens"]]
        self.up = [[draw(n) for n in row] for row in case["tokens"]]
        self.routes = []  # [micro-step][rank] of [tokens, layers, top_k]
        for row in case["tokens"]:
            by_rank = []
            for n in row:
                keys = rng.exponential(size=(n, case["layers"], case["experts"])) / popularity
                ids = torch.from_numpy(np.argsort(keys, axis=2)[:, :, : case["top_k"]].copy())
                ids[torch.from_numpy(rng.random(n) < 0.2)] = -1
                by_rank.append(ids)
            self.routes.append(by_rank)

    def counts(self, case: Case, ranks: int) -> Any:
        layers, experts = case["layers"], case["experts"]
        counts = np.zeros((len(self.routes), layers, ranks, experts), dtype=np.int64)
        for m, row in enumerate(self.routes):
            for rank, ids in enumerate(row):
                for layer in range(layers):
                    known = ids[(ids[:, layer] >= 0).all(1), layer].reshape(-1).numpy()
                    counts[m, layer, rank] = np.bincount(known, minlength=experts)
        if case["foresight"] == "wrong":
            counts = np.random.default_rng(1).permutation(counts.reshape(-1)).reshape(counts.shape)
        return counts


def random_plan(rng: Any, counts: Any, slots: int, homes: Any = None) -> StepPlan:
    """Any homes, any copies, any split: nothing about it is good, but it is a plan."""
    steps, layers, ranks, experts = counts.shape
    if homes is None:
        homes = rng.integers(ranks, size=(layers, experts))
    hosts_M, rows_M = [], []
    for m in range(steps):
        hosts = np.full((layers, ranks, experts), -1)
        rows = []
        for layer in range(layers):
            for rank in range(ranks):
                away = np.flatnonzero(homes[layer] != rank)
                copies = rng.choice(away, min(slots, len(away)), replace=False)
                held = np.concatenate([np.flatnonzero(homes[layer] == rank), copies])
                hosts[layer, rank, : len(held)] = held
            for source, expert in np.argwhere(counts[m, layer] > 0):
                holders = np.flatnonzero((hosts[layer] == expert).any(axis=1))
                shares = rng.multinomial(counts[m, layer, source, expert], rng.dirichlet(np.ones(len(holders))))
                rows += [[layer, expert, source, r, n] for r, n in zip(holders, shares, strict=True) if n]
        hosts_M.append(hosts)
        rows_M.append(np.array(rows).reshape(-1, 5))
    plan = assemble("random", homes, hosts_M, rows_M, ranks_per_node=ranks)
    plan.validate(counts)
    return plan


def passes_of(case: Case, batches: int) -> list[Any]:
    """The order of passes; backward passes keep the order of micro-batches, which sums of gradients follow."""
    if case["passes"] != "1f1b":
        return [("update", m) for m in range(batches)]
    order: list[Any] = [("forward", 0)]
    for m in range(1, batches):
        order += [("forward", m), ("backward", m - 1)]
    return [*order, ("backward", batches - 1)]


def train(
    case: Case, data: Data, group: Any, control: Any, lane: Any, slots: int, parts: list[int], counts: Any
) -> Any:
    """Train on the token parts `parts` (ranks of the data) of every micro-step; all that must be equal, and copies."""
    model = model_of(case)
    ranks, alone = group.size(), slots == 0
    blocks = spread(model, contiguous_homes(case["experts"], ranks), group, case["block_rows"])
    shape = Settings(
        case["layers"],
        case["experts"],
        ranks,
        slots,
        case["ring"],
        0 if alone else case["node"],
        "host",
        case["update"],
    )
    mover = Mover(Policy(shape), blocks, control, lane)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: dict[int, list[torch.Tensor]] = {}
    rng = np.random.default_rng(case["seed"])
    for step in range(case["steps"]):
        optimizer.zero_grad()
        passes = passes_of(case, len(data.x))
        told = passes[::-1] if case["passes"] == "out of order" else passes
        if counts is None:
            mover.begin()
        elif case["foresight"] == "plan" and not alone:
            mover.follow(random_plan(rng, counts, slots), told, optimizer)
        else:
            mover.foresee(counts, told)
        if counts is not None and step == 0:
            with mover.micro_step("recompute", 0), torch.no_grad():
                replay(blocks, data, 0, parts)
                model(torch.cat([data.x[0][p] for p in parts])[None])
        xs, ys = {}, {}
        for stage, m in passes:
            with mover.react("update") if counts is None else mover.micro_step(stage, m):
                replay(blocks, data, m, parts)
                if stage != "backward":
                    xs[m] = torch.cat([data.x[m][p] for p in parts])[None].requires_grad_()
                    ys[m] = model(xs[m])
                if stage != "forward":
                    ys[m].backward(torch.cat([data.up[m][p] for p in parts])[None])
                    seen.setdefault(step, []).extend([ys[m].detach()[0], xs[m].grad[0]])
        mover.finish()
        for block in blocks:
            dist.all_reduce(block.gate.weight.grad, group=group)
        optimizer.step()
    assert len(mover.copies.frames) == shape.frames  # the memory that was said is the memory that there is
    whole, mine = {}, {}
    for layer, block in enumerate(blocks):
        whole |= {f"router {layer}": block.gate.weight.detach(), f"router gradient {layer}": block.gate.weight.grad}
        bank = block.experts
        for name, tensor in (("up", bank.gate_up_proj), ("down", bank.down_proj)):
            for expert, row in bank.row_of.items():
                mine[f"{name}, layer {layer}, expert {expert}"] = tensor.detach()[row]
                mine[f"{name} gradient, layer {layer}, expert {expert}"] = tensor.grad[row]
    mover.close()
    return [tensor for step in sorted(seen) for tensor in seen[step]], whole, mine, mover


def replay(blocks: Any, data: Data, m: int, parts: list[int]) -> None:
    for layer, block in enumerate(blocks):
        block.replay(torch.cat([data.routes[m][p] for p in parts])[:, layer], None)


def same(a: torch.Tensor, b: torch.Tensor, what: str, case: Case) -> None:
    assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}, {case}"
    assert a.numpy().tobytes() == b.numpy().tobytes(), f"{what}: apart by {float((a - b).abs().max())}, {case}"


class Ranks:
    """The first `ranks` ranks; made on every rank, used by those."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        *self.groups, self.control = (dist.new_group(range(ranks), timeout=LIMIT) for _ in range(4))
        self.alone = [dist.new_group([0], timeout=LIMIT) for _ in range(3)]
        self.copies = self.cases = 0

    def draw(self) -> None:
        """Rank 0's part."""

        @settings(
            max_examples=EXAMPLES[self.ranks], deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        @given(cases(self.ranks))
        @example({**PINNED, "tokens": [[9] * self.ranks, [0, 24, 3, 1][: self.ranks], [16] * self.ranks]})
        def drawn(case: Case) -> None:
            dist.broadcast_object_list([case], src=0, group=self.control)
            self.check(case)

        drawn()
        dist.broadcast_object_list([None], src=0, group=self.control)
        sys.stdout.write(f"{self.ranks} ranks: {self.cases} cases, {self.copies} copies moved\n")
        assert self.cases >= EXAMPLES[self.ranks]
        assert (self.copies > 0) == (self.ranks > 1), "no copies, nothing proven"

    def follow(self) -> None:
        told: list[Any] = [None]
        while True:
            dist.broadcast_object_list(told, src=0, group=self.control)
            if told[0] is None:
                break
            self.check(told[0])

    def check(self, case: Case) -> None:
        """All ranks enter; each finds out for itself, and then all know."""
        data = Data(case)
        counts = None if case["foresight"] == "none" else data.counts(case, self.ranks)
        seen, whole, mine, mover = train(case, data, *self.groups, case["slots"], [self.rank], counts)
        self.copies += mover.copies_moved
        self.cases += 1
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, (seen, whole, mine), group=self.control)
        failure = ""
        if self.rank == 0:
            try:
                self.compare(case, data, everyone)
            except AssertionError as error:
                failure = str(error)
        told = [failure]
        dist.broadcast_object_list(told, src=0, group=self.control)
        assert not told[0], told[0]

    def compare(self, case: Case, data: Data, everyone: list[Any]) -> None:
        parts = list(range(self.ranks))
        static = None if case["foresight"] == "none" else data.counts({**case, "foresight": "right"}, self.ranks)
        if static is not None:
            static = static.sum(axis=2, keepdims=True)
        seen, whole, mine, _ = train(case, data, *self.alone, 0, parts, static)
        for i, tensor in enumerate(seen):
            same(torch.cat([one[0][i] for one in everyone]), tensor, f"output or input gradient {i}", case)
        for name, tensor in whole.items():
            for rank, one in enumerate(everyone):
                same(one[1][name], tensor, f"{name} on rank {rank}", case)
        theirs = {name: tensor for one in everyone for name, tensor in one[2].items()}
        assert len(theirs) == sum(len(one[2]) for one in everyone) == len(mine), f"a master is lost or twice, {case}"
        for name, tensor in mine.items():
            same(theirs[name], tensor, name, case)
        assert any(bool(t.any()) for t in mine.values())


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=LIMIT)
    for some in EXAMPLES:
        us = Ranks(rank, some)
        if rank == 0:
            us.draw()
        elif rank < some:
            us.follow()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
