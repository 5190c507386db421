"""Rates between processes of this machine: gloo's all_to_all_single over loopback. Called by benchmark.py.

`measure` starts one child a rank and waits for them under a hard time-out. A child dies with its parent, even by kill
-9: the parent holds the other end of its stdin, and its end is the child's.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from outrider.errors import WorldError

ROUNDS = 9
WITHIN_S = 60.0


def measure(ranks: int, part_bytes: Sequence[int], within_s: float = WITHIN_S) -> list[float]:
    """Median seconds in which every rank sends so many bytes to every other one, for each size. One thread a rank.

    WorldError when a child ends badly or time is up; none is left running, whatever happens.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                with (folder / f"rank{rank}").open("wb") as said:
                    command = [sys.executable, "-m", __name__, str(folder), str(rank), str(ranks)]
                    command += [str(size) for size in part_bytes]
                    more = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": name}
                    children.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=said,
                            stderr=said,
                            env=os.environ | more,
                            start_new_session=True,  # Ctrl-C is the parent's: it ends them
                        )
                    )
            _await(children, folder, within_s)
            return [float(seconds) for seconds in json.loads((folder / "seconds.json").read_text())]
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.communicate()


def _await(children: "list[subprocess.Popen[bytes]]", folder: Path, within_s: float) -> None:
    by_s = time.monotonic() + within_s
    while True:
        codes = [child.poll() for child in children]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or time.monotonic() > by_s:
            how = f"rank {failed[0]} ended with code {codes[failed[0]]}" if failed else f"no end in {within_s:.0f} s"
            lines = (folder / f"rank{failed[0] if failed else 0}").read_text(errors="replace").strip().splitlines()
            raise WorldError(
                f"gloo over loopback, {len(children)} processes: {how} ({lines[-1] if lines else 'it said nothing'})."
                " Leave these rates out by --ranks-live 0, or see whether `lo` is up."
            )
        if None not in codes:
            return
        time.sleep(0.02)


def _child(folder: Path, rank: int, ranks: int, part_bytes: list[int]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    medians_s = []
    for size in part_bytes:
        sent, received = torch.ones(size * ranks, dtype=torch.uint8), torch.empty(size * ranks, dtype=torch.uint8)
        times_s = []
        for _ in range(ROUNDS + 2):
            dist.barrier()
            began_s = time.perf_counter()
            dist.all_to_all_single(received, sent)
            times_s.append(time.perf_counter() - began_s)
        medians_s.append(statistics.median(times_s[2:]))
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(medians_s))
    dist.barrier()
    os._exit(0)  # tearing gloo down would wait for the others


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns when the other end is gone
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
