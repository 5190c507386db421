"""Starts one process a rank and waits until all ended well. Used by the tests that need a process group."""

import sys
import time
from collections.abc import Set
from pathlib import Path

from outrider.lab.processes import Children


def run_ranks(
    directory: Path,
    script: Path,
    ranks: int,
    *arguments: str,
    within_s: float = 150.0,
    may_die: Set[int] = frozenset(),
) -> list[str]:
    """`python SCRIPT DIRECTORY RANK RANKS ARGUMENTS`; what each said last. Fails where one ends badly or time is up."""
    with Children(directory) as children:
        started = [
            children.start(
                f"rank{rank}", [sys.executable, str(script), str(directory), str(rank), str(ranks), *arguments]
            )
            for rank in range(ranks)
        ]
        must_live = [rank for i, rank in enumerate(started) if i not in may_die]
        by_s = time.monotonic() + within_s
        while any(rank.running for rank in must_live) and not any(rank.process.poll() for rank in must_live):
            assert time.monotonic() < by_s, [rank.last_words() for rank in started]
            time.sleep(0.05)
        failed = [rank for rank in must_live if rank.process.poll()]
        assert not failed, "\n".join(f"{rank.name}: {rank.last_words(12)}" for rank in failed)
        return [rank.last_words() for rank in started]
