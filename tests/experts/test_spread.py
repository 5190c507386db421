"""The block on three ranks against the block itself: same bits forward, same gradients, whatever was foreseen."""

from pathlib import Path

from started import run_ranks

SCRIPT = Path(__file__).with_name("spread_ranks.py")


def test_the_spread_block_is_exact_under_any_plan(tmp_path: Path) -> None:
    run_ranks(tmp_path, SCRIPT, 3)
