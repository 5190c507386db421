"""Counting routes: microseconds per layer and micro-batch, and host memory at a million tokens.

    python bench/experts_counts.py            # writes bench/results/experts_counts.json

limit     one pass of numpy's `max` over the same bytes: reading the table, and nothing else
peer      numpy.bincount per layer and source rank, on one micro-batch (ids widened to int64, as bincount asks)
outrider  `counts` over the whole table

Routes are synthetic: distinct ids a row, log-normal popularity (sigma 0.8), 128 experts, top 8, 48 layers, 1M tokens.
Memory: peak growth of the resident set of a process that reads the table from a file and counts it, over the bytes of
the table, for our own file (uint8) and for a padded veRL batch (int16, 64 sequences).
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from outrider.experts.adapters import members, read
from outrider.experts.foresee import counts, source_edges
from outrider.experts.routing import Routing

TOKENS, LAYERS, TOP_K, EXPERTS, RANKS, ROUNDS = 1 << 20, 48, 8, 128, 32, 3
SIZES = (1024, 4096, 16_384, 131_072)
RESULT = Path(__file__).parent / "results" / "experts_counts.json"
DATA = Path(__file__).parents[2] / "shared" / "data" / "moe-routing-deepseek-v2-lite" / "routing.npz"


def synthetic(tokens: int) -> Any:
    """Rows drawn from a pool of 65,536."""
    rng = np.random.default_rng(0)
    heat = rng.normal(0, 0.8, EXPERTS) + rng.gumbel(size=(65_536, EXPERTS))
    pool = np.argpartition(-heat, TOP_K, axis=1)[:, :TOP_K].astype(np.uint8)
    routes = np.empty((tokens, LAYERS, TOP_K), dtype=np.uint8)
    for at in range(0, tokens, 65_536):
        routes[at : at + 65_536] = pool[rng.integers(0, len(pool), (min(65_536, tokens - at), LAYERS))]
    return routes


def timed(run: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def peer(block: Any) -> Any:
    """[layers, ranks, experts] of one micro-batch."""
    edges = source_edges(len(block), RANKS)
    return np.array(
        [
            [np.bincount(block[edges[q] : edges[q + 1], layer].ravel(), minlength=EXPERTS) for q in range(RANKS)]
            for layer in range(LAYERS)
        ]
    )


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def child(small: Path, large: Path) -> None:
    """Read and count in this process; one line of JSON."""
    counts(read(small), RANKS, microbatch_tokens=64)  # imports and compiled code do not count
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    began_s = time.perf_counter()
    routing = read(large)
    read_s = time.perf_counter() - began_s
    counted = counts(routing, RANKS, microbatch_tokens=routing.tokens // 64)
    grown = resident_bytes("VmHWM") - before
    sizes = {"table_mb": routing.routes_TLK.nbytes / 1e6, "counts_mb": counted.nbytes / 1e6}
    print(json.dumps({"peak_over_table": grown / routing.routes_TLK.nbytes, "read_s": read_s, **sizes}))


def memory(routes: Any) -> dict[str, Any]:
    result = {}
    with tempfile.TemporaryDirectory() as name:
        for form in ("outrider", "verl"):
            paths = []
            for tokens in (256, len(routes)):
                paths.append(path := Path(name) / f"{form}-{tokens}.npz")
                part = routes[:tokens]
                if form == "outrider":
                    members.write(path, own(part))
                    continue
                batch = part.reshape(64, tokens // 64, LAYERS, TOP_K)
                np.savez(path, routed_experts=batch.astype(np.int16), attention_mask=np.ones(batch.shape[:2], np.int8))
            command = [sys.executable, __file__, "child", *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[form] = json.loads(done.stdout) | {"file_mb": paths[1].stat().st_size / 1e6}
    return result


def own(routes: Any) -> dict[str, Any]:
    """What `convert` writes, with the table's own array: nothing is copied here."""
    none = {"domain_names": np.zeros(0, np.str_), "domain_ranges": np.zeros((0, 2), int), "notes": np.zeros(0, np.str_)}
    ids = {"layer_ids": np.arange(LAYERS), "experts": EXPERTS, "replay": "R3", "outrider_routing": 1}
    return {"routes": routes, "offsets": np.array([0, len(routes)]), **ids, **none}


def main() -> None:
    routes = synthetic(TOKENS)
    routing = Routing.of(routes, experts=EXPERTS)
    assert (counts(routing, RANKS, 4096)[0] == peer(routes[:4096])).all()
    limit_s = statistics.median(timed(routes.max) for _ in range(ROUNDS))
    per_size = {}
    for size in SIZES:
        cells = TOKENS // size * LAYERS
        ours_s = statistics.median(timed(lambda size=size: counts(routing, RANKS, size)) for _ in range(ROUNDS))
        peer_s = statistics.median(timed(lambda size=size: peer(routes[:size])) for _ in range(ROUNDS))
        per_size[size] = {
            "count_us_per_layer": ours_s / cells * 1e6,
            "numpy_us_per_layer": peer_s / LAYERS * 1e6,
            "limit_us_per_layer": limit_s / cells * 1e6,
            "ns_per_token_slot": ours_s / routes.size * 1e9,
        }
    result: dict[str, Any] = {"synthetic": True, "experts": EXPERTS, "ranks": RANKS, "by_microbatch_tokens": per_size}
    if DATA.exists():
        real = read(DATA, domain="intent")
        counts(real, 16, 1024)
        real_s = statistics.median(timed(lambda: counts(real, 16, 1024)) for _ in range(20))
        result["real_intent_1024_tokens_16_ranks"] = {"count_us_per_layer": real_s / (8 * real.layers) * 1e6}
    result["memory_1m_tokens_48_layers_top_8"] = memory(routes)
    result["machine"] = {"processor": platform.machine(), "python": platform.python_version(), "rounds": ROUNDS}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
