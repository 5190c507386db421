"""The block on three ranks against the block itself: same bits forward, same gradients, whatever was foreseen."""

import sys
import time
from pathlib import Path

from outrider.lab.processes import Children

SCRIPT = Path(__file__).with_name("spread_ranks.py")


def test_the_spread_block_is_exact_under_any_plan(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        ranks = [
            children.start(f"rank{rank}", [sys.executable, str(SCRIPT), str(tmp_path), str(rank)]) for rank in range(3)
        ]
        by_s = time.monotonic() + 90
        while any(rank.running for rank in ranks) and not any(rank.process.poll() for rank in ranks):
            assert time.monotonic() < by_s, [rank.last_words() for rank in ranks]
            time.sleep(0.05)
        failed = [rank for rank in ranks if rank.process.poll()]
        assert not failed, "\n".join(f"{rank.name}: {rank.last_words(12)}" for rank in failed)
