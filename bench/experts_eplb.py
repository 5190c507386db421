"""How long does a plan take, beside EPLB on the same loads in the same run? Microseconds a layer, one core each.

    python bench/experts_eplb.py --deepseek /path/to/EPLB/eplb.py     # git clone https://github.com/deepseek-ai/EPLB
                                                                      # writes bench/results/experts_eplb.json

deepseek  DeepSeek's program itself, unmodified, on torch with one thread, from the file that is named (its SHA-256 is
          in the result); not a dependency and not copied here. Without it that row is missing.
vllm      the policy that vLLM installs as "default" (EPLB on numpy), in .venv-vllm, where `make .venv-vllm` put it
drop-in   outrider.experts.rebalance_experts: the same placement as deepseek, compiled
plan      outrider.experts.plan: token counts by source in; copies, exact split by source, its proof and a recount out

Loads are synthetic: 128 experts, 32 ranks, 2 spare slots a rank, 16 layers, 8 micro-steps of 32 x 4,096 tokens, top-8;
popularity is log-normal (sigma 0.8), drawn for each layer, and drifts with each micro-step (sigma 0.1: about 5 % of
tokens go to other experts, as between neighbouring micro-batches of the real routes that were measured). EPLB plans
each micro-step from its totals alone: it places, and its even split costs nothing. Rounds alternate between planners;
given are medians over micro-steps and rounds. max/mean: largest rank load, mean over layers and micro-steps.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from outrider.experts import plan, rebalance_experts

STEPS, LAYERS, RANKS, EXPERTS, SLOTS, ROUNDS = 8, 16, 32, 128, 2, 3
COPIES = EXPERTS + RANKS * SLOTS
ROOT = Path(__file__).parents[1]

PEER = """
import importlib.util, json, sys, time
import numpy as np, torch
torch.set_num_threads(1)
where, loads, copies, ranks = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if where == "vllm":
    from vllm.distributed.eplb.policy import DefaultEplbPolicy
    place = DefaultEplbPolicy.rebalance_experts
else:
    spec = importlib.util.spec_from_file_location("eplb", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    place = lambda *arguments: module.rebalance_experts(*arguments)[0]
seconds, placed = [], []
for load in torch.tensor(loads):
    began = time.perf_counter()
    placed.append(place(load, copies, 1, 1, ranks).tolist())
    seconds.append(time.perf_counter() - began)
print("RESULT" + json.dumps([seconds, placed]))
"""


def counts() -> Any:
    """tokens, synthetic."""
    rng = np.random.default_rng(0)
    popular = rng.lognormal(0, 0.8, (1, LAYERS, 1, EXPERTS)) * rng.lognormal(0, 0.1, (STEPS, LAYERS, 1, EXPERTS))
    share = popular / popular.sum(axis=3, keepdims=True)
    return rng.poisson(np.broadcast_to(share * 4096 * 8, (STEPS, LAYERS, RANKS, EXPERTS))).astype(np.int64)


def peer(python: str, where: str, loads: Path) -> tuple[list[float], Any]:
    command = [python, "-c", PEER, where, str(loads), str(COPIES), str(RANKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, placed = json.loads(done.stdout.split("RESULT")[1])
    return seconds, np.array(placed)


def imbalance(load: Any, placed: Any) -> float:
    """Mean max/mean of a placement with an even split."""
    ratios = []
    for some, row in zip(load.reshape(-1, EXPERTS), placed.reshape(-1, COPIES), strict=True):
        on_ranks = (some / np.bincount(row, minlength=EXPERTS))[row].reshape(RANKS, -1).sum(axis=1)
        ratios.append(on_ranks.max() / on_ranks.mean())
    return float(np.mean(ratios))


def timed(run: Callable[[int], Any]) -> tuple[list[float], list[Any]]:
    seconds, results = [], []
    for m in range(STEPS):
        began_s = time.perf_counter()
        results.append(run(m))
        seconds.append(time.perf_counter() - began_s)
    return seconds, results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepseek", type=Path, help="eplb.py of a clone of deepseek-ai/EPLB")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm/bin/python", help="a Python that has vLLM")
    options = parser.parse_args()
    tokens = counts()
    load = tokens.sum(axis=2)
    mean = load.sum(axis=2) / RANKS
    plan(tokens[0], SLOTS)  # compiles, or reads what was compiled
    rebalance_experts(load[0], COPIES, 1, 1, RANKS)

    seconds: dict[str, list[float]] = {"deepseek": [], "vllm": [], "drop-in": [], "plan": []}
    ratio: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        loads = Path(folder) / "loads.npy"
        np.save(loads, load)
        for _ in range(ROUNDS):
            if options.deepseek:
                some, placed = peer(sys.executable, str(options.deepseek), loads)
                seconds["deepseek"] += some
                ratio["deepseek"] = imbalance(load, placed)
            if options.vllm.exists():
                some, placed = peer(str(options.vllm), "vllm", loads)
                seconds["vllm"] += some
                ratio["vllm"] = imbalance(load, placed)
            some, results = timed(lambda m: rebalance_experts(load[m], COPIES, 1, 1, RANKS)[0])
            seconds["drop-in"] += some
            ratio["drop-in"] = imbalance(load, np.array(results))
            before: list[Any] = [None]

            def step(m: int, before: list[Any] = before) -> Any:
                made = plan(tokens[m], SLOTS, previous_LRS=before[-1])
                before.append(made.replicas_LRS)
                return made

            some, results = timed(step)
            seconds["plan"] += some
            ratio["plan"] = float(np.mean([made.most_L / mean[m] for m, made in enumerate(results)]))

    us = {name: float(np.median(some)) / LAYERS * 1e6 for name, some in seconds.items() if some}
    result = {
        "us_per_layer": {name: round(value, 1) for name, value in us.items()},
        "times_plan": {name: round(value / us["plan"], 1) for name, value in us.items()},
        "max_over_mean": {name: round(ratio[name], 4) for name in us},
        "deepseek_sha256": hashlib.sha256(options.deepseek.read_bytes()).hexdigest() if options.deepseek else None,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "synthetic": True,
    }
    (ROOT / "bench/results/experts_eplb.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
