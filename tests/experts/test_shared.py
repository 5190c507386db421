"""Shared memory of a node: stamped, nameless, and room that is not there is said before anything is used."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from outrider.errors import LawBroken, WorldError
from outrider.experts.shared import Shared

ROWS = np.array([[0, 2, 0, 0], [1, 5, 0, 0], [1, 6, 0, 0]])


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield world
    dist.destroy_process_group()


def test_put_and_pulled_and_never_stale(group: dist.ProcessGroup, tmp_path: Path) -> None:
    shared = Shared(group, np.zeros(1, dtype=np.int64), 100, torch.empty(0, dtype=torch.bfloat16), tmp_path)
    shared.begin(ROWS)
    into = torch.zeros(100, dtype=torch.bfloat16)
    with pytest.raises(LawBroken, match="layer 1, expert 5 in shared memory is of step 0, not 1"):
        shared.pull(1, 5, into)
    for layer, expert, *_ in ROWS.tolist():
        shared.put(layer, expert, torch.full((100,), float(expert)))
    shared.pull(1, 5, into)
    assert (into == 5).all()
    assert os.listdir(tmp_path) == [], "a killed rank would leave it behind"
    size = shared.nbytes
    shared.begin(ROWS[:2])  # weights changed: what lies there is of the step before
    assert shared.nbytes == size, "new memory for less"
    with pytest.raises(LawBroken, match="of step 1, not 2"):
        shared.pull(1, 5, into)
    shared.close()
    assert shared.nbytes == 0


def test_no_room_is_said_on_all_ranks(group: dist.ProcessGroup, tmp_path: Path) -> None:
    like = torch.empty(0)
    shared = Shared(group, np.zeros(1, dtype=np.int64), 2**44, like, tmp_path)
    with pytest.raises(WorldError, match=r"bytes of shared memory in .*Free some, or take the direct path"):
        shared.begin(ROWS)
    assert os.listdir(tmp_path) == []
    with pytest.raises(WorldError, match=r"No such file or directory"):
        Shared(group, np.zeros(1, dtype=np.int64), 4, like, tmp_path / "nowhere").begin(ROWS)
