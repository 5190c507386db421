"""A rank that was told something else, is killed or hangs: a clear error on every other rank, in bounded time."""

from pathlib import Path

import pytest
from started import run_ranks

SCRIPT = Path(__file__).with_name("liveness_ranks.py")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("foresight", ["foreseen", "live gate"])
@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_every_rank_hears_of_it(tmp_path: Path, how: str, foresight: str) -> None:
    said = run_ranks(tmp_path, SCRIPT, 3, how, foresight, within_s=90, may_die={2} if how == "killed" else set())
    assert all("all held" in words for words in said[: 2 if how == "killed" else 3])
