"""Tests of the path on CUDA. Those that take `device` run on the CPU too: all but streams and pinning is the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

HERE = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HERE:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="package")
def group() -> Iterator[Any]:
    """One rank: NCCL for tensors on the device, gloo for those on the host."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if HERE else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
