"""Run on each of two ranks by test_experts.py: `python experts_ranks.py DIRECTORY RANK RANKS`. Writes live journals.

Three small MoE layers in float64 train a few micro-steps under each of CASES, with AdamW. Beside each journal lies what
the mover counted, and the order of what it did: NAME-RANK.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from outrider.experts import Policy, Settings, contiguous_homes
from outrider.experts.layer import spread
from outrider.experts.move import Mover
from outrider.experts.schedule import StepPlan, assemble

RANKS, LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, BATCHES, SLOTS = 2, 3, 8, 2, 4, 3, 3, 2
PLAIN = [*(("recompute", m) for m in range(BATCHES)), *(("update", m) for m in range(BATCHES))]
PIPED = [("recompute", 0), ("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2), ("backward", 1),
         ("backward", 2)]  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "all layers, direct": {"shape": (0, 0, "direct", "direct"), "passes": PLAIN, "told": PLAIN},
    "ring of 2, host": {"shape": (2, 1, "host", "host"), "passes": PIPED, "told": PIPED},
    "ring of 1, mixed": {"shape": (1, 0, "host", "direct"), "passes": PLAIN, "told": ()},
    "out of order": {"shape": (3, 0, "direct", "direct"), "passes": PLAIN[::-1], "told": PLAIN},
    "wrong": {"shape": (2, 0, "direct", "host"), "passes": PIPED, "told": PIPED, "wrong": True},
    "planned": {"shape": (2, 1, "direct", "direct"), "passes": PLAIN, "told": PLAIN, "planned": True},
    "not foreseen": {"shape": (0, 0, "direct", "direct"), "passes": PLAIN, "told": None},
}


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = functional.linear(x, self.weight)
        weights, chosen = logits.softmax(-1).topk(TOP_K)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.float64))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER, dtype=torch.float64))
        self.act_fn = functional.silu


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), Fused()


class Case:
    """Inputs and recorded routes of every micro-batch and rank, equal on all ranks; some routes are missing."""

    def __init__(self, seed: int, moved: int) -> None:
        rng = np.random.default_rng((seed, moved))
        tokens = rng.integers(0, 30, (BATCHES, RANKS))
        self.x = [[torch.from_numpy(rng.normal(size=(n, HIDDEN))) for n in row] for row in tokens]
        popular = rng.pareto(0.8, (BATCHES, LAYERS, 1, EXPERTS)).clip(max=50) + 0.05
        self.routes: list[list[torch.Tensor]] = []
        for m, row in enumerate(tokens):
            keys = [rng.exponential(size=(n, LAYERS, EXPERTS)) / popular[m].transpose(1, 0, 2) for n in row]
            some = [torch.from_numpy(np.argsort(k, axis=2)[:, :, :TOP_K].copy()) for k in keys]
            for ids in some:
                ids[torch.from_numpy(rng.random(len(ids)) < 0.2)] = -1
            self.routes.append(some)

    def counts(self) -> Any:
        counts = np.zeros((BATCHES, LAYERS, RANKS, EXPERTS), dtype=np.int64)
        for m, row in enumerate(self.routes):
            for rank, ids in enumerate(row):
                for layer in range(LAYERS):
                    known = ids[(ids[:, layer] >= 0).all(1), layer].reshape(-1).numpy()
                    counts[m, layer, rank] = np.bincount(known, minlength=EXPERTS)
        return counts


def any_plan(rng: np.random.Generator, counts: Any) -> StepPlan:
    """Other homes, any copies, any split."""
    homes = np.stack([rng.permutation(np.arange(EXPERTS) % RANKS) for _ in range(LAYERS)])
    hosts_M, rows_M = [], []
    for counts_LRE in counts:
        hosts, rows = np.full((LAYERS, RANKS, EXPERTS), -1), []
        for layer in range(LAYERS):
            for rank in range(RANKS):
                copies = rng.choice(np.flatnonzero(homes[layer] != rank), SLOTS, replace=False)
                hosts[layer, rank, : EXPERTS // RANKS + SLOTS] = [*np.flatnonzero(homes[layer] == rank), *copies]
            for source, expert in np.argwhere(counts_LRE[layer] > 0):
                holders = np.flatnonzero((hosts[layer] == expert).any(axis=1))
                shares = rng.multinomial(counts_LRE[layer, source, expert], np.ones(len(holders)) / len(holders))
                rows += [[layer, expert, source, r, n] for r, n in zip(holders, shares, strict=True) if n]
        hosts_M.append(hosts)
        rows_M.append(np.array(rows).reshape(-1, 5))
    return assemble("random", homes, hosts_M, rows_M, ranks_per_node=RANKS)


@contextmanager
def several(mover: Mover, case: dict[str, Any], stage: Any, m: int) -> Iterator[None]:
    with mover.react(stage) if case["told"] is None else mover.micro_step(stage, m):
        yield


def train(name: str, case: dict[str, Any], rank: int, groups: list[Any], directory: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)])
    blocks = spread(model, contiguous_homes(EXPERTS, RANKS), groups[0])
    ring, node, recompute, update = case["shape"]
    policy = Policy(Settings(LAYERS, EXPERTS, RANKS, SLOTS, ring, node, recompute, update))
    mover = Mover(policy, blocks, groups[1], groups[2], directory / f"{name}-{rank}.jsonl", timeline=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for moved in range(2):  # two RL steps
        data = Case(len(name), moved)
        counts = data.counts()
        if case.get("wrong"):
            counts = np.random.default_rng(1).permutation(counts.reshape(-1)).reshape(counts.shape)
        if case["told"] is None:
            mover.begin()
        elif case.get("planned"):
            mover.follow(any_plan(np.random.default_rng(moved), counts), case["told"], optimizer)
        else:
            mover.foresee(counts, case["told"])
        outputs: dict[int, torch.Tensor] = {}
        for stage, m in case["passes"]:
            for layer, block in enumerate(blocks):
                block.replay(data.routes[m][rank][:, layer], None)
            with several(mover, case, stage, m), torch.set_grad_enabled(stage != "recompute"):
                if stage != "backward":
                    outputs[m] = model(data.x[m][rank][None].requires_grad_(stage != "recompute"))
                if stage in ("update", "backward"):
                    outputs[m].square().sum().backward()
        mover.finish()
        optimizer.step()
        optimizer.zero_grad()
    assert mover.spans is not None
    told = {
        "copies": mover.copies_moved, "unforeseen": mover.unforeseen, "absent": mover.absent,
        "sent_bytes": mover.sent_bytes, **order(mover.spans),
    }  # fmt: skip
    (directory / f"{name}-{rank}.json").write_text(json.dumps(told))
    mover.close()


def order(spans: Any) -> dict[str, list[list[Any]]]:
    """What compute did, and what the lane did: two threads, each in its order."""
    told: dict[str, list[list[Any]]] = {"compute": [], "lane": []}
    for span in spans:
        told["compute" if span.what in ("wait", "forward", "backward") else "lane"].append([span.what, span.layer])
    return told


def main(directory: Path, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    store = f"file://{directory / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
    groups = [dist.group.WORLD, dist.new_group(timeout=limit), dist.new_group(timeout=limit)]
    for name, case in CASES.items():
        train(name, case, rank, groups, directory)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
