"""Marks as slow what starts processes or runs a model: `make fast` leaves it out."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore = ["vllm"]  # has an environment of its own: `make test-vllm`
SLOW = (
    "agents/test_embedded_engine.py",
    "agents/test_faults.py",
    "e2e",
    "experts/test_balanced.py",
    "experts/test_bitwise.py",
    "experts/test_liveness.py",
    "experts/test_real_routing.py",
    "experts/test_spread.py",
    "lab",
    "memory/test_crash.py",
    "memory/test_policy_laws.py",
    "memory/test_server.py",
    "memory/test_store.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(HERE).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
