"""A balanced training step on the wall clock: processes on this machine, against static placement and an even gate.

    nice -n -18 python bench/experts_live.py --part hot   # each writes its part of
    python bench/experts_live.py --part cuda                                          # bench/results/experts_live.json

part           ranks  experts' cost                  routes
hot            2      real products, fp32            SYNTHETIC, made to be skewed: the hot rank rotates (W6)
real           2      real products, fp32            recorded (DeepSeek-V2-Lite, prefill); weights are random
emulated       4      EMULATED: asleep for each row  SYNTHETIC, as hot
emulated-real  4      EMULATED: asleep for each row  recorded
cuda           1      needs a CUDA device: host-to-device copies on the lane beside a grouped GEMM

The models are small Qwen3-MoE shapes with random weights; a rank is a process with one thread, pinned to a core, gloo
over loopback. A step is a recompute pass of all micro-batches, an update pass of all, gradients home; weights do not
change. Arms (outrider.lab.experts_live.rank) take turns, from a barrier each. Medians are over steps in which no rank
stood in line for a core for a tenth of its time, as far as there are any: `in_line_share` says how it was.
share_of_even: seconds of an even gate / seconds. lane_s counts waiting for the other side too; exposed_s: compute
waited for the lane. On a CPU copies take their time from a core that computes: what is hidden is not free.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace

from outrider.errors import CallerError
from outrider.lab.experts_live.overlap import Shape, overlap
from outrider.lab.experts_live.routes import Case
from outrider.lab.experts_live.run import panels, run, summed
from outrider.lab.experts_live.timeline import draw, trace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
RECORDED = ROOT.parent / "shared/data/moe-routing-deepseek-v2-lite/routing.npz"
QUIET = 0.1
HOT = Case(
    layers=3, experts=8, top_k=2, hidden=512, inner=1024, tokens=512, batches=5, rounds=7, quiet=QUIET, budget_s=130
)
REAL = Case(
    layers=3, experts=64, top_k=6, hidden=512, inner=128, tokens=1024, batches=4, rounds=7, quiet=QUIET, budget_s=130,
    routes=str(RECORDED),
)  # fmt: skip
SMALL = {"hidden": 256, "tokens": 128, "length": 128, "batches": 4}  # so that products take little beside the sleep
PARTS = {
    "hot": (HOT, 2),
    "real": (REAL, 2),
    "emulated": (replace(HOT, experts=16, inner=256, hot=0.45, row_s=2e-4, **SMALL), 4),
    "emulated-real": (replace(REAL, row_s=7e-5, **SMALL), 4),
}
DRAWN = ("static", "ring, at once", "ring", "outrider", "even gate")


def measure(part: str, folder: Path | None) -> dict[str, Any]:
    case, ranks = PARTS[part]
    with tempfile.TemporaryDirectory() as directory:
        seen = run(case, ranks, Path(directory))
    table = summed(seen, case)
    routes = "synthetic routes, made to be skewed" if case.routes == "hot" else "recorded routes, random weights"
    cost = f"EMULATED expert cost, {1e6 * case.row_s:.0f} us a row" if case.row_s else "real expert products in fp32"
    if folder:
        some = panels(seen, case, DRAWN)
        (folder / f"experts_live_{part}.trace.json").write_bytes(trace(some))
        title = f"One training step on {ranks} ranks: {cost}"
        notes = f"{routes}; {case.layers} layers, {case.batches} micro-batches"
        notes += ". Of each rank, above: experts, and waits for the lane; below: the lane."
        draw(folder / f"experts_live_{part}.png", title, notes, some)
    for arm, row in table.items():
        words = (
            f"{row['seconds']:.3f} s, static / it {row['times_static']:.3f}, even gate / it {row['share_of_even']:.3f}"
        )
        print(
            f"{part}, {arm}: {words}, exposed {row['exposed_s']:.3f} of {row['lane_s']:.3f} s on the lane", flush=True
        )
    shape = {name: value for name, value in msgspec.structs.asdict(case).items() if name != "routes"}
    return {
        "what": f"{cost}; {routes}; {ranks} ranks",
        "ranks": ranks,
        "case": shape,
        "load_average": os.getloadavg(),
        "arms": table,
    }


def cuda() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise CallerError(
            "--part cuda: this machine has no CUDA device (or torch is a CPU build). Run it on one that has."
        )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = overlap(torch.device("cuda"), Shape(), torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    for one in found:
        print(one)
    return {torch.cuda.get_device_name(): [msgspec.structs.asdict(one) for one in found]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=[*PARTS, "cuda", "all"], default="all")
    parser.add_argument("--folder", type=Path, help="gets a picture and a Perfetto trace of each part")
    options = parser.parse_args()
    path = RESULTS / "experts_live.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    for part in PARTS if options.part == "all" else [options.part]:
        if part in PARTS and PARTS[part][0].routes == str(RECORDED) and not RECORDED.exists():
            print(f"{part}: left out, {RECORDED} is not here")
            continue
        try:
            result[part] = cuda() if part == "cuda" else measure(part, options.folder)
        except CallerError as error:
            sys.exit(str(error))
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
