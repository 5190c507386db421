"""Experts on the virtual clock: the live policy on modelled ranks. Every number here is simulated, none is measured.

    python bench/experts_simulated.py                   # writes bench/results/experts_simulated.json, a few minutes

Synthetic load (outrider.lab.experts_load: specialised, seed 0), Qwen3-30B-A3B's shape (128 experts, top-8), 16 of its
48 layers, 6 micro-batches of 4,096 tokens a rank, recompute then update, two spare slots. Ranks stand in nodes of 8:
NVLink inside, InfiniBand between; rates as in experts/cost.py, host memory 50 GB/s a rank. Attention is left out, so
there is less to hide behind than there would be. The policy plans for itself as the passes come (`Foreseen`).

rings     step seconds by layers whose copies are held at once, at EP 8, 16 and 64
paths     weights from rank to rank, or out of host memory (put there first: `before_ms`), by stage
overlap   turns that wait for everything under way
1f1b      8 micro-batches, 4 in flight: copies are held until their backward pass, or fetched again
links     EP 8 on NVLink, on PCIe through the host, on InfiniBand
small     8 sequences in a micro-batch, however many ranks: 2,048 tokens a rank at EP 8, 256 at EP 64
model     the twin beside cost.modelled on the same plans: the policy's own, and one searched for modelled time

speedup: static homes / this, both simulated. of_even: an even gate's modelled seconds / this. frames_mb: what a rank's
frames take, gradients_mb: the most that its gradients did beside them (fp32); both for the model's 48 layers where all
layers are held. exposed_ms: turns that took longer because ranks waited, by stage; after_ms: last gradients home.
"""

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.experts import Policy, Settings
from outrider.experts.cost import LINKS, SHAPES, Cost, force_balanced_s, modelled
from outrider.experts.events import Began, Foreseen
from outrider.experts.schedule import StepPlan, assemble, with_homes
from outrider.experts.search import search
from outrider.lab.clock import Clock
from outrider.lab.experts_load import synthetic
from outrider.lab.twins.experts import ExpertsTwin
from outrider.lab.twins.ranks import Host

RESULT = Path(__file__).parents[1] / "bench/results/experts_simulated.json"
EXPERTS, LAYERS, WHOLE, BATCHES, SLOTS, NODE = 128, 16, 48, 6, 2, 8
COUNTED = 16_384  # tokens drawn for a micro-batch; each stands for more where there are more ranks
SHAPE = SHAPES["qwen3-30b-a3b"]


@cache
def load(ranks: int, small: bool = False, batches: int = BATCHES) -> Any:
    """2 sequences of 2,048 tokens a rank; small: 8 sequences in all."""
    sequences = 8 if small else 2 * ranks
    return synthetic(
        "specialised", ranks, 0, layers=LAYERS, micro_steps=batches, sequences=sequences, tokens=COUNTED // sequences
    )


def cost_of(ranks: int, links: str = "nvlink", small: bool = False) -> Cost:
    return Cost(LINKS[links], SHAPE, row_scale=1 if small else ranks * 4096 // COUNTED)


def plain(batches: int = BATCHES) -> list[Any]:
    return [(stage, m) for stage in ("recompute", "update") for m in range(batches)]


def in_flight(batches: int, depth: int) -> list[Any]:
    """Recompute, then 1F1B on a stage that has so many micro-batches in flight."""
    passes: list[Any] = [("recompute", m) for m in range(batches)]
    for m in range(batches + depth - 1):
        passes += [("forward", m)] * (m < batches) + [("backward", m - depth + 1)] * (m >= depth - 1)
    return passes


def twin_of(counts: Any, cost: Cost, passes: Any, given: StepPlan | None = None, **more: Any) -> ExpertsTwin:
    """`more` goes to the twin, or to the settings."""
    own = {name: more.pop(name) for name in ("host", "overlap") if name in more}
    _, layers, ranks, experts = counts.shape
    shape = Settings(layers, experts, ranks, **{"slots": SLOTS, "ranks_per_node": min(NODE, ranks), **more})
    twin = ExpertsTwin(Policy(shape), cost, Clock(), **own)
    twin.run(twin.step(counts if given is None else given, passes))
    return twin


def told(twin: ExpertsTwin, static_s: float, even_s: float) -> dict[str, Any]:
    """What a step came to, in ms and MB."""
    found, settings, layers = twin.outcome, twin.policy.settings, len(twin.layers)
    exposed = {"recompute": 0.0, "forward": 0.0, "backward": 0.0}
    for one in found.passes:
        forward = one.exposed_s if one.stage in ("recompute", "forward") else one.exposed_s[:-layers]
        exposed["recompute" if one.stage == "recompute" else "forward"] += sum(forward)
        exposed["backward"] += sum(one.exposed_s[len(forward) :])
    ring, owed = settings.ring or WHOLE + 1, found.gradients * 2 * SHAPE.expert_bytes / 1e6
    return {
        "step_ms": ms(found.seconds),
        "speedup": round(static_s / found.seconds, 3),
        "of_even": round(even_s / found.seconds, 3),
        "compute_ms": ms(found.compute_s),
        "exposed_ms": {stage: ms(seconds) for stage, seconds in exposed.items()},
        "before_ms": ms(found.before_s),
        "after_ms": ms(found.after_s),
        "lane_ms": ms(max(found.lane_s)),
        "batches": found.batches,
        "copies": found.copies,
        "moved_gb": round(sum(found.by_path.values()) / 1e9, 1),
        "frames_mb": round(settings.slots * ring * SHAPE.expert_bytes / 1e6),
        "gradients_mb": round(owed if settings.ring else owed * ring / (LAYERS + 1)),
    }  # fmt: skip


def ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 2)


class Case:
    """One load, its links and passes, and what static homes and an even gate take."""

    def __init__(self, ranks: int, links: str = "nvlink", small: bool = False, depth: int = 0) -> None:
        batches = 8 if depth else BATCHES
        self.counts, self.cost = load(ranks, small, batches), cost_of(ranks, links, small)
        self.passes = in_flight(batches, depth) if depth else plain(batches)
        self.static_s = twin_of(self.counts, self.cost, self.passes, slots=0).outcome.seconds
        home = plan_of_policy(self.counts, slots=0)
        self.even_s = force_balanced_s(self.counts, home, self.cost)

    def rows(self, **variants: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {"static_ms": ms(self.static_s), "even_ms": ms(self.even_s)}
        for name, more in variants.items():
            result[name] = told(twin_of(self.counts, self.cost, self.passes, **more), self.static_s, self.even_s)
            print(f"  {name:16} {json.dumps(result[name])}", flush=True)
        return result


RINGS = {"ring all": {}} | {f"ring {ring}": {"ring": ring} for ring in (8, 4, 3, 2)}
PATHS = {
    "direct, direct": {},
    "host, direct": {"recompute": "host"},
    "direct, host": {"update": "host"},
    "host, host": {"recompute": "host", "update": "host"},
    "host, direct, 200 GB/s a node": {"recompute": "host", "host": Host(50e9, 200e9)},
}


def plan_of_policy(counts: Any, slots: int = SLOTS) -> StepPlan:
    """The plan that the policy makes as passes come, as a StepPlan: copies that compute, and no others."""
    _, layers, ranks, experts = counts.shape
    policy = Policy(Settings(layers, experts, ranks, slots, ranks_per_node=min(NODE, ranks)))
    policy.handle(Foreseen(counts), 0)
    by_batch = [policy.handle(Began("recompute", m), 0)[-1].quotas for m in range(len(counts))]  # type: ignore[union-attr]
    hosts = []
    for rows in by_batch:
        copies = np.full((layers, ranks, slots), -1)
        away = np.unique(rows[policy.homes_LE[rows[:, 0], rows[:, 1]] != rows[:, 3]][:, [0, 3, 1]], axis=0)
        for at in range(layers):
            for rank in range(ranks):
                some = away[(away[:, 0] == at) & (away[:, 1] == rank), 2]
                copies[at, rank, : len(some)] = some
        hosts.append(with_homes(policy.homes_LE, copies))
    return assemble("policy", policy.homes_LE, hosts, by_batch, ranks_per_node=min(NODE, ranks))


def beside_the_model(ranks: int, small: bool = False, layers: int = 4) -> dict[str, Any]:
    """Twin and model on the same plans; fewer layers, since searching takes its time."""
    counts, cost = load(ranks, small)[:, :layers], cost_of(ranks, small=small)
    home, passes = plan_of_policy(counts, slots=0), plain()
    static_s, even_s = modelled(home, cost).total_s, force_balanced_s(counts, home, cost)
    result = {}
    searched = search(counts, SLOTS, objective="time", cost=cost, ranks_per_node=min(NODE, ranks))
    for name, plan in (("the policy's own", plan_of_policy(counts)), ("searched, time", searched)):
        found = modelled(plan, cost)
        twin = twin_of(counts, cost, passes, given=plan, slots=plan_slots(plan))
        seconds = twin.outcome.seconds - twin.outcome.before_s  # the model leaves optimizer state out
        result[name] = {
            "modelled_ms": ms(found.total_s),
            "modelled_speedup": round(static_s / found.total_s, 3),
            "modelled_of_even": round(even_s / found.total_s, 3),
            "modelled_waits_ms": ms(found.exposed_total_s),
            "simulated_ms": ms(seconds),
            "simulated_speedup": round(static_s / seconds, 3),
            "simulated_of_even": round(even_s / seconds, 3),
            "simulated_waits_ms": ms(seconds - twin.outcome.compute_s),
            "simulated_over_modelled": round(seconds / found.total_s, 4),
            "relocation_ms": ms(twin.outcome.before_s),
        }
        print(f"  {name:16} {json.dumps(result[name])}", flush=True)
    return result


def plan_slots(plan: StepPlan) -> int:
    """The most copies of one layer on a rank."""
    home = np.take_along_axis(plan.homes[:, None, None, :], plan.hosts.clip(min=0).astype(np.int64), axis=3)
    rank = np.arange(plan.shape[2])[:, None]
    return int(((plan.hosts >= 0) & (home != rank)).sum(axis=3).max())


def main() -> None:
    result: dict[str, Any] = {
        "simulated": True,
        "synthetic": True,
        "what": f"Qwen3-30B-A3B shape, {LAYERS} of {WHOLE} layers, specialised, seed 0; see bench/experts_simulated.py",
        "machine": f"{platform.machine()}, Python {platform.python_version()}: the numbers do not depend on it",
    }
    cost = msgspec.to_builtins(cost_of(8))
    result["assumed"] = {"nvlink": cost["links"], "flop_s": cost["flop_s"], "host_bytes_s": Host().bytes_s}
    for ranks in (8, 16, 64):
        print(f"EP {ranks}", flush=True)
        case = Case(ranks)
        result[f"rings, EP {ranks}"] = case.rows(**RINGS)
        result[f"paths, EP {ranks}"] = case.rows(**PATHS)
        result[f"overlap, EP {ranks}"] = case.rows(
            **{"ring all, none": {"overlap": False}, "ring 4, none": {"ring": 4, "overlap": False}}
        )
        result[f"1f1b, EP {ranks}"] = Case(ranks, depth=4).rows(
            **{k: RINGS[k] for k in ("ring all", "ring 8", "ring 4")}
        )
    for links in ("pcie", "ib"):
        print(links, flush=True)
        result[f"links, EP 8, {links}"] = Case(8, links).rows(**RINGS, **{"host, direct": PATHS["host, direct"]})
    for ranks in (8, 64):
        print(f"small, EP {ranks}", flush=True)
        result[f"small, EP {ranks}"] = Case(ranks, small=True).rows(**RINGS)
    for ranks, small in ((8, False), (8, True), (16, False), (64, False), (64, True)):
        name = f"model, EP {ranks}{', small' if small else ''}"
        print(name, flush=True)
        result[name] = beside_the_model(ranks, small)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
