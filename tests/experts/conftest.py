"""Workloads W0-W7 (names after Megatron's MoE balancing tests, definitions ours) and the real routing data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parents[3] / "shared" / "data" / "moe-routing-deepseek-v2-lite" / "routing.npz"


@pytest.fixture(scope="session")
def routing() -> Any:
    """Real routes of DeepSeek-V2-Lite: NAME_ids [layers, tokens, top_k], NAME_seq_offsets."""
    if not DATA.exists():
        pytest.skip(f"real routing data is not here ({DATA}); the synthetic workloads cover the same laws")
    return np.load(DATA)


def workload(name: str, experts: int, ranks: int, micro_steps: int = 4, layers: int = 2, tokens: int = 96) -> Any:
    """counts_MLRE of one workload; every (source, expert) pair has about `tokens` / `experts`, times its heat."""
    rng = np.random.default_rng(7)
    homes = np.sort(np.arange(experts) % ranks)
    heat = np.ones((micro_steps, experts))
    if name == "W1":  # hot set: few experts, on different ranks
        heat[:, [int(np.flatnonzero(homes == r)[0]) for r in range(0, ranks, 2)]] = 8
    elif name == "W2":  # hot rank: the hot experts share a rank
        heat[:, homes == ranks - 1] = 6
    elif name == "W3":  # spread skew
        heat *= np.exp(rng.normal(0, 0.8, experts))
    elif name == "W5":  # half of the experts get nothing
        heat[:, ::2] = 0
    elif name == "W6":  # the hot rank rotates: history is always late
        for m in range(micro_steps):
            heat[m, homes == m % ranks] = 7
    elif name == "W7":  # one micro-step differs
        heat[micro_steps // 2, 0] = 20
    counts = np.round(heat[:, None, None, :] * tokens / experts).astype(np.int64)
    counts = np.broadcast_to(counts, (micro_steps, layers, ranks, experts)).copy()
    if name == "W4":  # ragged sources: one rank has most of the tokens, another none
        counts[:, :, 0] *= 5
        counts[:, :, -1] = 0
    return counts


@pytest.fixture(params=["W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7"])
def named_workload(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, workload(request.param, experts=16, ranks=4)
