"""Planning micro-steps: how long, how even, how many copies; and what it would be worth on 64 ranks. Synthetic load.

    taskset -c 0 python bench/experts_plan.py --part planning --deepseek /path/to/EPLB/eplb.py
    python bench/experts_plan.py --part study                       # both write into bench/results/experts_plan.json

planning  128 experts, 32 ranks, 2 spare slots, top-8, 8 sequences of 2,048 tokens a micro-batch, in one node and in
          nodes of 8; the regimes of outrider.lab.experts_load. Token counts by source in; copies, exact split by
          source, certificate and recount out. Microseconds a layer and micro-step, one core, medians over micro-steps
          and rounds; rounds alternate between planners. Beside it on the same loads: DeepSeek's program itself, if its
          file is named, and our own compiled drop-in of EPLB (bench/experts_eplb.py has vLLM's too); they place, and
          split evenly for nothing. over_bound: largest rank load / ceil(mean).
          copies: (expert, rank) pairs absent one micro-step before. Linear in layers: the same at 8 to 64 layers.
study     64 ranks in nodes of 8, specialised, 24 micro-steps, 2 layers, 2 slots, objective `time`: seconds of the cost
          model, nothing is measured. speedup: static / planned; of_even: an even gate (every source sends every expert
          as much, experts at home, nothing moves, whole tiles) / planned, and the same by the twin of the mover, an
          event-driven simulation of the very policy (lab/twins/experts.py). A base case, and one assumption changed at
          a time. where: microseconds a layer and forward pass at the slowest rank, for the plan and for an even gate.
search    seconds of that search, base case, one seed, one core.
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

from outrider.experts import Policy, Settings, contiguous_homes, plan, rebalance_experts
from outrider.experts.cost import LINKS, PASSES, SHAPES, Cost, force_balanced_s, modelled
from outrider.experts.plan import HORIZON
from outrider.experts.schedule import StepPlan
from outrider.experts.search import search
from outrider.experts.ways import Way
from outrider.lab.clock import Clock
from outrider.lab.experts_load import REGIMES, synthetic
from outrider.lab.twins.experts import ExpertsTwin

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench/results/experts_plan.json"
EXPERTS, RANKS, SLOTS, LAYERS, STEPS, ROUNDS = 128, 32, 2, 16, 8, 4
COPIES = EXPERTS + RANKS * SLOTS
SEEDS, STUDY_RANKS, STUDY_NODE, STUDY_LAYERS = range(5), 64, 8, 2
BASE = Cost(LINKS["nvlink"], SHAPES["qwen3-30b-a3b"])
STUDY = "study, modelled: 64 ranks in nodes of 8, seeds 0-4"


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


def study_load(seed: int) -> Any:
    return synthetic("specialised", STUDY_RANKS, seed, layers=STUDY_LAYERS)


def on_all_ranks(counts: Any) -> Any:
    """The same token-slots, each sequence's dealt to all ranks alike: no node has likes of its own."""
    load = counts.sum(axis=2)
    even = np.repeat(load[:, :, None] // STUDY_RANKS, STUDY_RANKS, axis=2)
    for m, layer in np.ndindex(load.shape[:2]):
        left = np.repeat(np.arange(EXPERTS), load[m, layer] % STUDY_RANKS)
        np.add.at(even[m, layer], (np.arange(len(left)) % STUDY_RANKS, left), 1)
    return even


def planned(counts: Any, cost: Cost) -> StepPlan:
    return search(counts, SLOTS, objective="time", cost=cost, ranks_per_node=STUDY_NODE)


def where(found: StepPlan, cost: Cost) -> dict[str, float]:
    """Microseconds a layer and forward pass, means over layers and micro-steps; waits as shares of the four passes."""
    layers, steps, ranks, experts = found.shape
    layer, m, _, expert, rank, tokens = found.quota.astype(np.int64).T
    at = np.zeros((layers, steps, experts, ranks))
    np.add.at(at, (layer, m, expert, rank), tokens)
    rows, passes = np.ceil(at / cost.tile_rows) * cost.tile_rows, PASSES * layers * steps
    seen = modelled(found, cost)
    slow = seen.rank_s.argmax(axis=2)
    own = {
        "compute": cost.row_s * at.sum(axis=2),
        "padding": cost.row_s * (rows - at).sum(axis=2),
        "launches": cost.launch_s * (at > 0).sum(axis=2),
    }
    parts = {name: np.take_along_axis(s, slow[..., None], axis=2).mean() for name, s in own.items()}
    parts["tokens on links"] = seen.layer_s.mean() - sum(parts.values())
    parts["waits for first copies"] = seen.recompute_wait_s[:, 0].sum() / passes
    parts["waits for last gradients"] = seen.last_wait_s.sum() / passes
    parts["waits between"] = (seen.recompute_wait_s[:, 1:].sum() + seen.update_wait_s.sum()) / passes
    return {name: round(float(s) * 1e6, 1) for name, s in parts.items()}


def where_even(counts: Any, cost: Cost) -> dict[str, float]:
    share = counts.sum(axis=(2, 3)).mean() / STUDY_RANKS
    beyond, others = 1 - STUDY_NODE / STUDY_RANKS, 1 - 1 / STUDY_RANKS
    parts = {
        "compute": cost.row_s * share,
        "launches": cost.launch_s * EXPERTS / STUDY_RANKS,
        "tokens on links": share * (others * cost.near_s + beyond * cost.far_s),
    }
    return {name: round(float(s) * 1e6, 1) for name, s in parts.items()}


def by_the_twin(found: StepPlan, cost: Cost) -> float:
    """Seconds of the step on the virtual clock."""
    layers, steps, ranks, experts = found.shape
    twin = ExpertsTwin(Policy(Settings(layers, experts, ranks, SLOTS, ranks_per_node=STUDY_NODE)), cost, Clock())
    twin.run(twin.step(found, [(stage, m) for stage in ("recompute", "update") for m in range(steps)]))
    return twin.outcome.seconds


def study() -> dict[str, Any]:
    change = msgspec.structs.replace
    cases = {"base: nvlink, tile 128, 400 Tflop/s, launch 0.2 us": BASE}
    cases |= {f"tile {rows}": change(BASE, tile_rows=rows) for rows in (1, 64)}
    cases |= {f"{flop / 1e12:.0f} Tflop/s": change(BASE, flop_s=flop) for flop in (200e12, 800e12)}
    cases |= {"launch 2 us": change(BASE, launch_s=2e-6), "sequences on all ranks": BASE}
    cases |= {name: change(BASE, links=LINKS[name]) for name in ("pcie", "ib")}
    beside = "copies beside tokens"
    cases |= {f"{name}, {beside}": change(BASE, links=LINKS[name], shared_links=False) for name in LINKS}
    result: dict[str, Any] = {name: {"speedup": [], "of_even": []} for name in cases}
    base = result[next(iter(cases))]
    base |= {"of_even_by_the_twin": [], "where": [], "where_even": where_even(study_load(0), BASE)}
    for seed in SEEDS:
        counts = study_load(seed)
        for name, cost in cases.items():
            table = on_all_ranks(counts) if name == "sequences on all ranks" else counts
            found, static = planned(table, cost), at_home(table, STUDY_RANKS)
            even_s, seconds = force_balanced_s(table, static, cost), modelled(found, cost).total_s
            result[name]["speedup"].append(round(modelled(static, cost).total_s / seconds, 3))
            result[name]["of_even"].append(round(even_s / seconds, 4))
            if result[name] is base:
                base["of_even_by_the_twin"].append(round(even_s / by_the_twin(found, cost), 4))
                base["where"].append(where(found, cost))
            print(seed, name, {key: some[-1] for key, some in result[name].items() if key != "where_even"}, flush=True)
    return result


def searching() -> dict[str, float]:
    """Seconds of one search, compiled and warm."""
    counts = study_load(0)
    planned(counts[:2], BASE)
    began_s = time.perf_counter()
    planned(counts, BASE)
    return {"seconds": round(time.perf_counter() - began_s, 2), "layers": STUDY_LAYERS, "micro_steps": len(counts)}


def at_home(counts: Any, ranks: int) -> StepPlan:
    homes = np.tile(contiguous_homes(EXPERTS, ranks), (counts.shape[1], 1))
    return Way(counts, np.zeros(ranks, dtype=np.int64), STUDY_NODE, (), lambda: None).walk(homes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["planning", "study", "search", "both"], default="both")
    parser.add_argument("--deepseek", type=Path, help="eplb.py of a clone of deepseek-ai/EPLB")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "synthetic": True,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
    }
    if options.part in ("planning", "both"):
        result["planning"] = planning(options.deepseek)
    if options.part in ("search", "both"):
        result["search, time, 64 ranks in nodes of 8"] = searching()
    if options.part in ("study", "both"):
        result[STUDY] = study()
    other = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(other | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
