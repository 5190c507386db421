"""How far is a lease's copy-out from memcpy? Limit, peer and Outrider interleaved in one run, as ratios.

    python bench/memory_lease.py            # writes bench/results/memory_lease.json

limit     numpy.copyto between private buffers, 64 blocks of 720 KiB (16 tokens of SmolLM2 in fp32)
peer      the same blocks read from one file in the page cache with readinto (what a file-based KV tier does)
outrider  `Store.lease` of resident blocks from a server in another thread, then the same copyto out of the arena
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import outrider.memory as memory

BLOCKS, BLOCK_BYTES, ROUNDS = 64, 16 * 46_080, 15


def timed(run: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def main() -> None:
    space = memory.KeySpace(model="bench", dtype="float32", layout="bytes", block_tokens=16)
    keys = space.chain(range(16 * BLOCKS))
    source = np.random.default_rng(0).integers(0, 255, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    target = np.empty_like(source)
    with tempfile.TemporaryDirectory() as name, memory.open(f"host={2 * BLOCKS * BLOCK_BYTES // 2**20}MiB") as store:
        slots = store.prepare(keys, nbytes=BLOCK_BYTES)
        for slot, block in zip(slots, source, strict=True):
            assert slot is not None
            slot.view[:] = block.data
        store.complete(slots)
        path = Path(name) / "blocks"
        path.write_bytes(source.tobytes())

        def limit() -> None:
            for i in range(BLOCKS):
                np.copyto(target[i], source[i])

        def peer() -> None:
            with path.open("rb", buffering=0) as file:
                for i in range(BLOCKS):
                    file.readinto(target[i].data)

        def ours() -> None:
            with store.lease(keys) as lease:
                for i, view in enumerate(lease.views):
                    assert view is not None
                    np.copyto(target[i], np.frombuffer(view, np.uint8))

        runs: dict[str, list[float]] = {"limit": [], "peer": [], "outrider": []}
        for _ in range(ROUNDS):
            for what, run in (("limit", limit), ("peer", peer), ("outrider", ours)):
                target[:] = 0
                runs[what].append(timed(run))
                assert np.array_equal(target, source), what
    seconds = {what: statistics.median(values) for what, values in runs.items()}
    result = {
        "gb_per_s": {what: BLOCKS * BLOCK_BYTES / value / 1e9 for what, value in seconds.items()},
        "outrider_over_limit": seconds["limit"] / seconds["outrider"],
        "outrider_over_peer": seconds["peer"] / seconds["outrider"],
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "rounds": ROUNDS},
    }
    (Path(__file__).parent / "results" / "memory_lease.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
