"""What a pass costs the policy of experts at real size: plan, page, digest; no transfer is carried out. Synthetic load.

    taskset -c 0 python bench/experts_policy.py                     # writes bench/results/experts_policy.json

48 layers, 128 experts, 32 ranks, 2 slots, the regimes of outrider.lab.experts_load with 8 sequences of 2,048 tokens a
micro-batch; all layers' frames, and a ring of four. began_ms: `handle(Began)`, which plans the micro-batch after this
one and pages its copies; paging_ms: the same where all is planned already (the update after its recompute);
digest_ms: what ranks compare before they move. Medians over passes; the first of each process compiles and is left out.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec

from outrider.experts import Policy, Settings
from outrider.experts.events import Began, Carry, Foreseen
from outrider.journal import array_digest
from outrider.lab.experts_load import REGIMES, synthetic

RESULT = Path(__file__).parent / "results/experts_policy.json"
LAYERS, EXPERTS, RANKS, SLOTS, STEPS = 48, 128, 32, 2, 6


def passes(counts: Any, ring: int) -> dict[str, Any]:
    policy = Policy(Settings(LAYERS, EXPERTS, RANKS, SLOTS, ring))
    encoder = msgspec.json.Encoder(enc_hook=array_digest)
    policy.handle(Foreseen(counts), 0)
    took: dict[str, list[float]] = {"recompute": [], "update": [], "digest": []}
    fetches = 0
    for stage in ("recompute", "update"):
        for m in range(STEPS):
            began_s = time.perf_counter()
            commands = policy.handle(Began(stage, m), m)
            took[stage].append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
            encoder.encode(commands)
            took["digest"].append(time.perf_counter() - began_s)
            fetches += sum(command.fetches for command in commands if isinstance(command, Carry))
    ms = {name: round(statistics.median(seconds[1:]) * 1e3, 2) for name, seconds in took.items()}
    return {
        "began_ms": ms["recompute"],
        "paging_ms": ms["update"],
        "digest_ms": ms["digest"],
        "fetches_a_layer_and_pass": round(fetches / 2 / STEPS / LAYERS, 2),
        "frames_of_a_rank": policy.settings.frames,
    }


def main() -> None:
    result: dict[str, Any] = {
        "synthetic": True,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
    }
    for regime in REGIMES:
        counts = synthetic(regime, RANKS, 0, layers=LAYERS, micro_steps=STEPS)
        passes(counts[:2].repeat(3, axis=0), 0)
        result[regime] = {name: passes(counts, ring) for name, ring in (("all layers", 0), ("ring of 4", 4))}
        print(regime, json.dumps(result[regime], indent=1), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
