"""How far is the emulated hybrid device from memcpy (hits) and fio (misses)? Interleaved in one run, as ratios.

    python bench/hybrid.py [--directory DIR]     # writes bench/results/hybrid.json; needs fio (apt-get install fio)

hits      `read` of blocks that lie in the device's cache, against numpy.copyto between private buffers on the same kind
          of pages, in the same random order; blocks of 720 KiB (16 tokens of SmolLM2 in fp32) and of 2 MiB
misses    `read` of blocks that do not, against fio's random reads (O_DIRECT, psync) of the same size from a file beside
          it, at the same queue depth: so many threads. fio reads into ordinary 4 KiB pages, the device into large ones
          where the kernel gives them: a ratio above 1 is presumably the pages' doing
ahead     blocks prefetched and pinned, then read: what a want makes of a miss
profiles  the rate that the throttled device keeps, against the profile's

Everything is emulated: a DRAM cache before a file. No figure here is a CXL device's.
"""

import argparse
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from outrider.memory.tiers.emulated import Emulated
from outrider.memory.tiers.throttle import PROFILES

MIB = 1 << 20
DEVICE_BYTES, CACHE_BYTES = 1536 * MIB, 256 * MIB
BLOCKS = {"720 KiB": 737_280, "2 MiB": 2 * MIB}
DEPTHS = (1, 4)
HIT_ROUNDS, MISS_ROUNDS, FIO_S = 15, 5, 1


def large(size_bytes: int) -> memoryview:
    """A buffer on large pages, where the kernel gives them, touched."""
    area = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(area, np.uint8)[:: mmap.PAGESIZE] = 1
    return memoryview(area)


def timed(run: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def hits(device: Emulated, block_bytes: int, rng: random.Random) -> dict[str, Any]:
    """Half of the cache's size in blocks, each read once a round, in another order."""
    count = CACHE_BYTES // 2 // block_bytes
    offsets = [n * (block_bytes + -block_bytes % device.line_bytes) for n in range(count)]
    private, target = large(count * block_bytes), large(count * block_bytes)
    source, into = np.frombuffer(private, np.uint8), np.frombuffer(target, np.uint8)
    for n, at in enumerate(offsets):
        device.write(at, private[n * block_bytes : (n + 1) * block_bytes])

    def limit() -> None:
        for n in order:
            np.copyto(into[n * block_bytes : (n + 1) * block_bytes], source[n * block_bytes : (n + 1) * block_bytes])

    def ours() -> None:
        for n in order:
            device.read(offsets[n], target[n * block_bytes : (n + 1) * block_bytes])

    order = list(range(count))
    ours()
    before, seconds = device.stats()["misses"], {"limit": [0.0], "ours": [0.0]}
    for turn in range(HIT_ROUNDS):
        rng.shuffle(order)
        for name, run in (("limit", limit), ("ours", ours))[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(run))
    assert device.stats()["misses"] == before, "a hit was a miss"
    assert np.array_equal(source, into)
    limit_s, ours_s = seconds["limit"][1:], seconds["ours"][1:]
    moved = count * block_bytes / 1e9
    return {
        "memcpy_gb_s": round(moved / statistics.median(limit_s), 2),
        "device_gb_s": round(moved / statistics.median(ours_s), 2),
        "device_over_memcpy": spread([a / b for a, b in zip(limit_s, ours_s, strict=True)]),
    }


def misses(device: Emulated, file: Path, block_bytes: int, depth: int, rng: random.Random) -> dict[str, Any]:
    """Pairs of a second of fio and as many reads of ours; no block comes again before four caches' worth of others."""
    stride = block_bytes + -block_bytes % device.line_bytes
    order = list(range(device.size_bytes // stride))
    rng.shuffle(order)
    turn = 0
    targets = [large(block_bytes) for _ in range(depth)]
    ratios, ours_mb, fio_mb, missed = [], [], [], []
    with ThreadPoolExecutor(depth) as threads:
        for _ in range(MISS_ROUNDS):
            fio = fio_read(file, block_bytes, depth)
            count = max(depth * 8, int(fio * 1e6 * FIO_S / block_bytes) // depth * depth)
            part = [order[(turn + n) % len(order)] * stride for n in range(count)]
            turn += count
            before = device.stats()

            def read(worker: int, part: list[int] = part) -> None:
                for at in part[worker::depth]:
                    device.read(at, targets[worker])

            took_s = timed(lambda read=read: [*threads.map(read, range(depth))])  # type: ignore[misc]
            after = device.stats()
            lines = after["misses"] - before["misses"] + after["hits"] - before["hits"]
            missed.append((after["misses"] - before["misses"]) / lines)
            ours_mb.append(count * block_bytes / took_s / 1e6)
            fio_mb.append(fio)
            ratios.append(ours_mb[-1] / fio)
    return {
        "fio_mb_s": spread(fio_mb),
        "device_mb_s": spread(ours_mb),
        "device_over_fio": spread(ratios),
        "share_of_lines_missed": round(min(missed), 3),
    }


def fio_read(file: Path, block_bytes: int, depth: int) -> float:
    """MB/s of fio's random reads of this size, so many at once."""
    command = [
        "fio", "--name=read", f"--filename={file}", "--rw=randread", f"--bs={block_bytes}", "--direct=1", "--thread",
        "--ioengine=psync", f"--numjobs={depth}", "--group_reporting", "--time_based", f"--runtime={FIO_S}",
        f"--size={file.stat().st_size // block_bytes * block_bytes}", "--output-format=json", "--randrepeat=0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"] / 1e6
    return found


def ahead(device: Emulated, block_bytes: int, rng: random.Random) -> dict[str, Any]:
    """Blocks that were prefetched with a pin, against the same many that were not, in alternating groups."""
    stride = block_bytes + -block_bytes % device.line_bytes
    blocks = [n * stride for n in range(device.size_bytes // stride)]
    rng.shuffle(blocks)
    group, target = 32, large(block_bytes)
    cold_s, warm_s = [], []
    for turn in range(6):
        first, second = blocks[2 * turn * group :][:group], blocks[(2 * turn + 1) * group :][:group]
        ticket = device.prefetch([(at, block_bytes) for at in first], pin=True)
        assert ticket.wait(60), ticket.why
        warm_s.append(timed(lambda part=first: [device.read(at, target) for at in part]) / group)  # type: ignore[misc]
        cold_s.append(timed(lambda part=second: [device.read(at, target) for at in part]) / group)  # type: ignore[misc]
        device.unpin([(at, block_bytes) for at in first])
    return {"miss_us": spread([s * 1e6 for s in cold_s]), "prefetched_us": spread([s * 1e6 for s in warm_s]),
            "miss_over_prefetched": spread([c / w for c, w in zip(cold_s, warm_s, strict=True)])}  # fmt: skip


def profiles(directory: Path) -> dict[str, Any]:
    """Hits of a small device under each profile: its rate over the profile's. 1 where the throttle binds and holds."""
    found, target, reads = {}, large(2 * MIB), 4
    for name, profile in PROFILES.items():
        device = Emulated(directory, 64 * MIB, 32 * MIB, profile)
        device.write(0, large(reads * len(target)))

        def read(device: Emulated = device) -> None:
            for n in range(reads):
                device.read(n * len(target), target)

        took_s = [timed(read) for _ in range(9)]
        found[name] = {"read_over_profile": round(reads * len(target) / statistics.median(took_s) / profile.read, 3)}
        device.close()
    return found


def machine(directory: Path) -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    on = max((m for m in mounts if directory.resolve().is_relative_to(m[1])), key=lambda m: len(m[1]))
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    return {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
            "disk": f"{on[0]} {on[2]}", "transparent_hugepage": pages, "numpy": np.__version__}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, help="where the files lie; default: a new one under build/")
    given = parser.parse_args().directory
    if shutil.which("fio") is None:
        sys.exit("bench/hybrid.py: fio is absent, so there is no limit to compare misses with; apt-get install fio.")
    root = given or Path(__file__).parents[1] / "build"
    root.mkdir(parents=True, exist_ok=True)
    rng = random.Random(4)
    result: dict[str, Any] = {"emulated": True, "profile": "none", "machine": machine(root)}
    with tempfile.TemporaryDirectory(dir=root) as name:
        directory, file = Path(name), Path(name) / "fio"
        device = Emulated(directory, DEVICE_BYTES, CACHE_BYTES)
        chunk = large(32 * MIB)
        chunk[:] = random.Random(1).randbytes(len(chunk))
        with file.open("wb", buffering=0) as out:
            for at in range(0, DEVICE_BYTES, len(chunk)):
                device.write(at, chunk)
                out.write(chunk)
            os.fsync(out.fileno())
        device.flush()
        result["device"] = {key: device.stats()[key] for key in ("kind", "size_bytes", "cache_bytes", "line_bytes")}
        result["hits"] = {name: hits(device, size, rng) for name, size in BLOCKS.items()}
        device.flush()
        result["misses"] = {
            f"{name}, depth {depth}": misses(device, file, size, depth, rng)
            for name, size in BLOCKS.items()
            for depth in DEPTHS
        }
        result["ahead"] = {name: ahead(device, size, rng) for name, size in BLOCKS.items()}
        device.close()
        result["profiles"] = profiles(directory)
    path = Path(__file__).parent / "results" / "hybrid.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
