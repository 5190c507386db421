"""A rank that dies or hangs: a clear error in bounded time, and no process left."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from outrider.errors import WorldError
from outrider.lab.rl import step
from outrider.lab.rl.rollouts import Rollout


def ranks_running() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return sorted((p for p in mine if "outrider.lab.rl.rank" in " ".join(p.cmdline())), key=lambda p: p.cmdline()[-1])


@pytest.mark.parametrize(
    ("number", "timeout_s", "within_s", "message"),
    [
        (signal.SIGKILL, 60.0, 5.0, "rank 1 of 2 was killed by signal 9; the other ranks were stopped"),
        (signal.SIGSTOP, 2.0, 10.0, "rank 0 of 2 ended with code 1"),
    ],
)
def test_a_lost_rank_ends_the_step(
    rollouts: list[Rollout], tmp_path: Path, number: int, timeout_s: float, within_s: float, message: str
) -> None:
    struck_s = []

    def strike() -> None:
        """In the middle of the step: when rank 1 has journaled its first micro-steps."""
        path = tmp_path / "experts.1.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            time.sleep(0.01)
        os.kill(ranks_running()[1].pid, number)
        struck_s.append(time.monotonic())

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(WorldError, match=message):
        step.run("tiny-moe", rollouts * 12, micro_batch_tokens=24, journal_dir=tmp_path, timeout_s=timeout_s)
    thread.join()
    assert time.monotonic() - struck_s[0] < within_s
    assert not ranks_running()
