"""A rank that was told something else, is killed or hangs: a clear error on every other rank, in bounded time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from started import run_ranks

SCRIPT = Path(__file__).with_name("liveness_ranks.py")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_every_rank_hears_of_it(tmp_path: Path, how: str) -> None:
    def run(foresight: str) -> list[str]:
        directory = tmp_path / foresight
        directory.mkdir()
        may_die = {2} if how == "killed" else set()
        return run_ranks(directory, SCRIPT, 3, how, foresight, within_s=100, may_die=may_die)

    with ThreadPoolExecutor() as side_by_side:  # most of the time all of them wait
        for said in side_by_side.map(run, ["foreseen", "live gate"]):
            assert all("all held" in words for words in said[: 2 if how == "killed" else 3])
