"""The policy for vLLM: never a larger maximum than EPLB's, never more copies, nothing moved in vain."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import rebalance_experts
from outrider.experts.adapters.vllm_eplb import arrange

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, tuple[int, int, int, int], Any]:
    """Loads of two layers, sizes, and loads of a time before, which may be the same, alike or others."""
    nodes, groups = draw(st.sampled_from([(1, 1), (1, 4), (2, 4), (3, 3), (2, 3)]))
    ranks, experts = nodes * draw(st.integers(1, 3)), groups * draw(st.integers(1, 5))
    slots = (-(-experts // ranks) + draw(st.integers(0, 3))) * ranks
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    before = rng.lognormal(3, draw(st.sampled_from([0.0, 0.5, 2.0])), (2, experts))
    now = before * rng.lognormal(0, draw(st.sampled_from([0.0, 0.1, 1.0])), (2, experts))
    return rng.poisson(now), (slots, groups, nodes, ranks), rng.poisson(before)


def most(weight: Any, placement: Any, ranks: int) -> Any:
    """[layers] largest load of a rank when copies share evenly."""
    loads = []
    for load, row in zip(weight, placement, strict=True):
        share = load / np.bincount(row, minlength=len(load))
        loads.append(share[row].reshape(ranks, -1).sum(axis=1).max())
    return np.array(loads)


def copies(placement: Any, old: Any, ranks: int) -> Any:
    """[layers] experts that a rank must fetch, by vLLM's count: those it had in none of its slots."""
    rows = []
    for row, before in zip(placement, old, strict=True):
        ranked = zip(row.reshape(ranks, -1).tolist(), before.reshape(ranks, -1).tolist(), strict=True)
        rows.append(sum(len(set(new) - set(had)) for new, had in ranked))
    return np.array(rows)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_never_behind_eplb(problem: tuple[Any, tuple[int, int, int, int], Any]) -> None:
    weight, sizes, before = problem
    slots, groups, nodes, ranks = sizes
    experts = weight.shape[1]
    old = arrange(before, *sizes)
    for placement, loads in ((old, before), (new := arrange(weight, *sizes, old), weight)):
        assert placement.shape == (2, slots)
        assert all((np.bincount(row, minlength=experts) >= 1).all() for row in placement), "an expert is nowhere"
        theirs = rebalance_experts(loads, *sizes)[0]
        assert (most(loads, placement, ranks) <= most(loads, theirs, ranks) * (1 + 1e-6)).all()
        if nodes > 1 and groups % nodes == 0:
            for row in placement.reshape(2, nodes, -1):
                seen = [set((part * groups // experts).tolist()) for part in row]
                assert sum(len(some) for some in seen) == groups, "a group lies in two nodes"
    assert (copies(new, old, ranks) <= copies(rebalance_experts(weight, *sizes)[0], old, ranks)).all()
    for row, had in zip(new.reshape(2 * ranks, -1), old.reshape(2 * ranks, -1), strict=True):
        stays = [int(e) for e in np.unique(row) if e in had]
        assert all((row[had == e] == e).any() for e in stays), "an expert changed its slot for nothing"
    assert (arrange(weight, *sizes, old) == new).all()


@given(problems())
@settings(max_examples=50, deadline=None)
def test_a_placement_that_is_good_stays(problem: tuple[Any, tuple[int, int, int, int], Any]) -> None:
    _, sizes, before = problem
    old = arrange(before, *sizes)
    assert (arrange(before, *sizes, old) == old).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 4), (2, 2), (3, 2)]))
@settings(max_examples=200, deadline=None)
def test_renumbered_ranks_share_no_less_than_they_did(seed: int, shape: tuple[int, int]) -> None:
    from outrider.experts import climb

    nodes, size = shape
    rng = np.random.default_rng(seed)
    place, old = rng.integers(0, 7, (2, nodes * size, 3))
    new = climb.like(place, old, 7, size)
    assert copies([new.ravel()], [old.ravel()], nodes * size) <= copies([place.ravel()], [old.ravel()], nodes * size)
    by_node = [sorted(sorted(rank) for rank in node) for node in new.reshape(nodes, size, 3).tolist()]
    assert sorted(by_node) == sorted(
        sorted(sorted(rank) for rank in node) for node in place.reshape(nodes, size, 3).tolist()
    )
    assert copies([climb.like(place, place[::-1].copy(), 7, size).ravel()], [place[::-1].ravel()], nodes * size) == 0


def test_few_copies_where_the_load_drifts() -> None:
    """128 experts on 32 ranks of 6 slots; each load drifts by a fifth. EPLB packs anew: nearly all 192 slots move."""
    rng = np.random.default_rng(0)
    popular = rng.lognormal(0, 0.8, (2, 128)) * 2000
    old, ours, theirs = None, 0.0, 0.0
    for _ in range(4):
        weight = rng.poisson(popular * rng.lognormal(0, 0.2, popular.shape))
        eplb = rebalance_experts(weight, 192, 1, 1, 32)[0]
        new = arrange(weight, 192, 1, 1, 32, old)
        if old is not None:
            ours, theirs = ours + copies(new, old, 32).mean(), theirs + copies(eplb, old, 32).mean()
        assert (most(weight, new, 32) <= most(weight, eplb, 32)).all()
        old = new
    assert theirs / 3 > 150
    assert ours / 3 < 30


def test_what_is_not_known_is_not_kept() -> None:
    """Empty slots (ranks that joined) and another number of slots: placed anew, and slots that are known still stay."""
    weight = np.random.default_rng(1).lognormal(3, 1, (1, 8))
    fresh = arrange(weight, 12, 1, 1, 4)
    assert (arrange(weight, 12, 1, 1, 4, fresh[:, :8]) == fresh).all()
    joined = fresh.copy()
    joined[0, 9:] = -1
    assert (arrange(weight, 12, 1, 1, 4, joined)[0, :9] == fresh[0, :9]).all()
    with pytest.raises(CallerError, match="num_replicas"):
        arrange(weight, 13, 1, 1, 4)


def test_groups_that_lay_in_two_nodes_or_none_come_together() -> None:
    """An old placement that was made for one node: expert 0 in both nodes, expert 3 in none."""
    new = arrange(np.array([[9, 4, 4, 1]]), 4, 4, 2, 2, np.array([[0, 1, 0, 2]]))
    assert sorted(new[0].tolist()) == [0, 1, 2, 3]
    assert new[0].tolist()[:2] in ([0, 3], [3, 0]) or new[0].tolist()[2:] in ([0, 3], [3, 0])


IN_VLLM = """
import torch
from vllm.distributed.eplb.migration_scheduler import schedule_migration_batches
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
from outrider.experts.adapters import vllm_eplb

vllm_eplb.use()
ours = EPLB_POLICIES["default"]
assert issubclass(ours, AbstractEplbPolicy) and ours is not DefaultEplbPolicy and not ours.__abstractmethods__
popular = torch.distributions.LogNormal(7.0, 0.8)
torch.manual_seed(0)
heat, old, total = popular.sample((2, 24)), None, [0, 0]

def most(weight, placement):
    share = weight / torch.zeros_like(weight).scatter_add_(1, placement, torch.ones(placement.shape))
    return share.gather(1, placement).view(2, 4, -1).sum(2).amax(1)

for _ in range(3):
    weight = (heat * torch.empty(2, 24).normal_(0, 0.2).exp()).int()
    new = ours.rebalance_experts(weight, 32, 6, 2, 4, old)
    default = DefaultEplbPolicy.rebalance_experts(weight, 32, 6, 2, 4, old)
    assert new.shape == default.shape and new.dtype == default.dtype and new.device == default.device
    assert (most(weight.float(), new) <= most(weight.float(), default) * (1 + 1e-6)).all()
    if old is not None:
        for i, placement in enumerate((new, default)):
            for layer in range(2):
                batches = schedule_migration_batches(8, old[layer].numpy(), placement[layer].numpy())
                total[i] += sum(len(flow.expert_ids) for batch in batches for flow in batch)
    old = new
assert 0 < total[0] < total[1] / 2, total
print("copies", *total)
"""


@pytest.mark.slow
def test_in_vllm_itself() -> None:
    """A subclass of vLLM's abstract policy, in its registry, against its default, by its own migration scheduler."""
    if not VLLM.exists():
        pytest.skip(f"vLLM is not here ({VLLM}; `make .venv-vllm` installs it); its interface is covered above")
    # not compiled: small enough, and another version of numba there would overwrite the compiled code of the one here
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([VLLM, "-c", IN_VLLM], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("copies")
