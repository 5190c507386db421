"""What does an event cost memory's policy, by how many blocks it has? Host full of blocks, every save evicting.

    python bench/memory_policy.py [most]     # blocks of the largest size; writes bench/results/memory_policy.json

Sessions of 16 blocks come and go as clients send them: a turn leases the session, extends it by a block, names its path
and wants it back, or the session ends. Up to 4,096 sessions are wanted at any time. Disk is twice host, so blocks move
both ways; copies end at once. Each size is filled, then timed; the largest takes about a minute and a few GB.
"""

import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings
from outrider.wants import Want

SIZES, BLOCK_BYTES, CHAIN, EVENTS = (1_000, 10_000, 100_000, 1_000_000), 1 << 20, 16, 8_000


class Run:
    """One policy, its clients, and how long each event took, in seconds, by kind."""

    def __init__(self, blocks: int) -> None:
        grain = 4096
        self.policy = Policy(Settings(blocks * BLOCK_BYTES, 2 * blocks * (BLOCK_BYTES + grain)))
        self.now, self.request, self.made = 100.0, 0, 0
        self.took_s: list[tuple[str, float]] = []
        self.named = 0  # blocks that events and commands name

    def feed(self, event: ev.Event) -> list[ev.Command]:
        """Time one event; end at once every copy that it asks for."""
        self.now += 1e-4
        began_s = time.perf_counter()
        commands = self.policy.handle(event, self.now)
        self.took_s.append((type(event).__name__, time.perf_counter() - began_s))
        self.named += len(getattr(event, "items", getattr(event, "copies", ())))
        for command in commands:
            self.named += len(getattr(command, "items", getattr(command, "copies", ())))
            if isinstance(command, ev.Load | ev.Save | ev.Prefetch):
                self.feed(ev.Copied(tuple(copy.number for copy in command.copies)))
        return commands

    def write(self, items: tuple[str, ...]) -> None:
        self.request += 2
        (offer, *_) = self.feed(ev.Prepared(1, self.request, items, BLOCK_BYTES))
        assert isinstance(offer, ev.Offer)
        written = tuple(item for item, span in zip(items, offer.spans, strict=True) if span is not None)
        if written:
            self.feed(ev.Completed(1, self.request + 1, written, (7,) * len(written), False))

    def new(self, count: int) -> tuple[str, ...]:
        self.made += count
        return tuple(f"{number:032x}" for number in range(self.made - count, self.made))

    def turn(self, name: str, chain: tuple[str, ...], wanted_s: float) -> None:
        """One request of a session, from its lease to the want of its next."""
        self.request += 1
        lease = self.request
        self.feed(ev.Leased(1, lease, chain, self.now + 5.0))
        self.write(chain[-1:])
        self.feed(ev.Released(1, lease))
        self.feed(ev.Remembered(name, chain))
        self.feed(ev.Wanted(Want(name, "host", self.now + wanted_s, 1.0)))


def timed(blocks: int) -> dict[str, float]:
    draw = np.random.default_rng(0)
    run = Run(blocks)
    sessions: dict[str, tuple[str, ...]] = {}
    for number in range(blocks // CHAIN + 1):  # fill host
        sessions[f"s{number}"] = run.new(CHAIN)
        run.write(sessions[f"s{number}"])
    names = list(sessions)
    for name in names[-min(4096, len(names) // 2) :]:
        run.feed(ev.Remembered(name, sessions[name]))
        run.feed(ev.Wanted(Want(name, "host", run.now + float(draw.uniform(1, 60)), float(draw.uniform(0.1, 2)))))
    evicted = run.policy.tally.evictions.get("host", 0)
    gc.collect()
    gc.freeze()  # the filling's objects are no part of what is timed
    run.took_s.clear()
    run.named = 0
    while len(run.took_s) < EVENTS:
        at = int(draw.integers(len(names)))
        name = names[at]
        if draw.uniform() < 0.3:  # a session ends, and another begins: its blocks must find room
            run.feed(ev.Withdrawn(name))
            names[at] = f"s{run.made}"
            sessions[names[at]] = run.new(CHAIN)
            run.write(sessions[names[at]])
        else:
            sessions[name] += run.new(1)
            run.turn(name, sessions[name], float(draw.uniform(1, 60)))
    gc.unfreeze()
    micros = [seconds * 1e6 for _, seconds in run.took_s]
    kinds = {kind: [s * 1e6 for k, s in run.took_s if k == kind] for kind in dict(run.took_s)}
    return {
        "median_us": statistics.median(micros),
        "mean_us": statistics.fmean(micros),
        "p99_us": float(np.percentile(micros, 99)),
        "max_us": max(micros),
        "us_a_named_block": sum(micros) / run.named,
        "named_blocks_an_event": run.named / len(micros),
        "events": len(micros),
        "evicted_from_host": run.policy.tally.evictions.get("host", 0) - evicted,
    } | {f"median_us_{kind}": statistics.median(values) for kind, values in kinds.items()}


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else SIZES[-1]
    result: dict[str, object] = {}
    for blocks in SIZES:
        if blocks <= most:
            result[str(blocks)] = timed(blocks)
            print(blocks, json.dumps(result[str(blocks)]), flush=True)
    result["machine"] = {"processor": platform.machine(), "python": platform.python_version()}
    (Path(__file__).parent / "results" / "memory_policy.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
