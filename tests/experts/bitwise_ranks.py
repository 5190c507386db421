"""Run on each of four ranks by test_bitwise.py: `python bitwise_ranks.py DIRECTORY RANK RANKS`. Exit code 0: all held.

On the first one, two and four of them: rank 0 draws cases with hypothesis and tells the others; all train the layer
with AdamW, balanced, and rank 0 trains it alone as well, in a group of its own with balancing off. Everything must be
equal to the bit.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from outrider.experts import Policy, Settings, contiguous_homes
from outrider.experts.layer import spread
from outrider.experts.move import Mover

HIDDEN, INNER = 20, 12  # no multiples of a vector register
EXAMPLES = {1: 4, 2: 12, 4: 6}  # ranks: cases
LIMIT = timedelta(seconds=120)

Case = dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    return {
        "seed": draw(st.integers(0, 2**31)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "kind": draw(st.sampled_from(["qwen3", "deepseek"])),
        "experts": draw(st.sampled_from([8, 12])),
        "top_k": draw(st.integers(1, 4)),
        "slots": draw(st.integers(1, 3)),
        "block_rows": draw(st.sampled_from([1, 4, 8, 16])),
        "tokens": draw(st.lists(st.lists(st.integers(0, 24), min_size=ranks, max_size=ranks), min_size=1, max_size=3)),
        "foresight": draw(st.sampled_from(["right", "wrong", "none"])),
        "checkpoint": draw(st.sampled_from(["no", "reentrant", "not reentrant"])),
        "steps": draw(st.sampled_from([2, 3, 20])),
        "skew": draw(st.floats(0, 3)),
    }


def model_of(case: Case) -> Any:
    torch.manual_seed(case["seed"])
    shape = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts_per_tok": case["top_k"]}
    if case["kind"] == "qwen3":
        block: Any = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(num_experts=case["experts"], norm_topk_prob=True, **shape))
    else:
        block = DeepseekV3MoE(DeepseekV3Config(n_routed_experts=case["experts"], n_group=2, topk_group=2, **shape))
        del block.shared_experts  # a dense part: not under the bitwise promise
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return torch.nn.Sequential(block).to(getattr(torch, case["dtype"]))


class Data:
    """Inputs, recorded routes (some rows missing) and upstream gradients of every micro-step and rank."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(case["seed"])
        draw = lambda n: torch.from_numpy(rng.normal(size=(n, HIDDEN))).to(getattr(torch, case["dtype"]))  # noqa: E731
        popularity = rng.exponential(size=case["experts"]) ** case["skew"] + 1e-3
        popularity /= popularity.sum()
        self.x = [[draw(n) for n in row] for row in case["tokens"]]
        self.up = [[draw(n) for n in row] for row in case["tokens"]]
        self.routes = []
        for row in case["tokens"]:
            by_rank = []
            for n in row:
                keys = rng.exponential(size=(n, case["experts"])) / popularity
                ids = torch.from_numpy(np.argsort(keys, axis=1)[:, : case["top_k"]].copy())
                ids[torch.from_numpy(rng.random(n) < 0.2)] = -1
                by_rank.append(ids)
            self.routes.append(by_rank)

    def counts(self, case: Case, ranks: int) -> Any:
        counts = np.zeros((len(self.routes), 1, ranks, case["experts"]), dtype=np.int64)
        for m, row in enumerate(self.routes):
            for rank, ids in enumerate(row):
                known = ids[(ids >= 0).all(1)].reshape(-1).numpy()
                counts[m, 0, rank] = np.bincount(known, minlength=case["experts"])
        if case["foresight"] == "wrong":
            counts = np.random.default_rng(1).permutation(counts.reshape(-1)).reshape(counts.shape)
        return counts


def train(
    case: Case, data: Data, group: Any, control: Any, lane: Any, slots: int, parts: list[int], counts: Any
) -> Any:
    """Train on the token parts `parts` (ranks of the data) of every micro-step; all that must be equal, and copies."""
    model = model_of(case)
    ranks = group.size()
    homes = contiguous_homes(case["experts"], ranks)
    (block,) = spread(model, homes, group, case["block_rows"])
    mover = Mover(Policy(Settings(1, case["experts"], ranks, slots)), [block], control, lane)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[torch.Tensor] = []
    for _ in range(case["steps"]):
        optimizer.zero_grad()
        if counts is None:
            mover.begin()
        else:
            mover.foresee(counts)
        for m in range(len(data.x)):
            x = torch.cat([data.x[m][p] for p in parts])[None].requires_grad_()
            block.replay(torch.cat([data.routes[m][p] for p in parts]), None)
            with mover.react("update") if counts is None else mover.micro_step("update", m):
                again = case["checkpoint"]
                y = block(x) if again == "no" else checkpoint(block, x, use_reentrant=again == "reentrant")
                y.backward(torch.cat([data.up[m][p] for p in parts])[None])
            seen += [y.detach()[0], x.grad[0]]
        mover.finish()
        dist.all_reduce(block.gate.weight.grad, group=group)
        optimizer.step()
    whole = {"router": block.gate.weight.detach(), "router gradient": block.gate.weight.grad}
    bank = block.experts
    mine = {"up": bank.gate_up_proj.detach(), "up gradient": bank.gate_up_proj.grad,
            "down": bank.down_proj.detach(), "down gradient": bank.down_proj.grad}  # fmt: skip
    return seen, whole, mine, mover


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
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(cases(self.ranks))
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
        for name, tensor in mine.items():
            same(torch.cat([one[2][name] for one in everyone]), tensor, name, case)
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
