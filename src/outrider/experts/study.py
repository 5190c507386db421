"""One planning study: read routes, count, plan with a named planner, time it, score it. A door; called by `cli`.

Times are measured here on this machine, a layer and micro-step each: `plan_us_per_layer`, the median of planning one,
counts in, checked quotas and certificate out; `search_us_per_layer`, all that was tried and compared.
Seconds under `modelled` names are the cost model's, never measured.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters import plans, read
from outrider.experts.cost import Cost, new_copies, shape_of
from outrider.experts.events import Array
from outrider.experts.foresee import counts
from outrider.experts.peers import PEERS, make
from outrider.experts.plan import contiguous_homes, slots_of
from outrider.experts.schedule import Small, StepPlan, assemble
from outrider.experts.score import score, seconds
from outrider.experts.search import search
from outrider.experts.ways import NOTHING, RELOCATION, REPLICAS, SPLIT

OURS = "foresight"


class Study(msgspec.Struct, frozen=True):
    """What is asked; `outrider experts plan --help` says it all. Slots are spare ones of every rank."""

    ranks: int
    ranks_per_node: int
    slots: int = 2
    microbatch_tokens: int | None = None
    microbatch_seqs: int | None = None
    format: str | None = None
    domain: str | None = None
    experts: int | None = None
    planner: str = OURS
    objective: str = "balance"
    links: str = "nvlink"
    model: str = "qwen3-30b-a3b"
    row_scale: int = 1
    excluded: tuple[int, ...] = ()

    @property
    def cost(self) -> Cost:
        return Cost(plans.links_of(self.links), shape_of(self.model), row_scale=self.row_scale)


class Counted(msgspec.Struct, frozen=True, eq=False):
    """Routes counted for one EP group; count_us: microseconds a layer and micro-step."""

    counts_MLRE: Array
    count_us: float
    notes: tuple[str, ...]


def count(path: Path, study: Study) -> Counted:
    """Read and count. CallerError for a file that is no routing table, and sizes that do not fit it."""
    if study.ranks < 1 or study.ranks_per_node < 1 or study.ranks % study.ranks_per_node:
        raise CallerError(
            f"ranks {study.ranks} in nodes of {study.ranks_per_node}. Give an EP size that its nodes divide."
        )
    routing = read(path, study.format, study.domain)

    def once() -> Array:
        return counts(routing, study.ranks, study.microbatch_tokens, study.microbatch_seqs, experts=study.experts)

    once()  # compiles, or loads what was compiled
    began_s = time.perf_counter()
    table = once()
    took_s = time.perf_counter() - began_s
    return Counted(table, took_s * 1e6 / (table.shape[0] * table.shape[1]), routing.notes)


def plan(counted: Counted, study: Study, progress: Callable[[], None] = lambda: None) -> tuple[StepPlan, float]:
    """The plan, and the median microseconds that planning took a layer and micro-step."""
    ticks_s = [time.perf_counter()]

    def tick() -> None:
        ticks_s.append(time.perf_counter())
        progress()
        ticks_s[-1] += time.perf_counter() - ticks_s[-1]  # what the progress bar took is not planning

    table = counted.counts_MLRE
    if study.planner == OURS:
        found = search(
            table,
            study.slots,
            objective=study.objective,
            cost=study.cost,
            ranks_per_node=study.ranks_per_node,
            excluded=study.excluded,
            progress=tick,
        )
    else:
        if study.excluded or study.objective != "balance":
            raise CallerError(f"planner {study.planner}: it knows no --exclude and no --objective. Use {OURS}.")
        slots_R = slots_of(study.slots, study.ranks)
        peer = make(study.planner, table, slots_R, study.ranks_per_node, study.row_scale)
        steps = []
        for m in range(len(table)):
            steps.append(peer.step(m))
            tick()
        width = max(hosts.shape[2] for hosts, _ in steps)
        hosts_M = [np.pad(h, ((0, 0), (0, 0), (0, width - h.shape[2])), constant_values=-1) for h, _ in steps]
        rows_M = [rows for _, rows in steps]
        found = assemble(study.planner, peer.homes_LE, hosts_M, rows_M, ranks_per_node=study.ranks_per_node)
        found = msgspec.structs.replace(found, tiers=_tiers(found))
    return found, statistics.median(np.diff(ticks_s).tolist()) * 1e6 / table.shape[1]


def run(path: Path, study: Study, progress: Callable[[], None] = lambda: None) -> tuple[StepPlan, dict[str, Any]]:
    """Plan the routes of a file; the plan and what `--json` prints."""
    if study.planner not in (OURS, *PEERS):
        raise CallerError(f"planner {study.planner}: none of {', '.join((OURS, *PEERS))}. Name one of them.")
    counted = count(path, study)
    plan(msgspec.structs.replace(counted, counts_MLRE=counted.counts_MLRE[:1]), study)  # compiles, or loads it
    began_s = time.perf_counter()
    found, plan_us = plan(counted, study, progress)
    search_us = (time.perf_counter() - began_s) * 1e6 / found.most.size
    found.validate(counted.counts_MLRE)
    layers, steps, ranks, experts = found.shape
    return found, {
        "planner": found.planner,
        "objective": study.objective,
        "layers": layers,
        "micro_steps": steps,
        "ranks": ranks,
        "experts": experts,
        "slots": study.slots,
        "links": study.links,
        "model": study.model,
        "row_scale": study.row_scale,
        **score(found, counted.counts_MLRE, study.excluded),
        **seconds(found, counted.counts_MLRE, study.cost),
        "plan_us_per_layer": plan_us,
        "search_us_per_layer": search_us,
        "count_us_per_layer": counted.count_us,
        "modelled": "bytes_moved, modelled_s, force_balanced_s and exposed_s come from a cost model, not a clock",
        "notes": list(counted.notes),
    }


def _tiers(found: StepPlan) -> Small:
    """[L, M] the cheapest tier that describes what a rival did."""
    _, _, ranks, experts = found.shape
    tiers_LM = np.full(found.most.shape, NOTHING, dtype=np.int32)
    layer, m, expert, rank = found.quota[:, [0, 1, 3, 4]].T
    away = found.homes[layer, expert] != rank
    tiers_LM[layer[away], m[away]] = SPLIT
    tiers_LM[new_copies(found).any(axis=(2, 3))] = REPLICAS
    tiers_LM[(found.homes != contiguous_homes(experts, ranks)).any(axis=1), 0] = RELOCATION
    return tiers_LM
