"""What `outrider experts bench` measures on this machine, in a minute. A door; called by commands.py.

    section   what
    counting  routes to counts, one thread
    planning  counts to plans, and the quality reached: ours, our compiled EPLB each micro-step, static; one thread
    copies    memcpy; an expert from host memory into a slot, on the CPU and on a device if there is one; one thread
    compute   flop/s of an expert's three products, one thread
    links     gloo's all_to_all_single between processes over loopback: rates for a TOML file that --links takes

Every figure is measured, here and in this run. A section is one function from `Bench` to a dict that JSON can hold;
SECTIONS lists them in order, tables.py has the words for each.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError, WorldError
from outrider.experts import loopback, machine, study
from outrider.experts.adapters import read
from outrider.experts.cost import shape_of
from outrider.experts.eplb import rebalance_experts
from outrider.experts.foresee import counts
from outrider.experts.routing import Routing
from outrider.experts.score import score

PLANNERS = (study.OURS, "eplb-oracle", "static")
SEQUENCES = 8  # of a made-up micro-batch
MICRO_STEPS = 8  # made up
ROUNDS = 3  # measure at least so often
LIVE_BYTES = 1 << 28  # sent at once by all ranks together, at most
CHUNK = 1 << 16  # tokens drawn at once


class Regime(msgspec.Struct, frozen=True):
    """Made-up gates: an expert of popularity rank i has weight i ** -zipf; each sequence multiplies the weights by
    log-normal tastes of its own, sigma `taste`."""

    zipf: float
    taste: float


REGIMES = MappingProxyType({"mild": Regime(0.3, 0.2), "skewed": Regime(0.7, 0.2), "specialised": Regime(0.7, 1.5)})


class Asked(msgspec.Struct, frozen=True):
    """What is asked; `outrider experts bench --help` says it all. regime to layers: of the load that is made up where
    there is no file of routes; enough_s: each figure is measured for so long."""

    routing: Path | None = None
    ranks: int = 32
    slots: int = 2
    tokens: int = 8192
    regime: str = "skewed"
    experts: int = 128
    top_k: int = 8
    layers: int = 8
    model: str = "qwen3-30b-a3b"
    ranks_live: int = 2
    format: str | None = None
    domain: str | None = None
    enough_s: float = 0.5


class Bench(msgspec.Struct, frozen=True, eq=False):
    """What a section sees: what was asked, and the routes."""

    asked: Asked
    routing: Routing

    def timed_s(self, call: Callable[[], Any]) -> float:
        """Median seconds of a call, once it has run before."""
        call()
        times_s: list[float] = []
        while len(times_s) < ROUNDS or sum(times_s) < self.asked.enough_s:
            began_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - began_s)
        return statistics.median(times_s)


def run(asked: Asked, progress: Callable[[str], None] = lambda section: None) -> dict[str, Any]:
    """Measure everything; what `--json` prints. progress: the section that begins."""
    if asked.regime not in REGIMES:
        raise CallerError(f"--regime {asked.regime}: none of {', '.join(REGIMES)}. Name one of them.")
    if not 0 < asked.top_k <= asked.experts:
        raise CallerError(f"--top-k {asked.top_k} of {asked.experts} experts: give 1 to {asked.experts}.")
    if asked.ranks_live == 1:
        raise CallerError("--ranks-live 1: one process has no other to send to. Give 2 or more, or 0 to leave it out.")
    shape_of(asked.model)
    progress("load")
    routing = read(asked.routing, asked.format, asked.domain) if asked.routing else made_up(asked)
    bench = Bench(asked, routing)
    result: dict[str, Any] = {"machine": machine.describe(), "load": _load(bench)}
    for name, section in SECTIONS.items():
        progress(name)
        result[name] = section(bench)
    return result


def made_up(asked: Asked, micro_steps: int = MICRO_STEPS, seed: int = 0) -> Routing:
    """Synthetic, seeded: top_k different experts a token, drawn without replacement by its sequence's weights."""
    regime = REGIMES[asked.regime]
    tokens, sequences = asked.tokens * micro_steps, SEQUENCES * micro_steps
    offsets_S1 = np.linspace(0, tokens, sequences + 1).astype(np.int64)
    sequence_T = np.repeat(np.arange(sequences), np.diff(offsets_S1))
    routes_TLK = np.empty((tokens, asked.layers, asked.top_k), dtype=np.int16 if asked.experts <= 1 << 15 else np.int32)
    for layer in range(asked.layers):
        rng = np.random.default_rng((seed, layer))
        popular_E = rng.permutation(np.arange(1, asked.experts + 1) ** -regime.zipf)
        weight_SE = popular_E * rng.lognormal(0, regime.taste, (sequences, asked.experts))
        for at in range(0, tokens, CHUNK):
            weight_TE = weight_SE.astype(np.float32)[sequence_T[at : at + CHUNK]]
            waits_TE = rng.standard_exponential(weight_TE.shape, dtype=np.float32) / weight_TE
            routes_TLK[at : at + CHUNK, layer] = np.argpartition(waits_TE, asked.top_k - 1, axis=1)[:, : asked.top_k]
    return Routing.of(routes_TLK, offsets_S1, experts=asked.experts, notes=("synthetic routes",))


def links_toml(result: Mapping[str, Any]) -> str:
    """The measured links as a file for `--links`; says where and how. WorldError where they were not measured."""
    links, here = result["links"], result["machine"]
    if not links["measured"]:
        raise WorldError(f"--links-out: {links['why']}")
    compute = result["compute"]
    return (
        f"# Measured by `outrider experts bench` on {here['name']} ({here['processor']}, {here['cores']} cores),"
        f" {here['date']}:\n"
        f"# {links['how']}.\n"
        "# near and far are the same: one machine has no slower links between nodes.\n"
        f"near_bytes_s = {links['near_bytes_s']:.4g}\n"
        f"far_bytes_s = {links['far_bytes_s']:.4g}\n"
        f"latency_s = {links['latency_s']:.3g}\n"
        f"# Not read from here: on one thread an expert of {compute['model']} reached"
        f" {compute['bfloat16_flop_s']:.3g} flop/s in bfloat16, {compute['float32_flop_s']:.3g} in float32.\n"
    )


def _load(bench: Bench) -> dict[str, Any]:
    routing, asked = bench.routing, bench.asked
    return {
        "synthetic": asked.routing is None,
        "regime": asked.regime if asked.routing is None else None,
        "file": str(asked.routing) if asked.routing else None,
        "layers": routing.layers,
        "experts": routing.experts,
        "top_k": routing.top_k,
        "ranks": asked.ranks,
        "slots": asked.slots,
        "microbatch_tokens": asked.tokens,
        "micro_steps": routing.tokens // asked.tokens,
    }


def _counting(bench: Bench) -> dict[str, Any]:
    routing, asked = bench.routing, bench.asked
    took_s = bench.timed_s(lambda: counts(routing, asked.ranks, asked.tokens))
    cells = routing.tokens // asked.tokens * routing.layers
    slots = cells * asked.tokens * routing.top_k
    return {"us_per_layer": took_s * 1e6 / cells, "ns_per_token_slot": took_s * 1e9 / slots}


def _planning(bench: Bench) -> dict[str, Any]:
    """Each planner in turn: median microseconds of a micro-step, a layer; of the whole step; what it reached."""
    asked = bench.asked
    counts_MLRE = counts(bench.routing, asked.ranks, asked.tokens)
    found: dict[str, Any] = {}
    for name in PLANNERS:
        ask = study.Study(ranks=asked.ranks, ranks_per_node=asked.ranks, slots=asked.slots, planner=name)
        try:
            found[name] = _planned(counts_MLRE, ask, 10 * asked.enough_s)
        except CallerError as error:  # a rival's layout may not exist for these numbers
            found[name] = {"measured": False, "why": str(error)}
    return {"planners": found, "eplb_placement_us_per_layer": _eplb_us(counts_MLRE, bench)}


def _planned(counts_MLRE: Any, ask: study.Study, most_s: float) -> dict[str, Any]:
    study.plan(study.Counted(counts_MLRE[:1], 0.0, ()), ask)  # compiles, or loads what was compiled
    us: list[float] = []
    took_s: list[float] = []
    while not us or (len(us) < ROUNDS and sum(took_s) < most_s):
        began_s = time.perf_counter()
        plan, plan_us = study.plan(study.Counted(counts_MLRE, 0.0, ()), ask)
        took_s.append(time.perf_counter() - began_s)
        us.append(plan_us)
    figures = score(plan, counts_MLRE)
    return {
        "measured": True,
        "us_per_layer": statistics.median(us),
        "step_s": statistics.median(took_s),
        **{key: figures[key] for key in ("imbalance", "over_bound", "copies_per_layer_microstep")},
    }


def _eplb_us(counts_MLRE: Any, bench: Bench) -> float | None:
    """The drop-in alone: one micro-step's totals in, a placement out, no split; None where EPLB has no layout."""
    asked, load_LE = bench.asked, counts_MLRE[0].sum(axis=1)
    layers, experts = load_LE.shape
    replicas = (experts // asked.ranks + asked.slots) * asked.ranks  # as many on every rank, as peers.py has it
    if replicas < experts:
        return None
    return bench.timed_s(lambda: rebalance_experts(load_LE, replicas, 1, 1, asked.ranks)) * 1e6 / int(layers)


def _copies(bench: Bench) -> dict[str, Any]:
    shape = shape_of(bench.asked.model)
    return {"model": bench.asked.model, "expert_bytes": shape.expert_bytes, **machine.copies(shape, bench.timed_s)}


def _compute(bench: Bench) -> dict[str, Any]:
    return {"model": bench.asked.model, **machine.compute(shape_of(bench.asked.model), bench.timed_s)}


def _links(bench: Bench) -> dict[str, Any]:
    ranks = bench.asked.ranks_live
    if not ranks:
        return {"measured": False, "why": "links were left out by --ranks-live 0."}
    part_bytes = min(shape_of(bench.asked.model).expert_bytes, LIVE_BYTES // ranks**2)
    try:
        latency_s, expert_s = loopback.measure(ranks, (1, part_bytes))
    except WorldError as error:
        return {"measured": False, "why": str(error)}
    rate = (ranks - 1) * part_bytes / max(expert_s - latency_s, 1e-9)
    return {
        "measured": True,
        "ranks": ranks,
        "how": f"{ranks} gloo processes over loopback, one thread each, {part_bytes / 1e6:.3g} MB to each other rank",
        "near_bytes_s": rate,
        "far_bytes_s": rate,
        "latency_s": latency_s,
    }


SECTIONS: Mapping[str, Callable[[Bench], dict[str, Any]]] = MappingProxyType(
    {"counting": _counting, "planning": _planning, "copies": _copies, "compute": _compute, "links": _links}
)
