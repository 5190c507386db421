"""What a plan costs in seconds under a model of links, shape and kernels. Modelled, never measured. Pure.

For rank r in one layer of one forward pass, with N_r token-slots of which some come from other ranks:

    T_r = launch_s * G_r + 6 * hidden * inner * rows_r / flop_s + 2 * hidden * width * (near_r / near + far_r / far)

G_r experts with tokens, rows_r their tokens rounded up to whole GEMM tiles, near_r and far_r token-slots that arrive
from the node and from beyond. A layer takes max over r of T_r. Copies travel while the micro-step before computes, so
a layer's copies expose max(0, transfer - the layer's time one micro-step before); before the first there is nothing to
hide behind. An RL step runs each micro-batch twice: recompute (forward) and update (forward and backward, three times
the work; a copy's gradient goes home at twice the weight's bytes, in fp32). Transfers then grow as compute does, so
the whole step is four times the forward pass. The form is ours; rates are assumptions until they are calibrated.
"""

import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.schedule import StepPlan, hosted

PASSES = 4.0  # one forward in recompute, three forwards' worth in the update


class Links(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Effective rates of one rank, bytes/s: `near` inside a node, `far` between nodes; latency of a copy in seconds."""

    near_bytes_s: float
    far_bytes_s: float
    latency_s: float = 20e-6


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A MoE layer: expert = gate, up and down of hidden x inner; width: bytes of a number."""

    hidden: int
    inner: int
    width: int = 2

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * self.width


class Cost(msgspec.Struct, frozen=True):
    """The model's constants. flop_s: what grouped GEMMs achieve on a rank; row_scale: a counted token stands for as
    many."""

    links: Links
    shape: Shape
    flop_s: float = 400e12
    tile_rows: int = 128
    launch_s: float = 2e-6
    row_scale: int = 1


# Effective rates, general knowledge to be calibrated: NVLink4, PCIe 4 x16 through the host, InfiniBand/RoCE 400G.
LINKS = MappingProxyType(
    {
        "nvlink": Links(near_bytes_s=350e9, far_bytes_s=45e9),
        "pcie": Links(near_bytes_s=25e9, far_bytes_s=25e9),
        "ib": Links(near_bytes_s=45e9, far_bytes_s=45e9),
    }
)
SHAPES = MappingProxyType(  # public model configurations
    {
        "qwen3-30b-a3b": Shape(2048, 768),
        "qwen3-235b-a22b": Shape(4096, 1536),
        "gpt-oss-120b": Shape(2880, 2880),
        "deepseek-v3": Shape(7168, 2048),
        "deepseek-v2-lite": Shape(2048, 1408),
        "olmoe-1b-7b": Shape(2048, 1024),
    }
)


class Modelled(msgspec.Struct, frozen=True, eq=False):
    """One forward pass: layers' seconds, exposed transfer seconds, and bytes moved; each [layers, micro-steps]."""

    layer_s: Any
    exposed_s: Any
    moved_bytes: Any

    @property
    def layers_s(self) -> Any:
        """[layers] seconds of the RL step: recompute and update."""
        return PASSES * (self.layer_s + self.exposed_s).sum(axis=1)

    @property
    def total_s(self) -> float:
        """Seconds of the RL step: recompute and update."""
        return float(self.layers_s.sum())


def links_of(name: str) -> Links:
    """Named links, or those of a TOML file with near_bytes_s, far_bytes_s, latency_s. CallerError otherwise."""
    if name in LINKS:
        return LINKS[name]
    path = Path(name)
    if not path.is_file():
        raise CallerError(f"links {name}: neither one of {', '.join(LINKS)} nor a file. Name one, or a TOML file.")
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Links)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise CallerError(f"links {name}: {error}. Give near_bytes_s, far_bytes_s and latency_s, numbers.") from error


def shape_of(name: str) -> Shape:
    """A named shape, or `HIDDENxINNER`. CallerError otherwise."""
    if name in SHAPES:
        return SHAPES[name]
    hidden, cross, inner = name.partition("x")
    if not (cross and hidden.isdecimal() and inner.isdecimal() and int(hidden) and int(inner)):
        raise CallerError(f"model {name}: none of {', '.join(SHAPES)}. Name one, or give HIDDENxINNER, as 2048x768.")
    return Shape(int(hidden), int(inner))


def modelled(plan: StepPlan, cost: Cost) -> Modelled:
    """The plan's modelled seconds and bytes."""
    layers, steps, ranks, experts = plan.shape
    nodes_R = np.arange(ranks) // plan.ranks_per_node
    new = new_copies(plan)
    layer_s, exposed_s = np.zeros((layers, steps)), np.zeros((layers, steps))
    starts = np.argsort(plan.quota[:, 1], kind="stable")
    bounds = np.searchsorted(plan.quota[starts, 1], np.arange(steps + 1))
    for m in range(steps):
        layer, _, source, expert, rank, tokens = plan.quota[starts[bounds[m] : bounds[m + 1]]].astype(np.int64).T
        tokens = tokens * cost.row_scale
        here = (layers, experts, ranks)
        at_LER = np.bincount((layer * experts + expert) * ranks + rank, tokens, layers * experts * ranks).reshape(here)
        rows_LR = (np.ceil(at_LER / cost.tile_rows) * cost.tile_rows).sum(axis=1)
        by_rank, size = layer * ranks + rank, layers * ranks
        far = nodes_R[source] != nodes_R[rank]
        near = ~far & (source != rank)
        near_LR = np.bincount(by_rank, tokens * near, size).reshape(layers, ranks)
        far_LR = np.bincount(by_rank, tokens * far, size).reshape(layers, ranks)
        layer_s[:, m] = _rank_s(cost, (at_LER > 0).sum(axis=1), rows_LR, near_LR, far_LR).max(axis=1)
        transfer_L = _transfer_s(plan, cost, new[:, m], m, nodes_R)
        window_L = layer_s[:, m - 1] if m else np.zeros(layers)
        exposed_s[:, m] = np.maximum(0.0, transfer_L - window_L)
    return Modelled(layer_s, exposed_s, new.sum(axis=(2, 3)) * cost.shape.expert_bytes)


def force_balanced_s(counts_MLRE: Array, plan: StepPlan, cost: Cost) -> float:
    """Seconds of the RL step if the gate sent every expert the same: homes only, nothing moves, whole tiles or not."""
    _, _, ranks, experts = plan.shape
    slots_ML = counts_MLRE.sum(axis=(2, 3)) * cost.row_scale
    share = slots_ML / ranks
    near = min(plan.ranks_per_node, ranks) - 1
    expert_rows = np.ceil(slots_ML / experts / cost.tile_rows) * cost.tile_rows
    rows = np.minimum(expert_rows * experts / ranks, np.ceil(share / cost.tile_rows) * cost.tile_rows)
    each = _rank_s(cost, experts / ranks, rows, share * near / ranks, share * (ranks - 1 - near) / ranks)
    return float(PASSES * each.sum())


def transfer_s(cost: Cost, far: bool = False) -> float:
    """Seconds to bring one expert to a rank."""
    rate = cost.links.far_bytes_s if far else cost.links.near_bytes_s
    return cost.links.latency_s + cost.shape.expert_bytes / rate


def new_copies(plan: StepPlan) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[L, M, R, E] (expert, rank) pairs absent one micro-step before; the first is compared with contiguous homes."""
    from outrider.experts.plan import contiguous_homes

    layers, _, ranks, experts = plan.shape
    present = hosted(plan.hosts, experts)
    before = np.zeros((layers, 1, ranks, experts), dtype=np.bool_)
    before[:, 0, contiguous_homes(experts, ranks), np.arange(experts)] = True
    fresh: np.ndarray[Any, np.dtype[np.bool_]] = present & ~np.concatenate([before, present[:, :-1]], axis=1)
    return fresh


def _rank_s(cost: Cost, groups: Any, rows: Any, near: Any, far: Any) -> Any:
    shape, links = cost.shape, cost.links
    compute = cost.launch_s * groups + 6 * shape.hidden * shape.inner * rows / cost.flop_s
    return compute + 2 * shape.hidden * shape.width * (near / links.near_bytes_s + far / links.far_bytes_s)


def _transfer_s(plan: StepPlan, cost: Cost, new_LRE: Any, m: int, nodes_R: Any) -> Any:
    """[L] seconds until the fullest rank has its new copies: from its node where a holder is there, else from afar."""
    layers, _, ranks, experts = plan.shape
    layer, rank, expert = np.nonzero(new_LRE)
    if not len(layer):
        return np.zeros(layers)
    home = plan.homes[layer, expert]
    near = nodes_R[home] == nodes_R[rank]
    if m:
        held = hosted(plan.hosts[:, m - 1 : m], experts)[:, 0]  # [L, R, E] one micro-step before
        in_node = np.zeros((layers, int(nodes_R.max()) + 1, experts), dtype=np.bool_)
        for r in range(ranks):
            in_node[:, nodes_R[r]] |= held[:, r]
        near = near | in_node[layer, nodes_R[rank], expert]
    seconds = np.where(near, transfer_s(cost), transfer_s(cost, far=True))
    return np.bincount(layer * ranks + rank, seconds, layers * ranks).reshape(layers, ranks).max(axis=1)
