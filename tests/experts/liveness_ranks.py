"""Run on each of three ranks by test_liveness.py: `python liveness_ranks.py DIRECTORY RANK RANKS HOW FORESIGHT`.

First what ranks may be told differently, which every rank must hear of; then rank 2 is killed, or hangs, in the middle
of a forward pass. Exit code 0, or 9 for the rank that kills itself: all held.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from huggingface_ranks import build

from outrider.errors import LawBroken, WorldError
from outrider.experts import Policy, Settings, balance
from outrider.experts.events import Began, Foreseen
from outrider.experts.search import search

TIMEOUT_S = 5.0


def expect(error: type[Exception], words: str, within_s: float, what: Any) -> None:
    begin_s = time.monotonic()
    try:
        what()
    except error as caught:
        assert words in str(caught), caught  # noqa: PT017
        assert time.monotonic() - begin_s < within_s, f"{caught} after {time.monotonic() - begin_s:.1f} s"  # noqa: PT017
        return
    raise AssertionError(f"went on, and should have said: {words}")


def main(directory: str, rank: int, ranks: int, how: str, foresight: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    counts = np.random.default_rng(0).poisson(9, (2, 2, ranks, 6)).astype(np.int64)
    ids = torch.arange(12).view(1, 12)

    def step(table: Any, batch: int, at: Any = None) -> None:
        model = build("qwen3")
        if at is not None:
            model.model.layers[1].self_attn.register_forward_pre_hook(at)
        ring = 0 if table is None else 1  # where a layer's copies come while the one before computes
        balanced = balance(model, slots=1, ring=ring, timeout_s=TIMEOUT_S)  # ranks that disagreed: none is used again
        with balanced.step(table) as run:
            with run.micro_step(batch):
                model(input_ids=ids).logits.sum().backward()
            run.finish_gradients()

    def forgotten() -> None:
        balanced = balance(build("qwen3"), slots=1, timeout_s=TIMEOUT_S)
        with balanced.step(counts) as run:
            if rank != 1:
                with run.micro_step(0):
                    pass
            run.finish_gradients()

    policy = Policy(Settings(layers=2, experts=6, ranks=ranks, slots=1))
    for event in (Foreseen(counts), Began("update", 0)):  # compiles, so that nothing below is timed with it
        policy.handle(event, 0)
    dist.barrier()
    expect(LawBroken, "at Foreseen", 2 * TIMEOUT_S, lambda: step(counts + (rank == 1), 0))  # a table of another step
    dist.barrier()
    plan = search(np.roll(counts, int(rank == 1), axis=0), 1)  # a plan of another step
    expect(LawBroken, "at Planned", 2 * TIMEOUT_S, lambda: step(plan, 0))
    dist.barrier()
    expect(LawBroken, "at Began", 2 * TIMEOUT_S, lambda: step(counts, int(rank == 1)))  # another micro-batch
    dist.barrier()
    expect(LawBroken, "at Began" if rank == 1 else "at Finished", 2 * TIMEOUT_S, forgotten)
    dist.barrier()

    def fall(*_: Any) -> None:
        if rank == 2 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            time.sleep(2.5 * TIMEOUT_S)

    table = counts if foresight == "foreseen" else None
    expect(WorldError, "lost another rank while", (2 if rank < 2 else 4) * TIMEOUT_S, lambda: step(table, 0, fall))
    sys.stdout.write("all held\n")
    sys.stdout.flush()
    os._exit(0)  # gloo would wait for the others


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
