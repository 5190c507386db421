"""Planning micro-steps: how long, how even, how many copies; and what it would be worth on 64 ranks. Synthetic load.

    flock /work/measure.lock taskset -c 0 python bench/experts_plan.py --part planning --deepseek /path/to/EPLB/eplb.py
    python bench/experts_plan.py --part study                       # both write into bench/results/experts_plan.json

planning  128 experts, 32 ranks, 2 spare slots, top-8, 8 sequences of 2,048 tokens a micro-batch, in one node and in
          nodes of 8; the regimes of outrider.lab.experts_load. Token counts by source in; copies, exact split by
          source, certificate and recount out. Microseconds a layer and micro-step, one core, medians over micro-steps
          and rounds; rounds alternate between planners. Beside it on the same loads: DeepSeek's program itself, if its
          file is named, and our own compiled drop-in of EPLB (bench/experts_eplb.py has vLLM's too); they place, and
          split evenly for nothing. over_bound: largest rank load / ceil(mean).
          copies: (expert, rank) pairs absent one micro-step before. Linear in layers: the same at 8 to 64 layers.
study     64 ranks in nodes of 8, specialised, objective `time`: seconds of the cost model, nothing is measured.
          speedup: static / planned; of_even: an even gate / planned. A base case, and one assumption changed at a time.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from experts_eplb import imbalance, peer

from outrider.experts import contiguous_homes, plan, rebalance_experts
from outrider.experts.cost import LINKS, SHAPES, Cost, force_balanced_s, modelled
from outrider.experts.schedule import StepPlan
from outrider.experts.search import search
from outrider.experts.ways import HORIZON, Way
from outrider.lab.experts_load import REGIMES, synthetic

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench/results/experts_plan.json"
EXPERTS, RANKS, SLOTS, LAYERS, STEPS, ROUNDS = 128, 32, 2, 16, 8, 2
COPIES = EXPERTS + RANKS * SLOTS
SEEDS, STUDY_STEPS, STUDY_LAYERS = range(5), 6, 2
BASE = Cost(LINKS["nvlink"], SHAPES["qwen3-30b-a3b"])


def walk(counts: Any, per_node: int) -> tuple[list[float], list[Any]]:
    """Seconds and plan of each micro-step, one after the other, with what lies ahead."""
    load, before = counts.sum(axis=2), None
    seconds, plans = [], []
    for m, now in enumerate(counts):
        ahead = load[m + 1 : m + 1 + HORIZON]
        began_s = time.perf_counter()
        made = plan(now, SLOTS, previous_LRS=before, ahead_HLE=ahead, ranks_per_node=per_node)
        seconds.append(time.perf_counter() - began_s)
        plans.append(made)
        before = made.replicas_LRS
    return seconds, plans


def us(seconds: list[float], layers: int = LAYERS) -> float:
    return round(float(np.median(seconds)) / layers * 1e6, 1)


def held(place: Any) -> Any:
    """[layers, ranks, experts] from the experts in all slots, EPLB's way."""
    on = np.zeros((len(place), RANKS, EXPERTS), dtype=np.bool_)
    layer, slot = np.indices(place.shape)
    on[layer, slot // (COPIES // RANKS), place] = True
    return on


def planning(deepseek: Path | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for regime in REGIMES:
        counts = synthetic(regime, RANKS, 0, layers=LAYERS, micro_steps=STEPS)
        load = counts.sum(axis=2)
        least = -(-load.sum(axis=2) // RANKS)
        seconds: dict[str, list[float]] = {}
        plans: dict[str, list[Any]] = {}
        placed: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            loads = Path(folder) / "loads.npy"
            np.save(loads, load)
            for turn in range(ROUNDS + 1):  # the first compiles and warms up
                took: dict[str, list[float]] = {}
                for name, per_node in (("one node", RANKS), ("nodes of 8", 8)):
                    took[name], plans[name] = walk(counts, per_node)
                took["EPLB, drop-in"] = []
                for some in load:
                    began_s = time.perf_counter()
                    place = rebalance_experts(some, COPIES, 1, 1, RANKS)[0]
                    took["EPLB, drop-in"].append(time.perf_counter() - began_s)
                    placed.setdefault("EPLB, drop-in", []).append(place)
                if deepseek:
                    took["EPLB, DeepSeek's"], placed["EPLB, DeepSeek's"] = peer(sys.executable, str(deepseek), loads)
                if turn:
                    for name, some in took.items():
                        seconds.setdefault(name, []).extend(some)
        static = [
            np.bincount(contiguous_homes(EXPERTS, RANKS), some, RANKS).max() / some.sum() * RANKS
            for some in load.reshape(-1, EXPERTS)
        ]
        rows: dict[str, Any] = {"static": {"max_over_mean": round(float(np.mean(static)), 4)}}
        for name, made in plans.items():
            over = np.stack([one.most_L for one in made]) / least
            rows[name] = {
                "us_per_layer": us(seconds[name]),
                "over_bound_mean": round(float(over.mean()), 5),
                "over_bound_p95": round(float(np.percentile(over, 95)), 5),
                "copies_per_layer": round(sum(len(one.moves) for one in made) / over.size, 2),
            }
        for name, places in placed.items():
            mine = np.array(places[-STEPS:])
            on = np.stack([held(place) for place in mine])
            rows[name] = {
                "us_per_layer": us(seconds[name]),
                "times_ours": round(us(seconds[name]) / rows["one node"]["us_per_layer"], 1),
                "max_over_mean": round(imbalance(load, mine), 4),
                "copies_per_layer": round(float((on[1:] & ~on[:-1]).sum() / (STEPS - 1) / LAYERS), 2),
            }
        linear = {}
        for layers in (8, 16, 32, 64):
            table = np.tile(counts, (1, layers // LAYERS + 1, 1, 1))[:, :layers].copy()
            walk(table, RANKS)
            linear[str(layers)] = us(walk(table, RANKS)[0] + walk(table, RANKS)[0], layers)
        result[regime] = rows | {"us_per_layer_by_layers": linear}
        print(regime, json.dumps(result[regime], indent=1), flush=True)
    return result


def study() -> dict[str, Any]:
    cases = {"base: nvlink, tile 128, 400 Tflop/s": BASE}
    cases |= {f"tile {rows}": msgspec.structs.replace(BASE, tile_rows=rows) for rows in (1, 64)}
    cases |= {f"{flop / 1e12:.0f} Tflop/s": msgspec.structs.replace(BASE, flop_s=flop) for flop in (200e12, 800e12)}
    cases |= {name: msgspec.structs.replace(BASE, links=LINKS[name]) for name in ("pcie", "ib")}
    speedup: dict[str, list[float]] = {name: [] for name in cases}
    of_even: dict[str, list[float]] = {name: [] for name in cases}
    for seed in SEEDS:
        counts = synthetic("specialised", 64, seed, layers=STUDY_LAYERS, micro_steps=STUDY_STEPS)
        static = at_home(counts, 64)
        for name, cost in cases.items():
            found = search(counts, SLOTS, objective="time", cost=cost, ranks_per_node=8)
            seconds = modelled(found, cost).total_s
            speedup[name].append(round(modelled(static, cost).total_s / seconds, 3))
            of_even[name].append(round(force_balanced_s(counts, static, cost) / seconds, 4))
            print(seed, name, speedup[name][-1], of_even[name][-1], flush=True)
    return {name: {"speedup": speedup[name], "of_even": of_even[name]} for name in cases}


def at_home(counts: Any, ranks: int) -> StepPlan:
    homes = np.tile(contiguous_homes(EXPERTS, ranks), (counts.shape[1], 1))
    return Way(counts, np.zeros(ranks, dtype=np.int64), 8, (), lambda: None).walk(homes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["planning", "study", "both"], default="both")
    parser.add_argument("--deepseek", type=Path, help="eplb.py of a clone of deepseek-ai/EPLB")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {
        "synthetic": True,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
    }
    if options.part != "study":
        result["planning"] = planning(options.deepseek)
    if options.part != "planning":
        result["study, modelled: 64 ranks in nodes of 8, seeds 0-4"] = study()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
