"""The drop-in for DeepSeek's EPLB: as balanced as its outputs, the same ids where loads have no ties; its laws."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.experts import rebalance_experts

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "eplb-vectors" / "vectors.json.xz"


@pytest.fixture(scope="module")
def vectors() -> Any:
    if not VECTORS.exists():
        pytest.skip(f"outputs of DeepSeek's program are not here ({VECTORS}); the laws below need none")
    with lzma.open(VECTORS, "rt") as file:
        return json.load(file)


def on_gpus(weight_LE: Any, phy2log: Any, logcnt: Any, gpus: int) -> Any:
    """[layers, gpus] load of each GPU when copies share evenly."""
    return np.take_along_axis(weight_LE / logcnt, phy2log, axis=1).reshape(len(weight_LE), gpus, -1).sum(axis=2)


def test_as_balanced_as_the_original_and_the_same_ids_without_ties(vectors: Any) -> None:
    rows = same = free_of_ties = 0
    for vector in vectors:
        weight = np.array(vector["weight"], dtype=np.float64)
        sizes = [vector[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus")]
        phy2log, _, logcnt = rebalance_experts(weight, *sizes)
        load = on_gpus(weight, phy2log, logcnt, sizes[3])
        assert load.max(axis=1) / load.mean(axis=1) == pytest.approx(vector["gpu_max_over_mean"], abs=2e-6)
        assert (np.sort(logcnt) == np.sort(vector["logcnt"])).all()
        groups = weight.reshape(len(weight), sizes[1], -1).sum(axis=2)
        for layer, row in enumerate(phy2log):
            each = (weight[layer] / logcnt[layer]).astype(np.float32)
            ties = len(np.unique(each)) < len(each)
            ties |= sizes[1] > 1 and len(np.unique(groups[layer])) < sizes[1]
            equal = row.tolist() == vector["phy2log"][layer]
            assert equal or ties, f"{vector['name']}, layer {layer}: other ids without a tie"
            rows, same, free_of_ties = rows + 1, same + equal, free_of_ties + (not ties)
    assert (len(vectors), rows) == (29, 316)
    assert free_of_ties >= 50
    assert same >= 170


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, int, int, int, int]:
    nodes, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 6]))
    gpus = nodes * draw(st.integers(1, 3))
    experts = groups * draw(st.integers(1, 5))
    replicas = (-(-experts // gpus) + draw(st.integers(0, 3))) * gpus
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heat = draw(st.sampled_from([0.0, 0.5, 2.0]))
    return rng.poisson(rng.lognormal(3, heat, (2, experts))), replicas, groups, nodes, gpus


@given(problems())
@settings(max_examples=200, deadline=None)
def test_laws(problem: tuple[Any, int, int, int, int]) -> None:
    weight, replicas, groups, nodes, _ = problem
    phy2log, log2phy, logcnt = rebalance_experts(*problem)
    layers, experts = weight.shape
    assert phy2log.shape == (layers, replicas)
    assert log2phy.shape == (layers, experts, logcnt.max())
    assert logcnt.shape == (layers, experts)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == np.int64
    assert (logcnt >= 1).all()
    assert (logcnt.sum(axis=1) == replicas).all()
    for layer in range(layers):
        assert (np.bincount(phy2log[layer], minlength=experts) == logcnt[layer]).all()
        for e in range(experts):
            slots = log2phy[layer, e]
            assert (slots[logcnt[layer, e] :] == -1).all(), "padding comes last"
            assert sorted(slots[: logcnt[layer, e]]) == np.flatnonzero(phy2log[layer] == e).tolist()
    parts = nodes if groups % nodes == 0 else 1
    if groups % nodes == 0:
        group = experts // groups
        node_of_slot = np.arange(replicas) * nodes // replicas
        for layer in range(layers):
            homes = {(int(e) // group, int(n)) for e, n in zip(phy2log[layer], node_of_slot, strict=True)}
            assert len(homes) == groups, "a group lies in one node"
            assert (np.bincount([n for _, n in homes], minlength=nodes) == groups // nodes).all()
    for layer in range(layers):  # copies: nothing spread over as many slots has a lower maximum
        for part in np.split(phy2log[layer], parts):
            mine = np.unique(part)
            highest = (weight[layer] / logcnt[layer])[mine].max()
            needed = (
                np.maximum(1, np.ceil(weight[layer, mine] / (highest * (1 - 1e-6)))) if highest else [len(part) + 1]
            )
            assert np.sum(needed) > len(part)


def test_torch_in_torch_out() -> None:
    weight = torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) * 90
    ours = rebalance_experts(weight, 12, 2, 2, 4)
    assert [type(part) for part in ours] == [torch.Tensor] * 3
    assert [part.dtype for part in ours] == [torch.int64] * 3
    for tensor, array in zip(ours, rebalance_experts(weight.numpy(), 12, 2, 2, 4), strict=True):
        assert (tensor.numpy() == array).all()
    half = rebalance_experts(weight.to(torch.bfloat16).requires_grad_(), 12, 2, 2, 4)
    assert half[0].shape == (3, 12)


def test_nodes_that_do_not_divide_groups_are_one_node() -> None:
    weight = np.random.default_rng(5).lognormal(3, 1, (2, 12))
    for ours, flat in zip(rebalance_experts(weight, 16, 3, 2, 8), rebalance_experts(weight, 16, 1, 1, 8), strict=True):
        assert (ours == flat).all()


@pytest.mark.parametrize(
    ("shape", "sizes", "says"),
    [
        ((2, 8), (10, 1, 1, 4), "num_replicas: 10 is no multiple of num_gpus, 4"),
        ((2, 8), (4, 1, 1, 4), "num_replicas 4 for 8 experts"),
        ((2, 8), (12, 3, 3, 6), "experts: 8 is no multiple of num_groups, 3"),
        ((2, 8), (9, 2, 2, 3), "num_gpus: 3 is no multiple of num_nodes, 2"),
        ((8,), (8, 1, 1, 4), "weight: shape"),
        ((2, 8), (8, 1, 1, 0), "num_gpus 0"),
        ((2, 8), (8.0, 1, 1, 4), "num_replicas: 8.0. Give an integer"),
    ],
)
def test_what_does_not_divide_is_refused(shape: Any, sizes: Any, says: str) -> None:
    with pytest.raises(CallerError, match=says):
        rebalance_experts(np.ones(shape), *sizes)


def test_loads_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CallerError, match="no number"):
        rebalance_experts(np.array([[1.0, np.nan]]), 2, 1, 1, 1)
