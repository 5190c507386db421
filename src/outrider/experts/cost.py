"""What a plan costs in seconds under a model of links, shape and kernels. Modelled, never measured. Pure.

For rank r in one layer of one forward pass, with N_r token-slots of which some come from other ranks:

    T_r = launch_s * G_r + 6 * hidden * inner * rows_r / flop_s + 2 * hidden * width * (near_r / near + far_r / far)

G_r experts with tokens, rows_r their tokens rounded up to whole GEMM tiles; near_r token-slots that come from other
ranks, all over the node's links in the end; far_r a rank's share of those that come into its node from beyond, since
rails spread them over the node's ranks (a dispatch of two hops, as DeepEP's). A layer takes max over r of T_r.

Copies travel while the micro-step before computes: a layer's expose max(0, transfer - its time one micro-step before).
In the first micro-step the layer before must do, and the first layer has nothing to hide behind. An RL step runs each
micro-batch twice: recompute (forward) and update (forward and backward, three times the work; a copy's gradient goes
home at twice the weight's bytes, in fp32, so that transfers grow as compute does). Between the two, the first
micro-step's copies come while the last one still computes. The form is ours; rates are assumptions until calibrated.
"""

from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.plan import contiguous_homes
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
    launch_s: float = 0.2e-6
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
    """One forward pass: seconds of each rank [L, M, R], and exposed transfer seconds and bytes moved [L, M].

    between_s [L]: exposed between recompute and update.
    """

    rank_s: Any
    exposed_s: Any
    moved_bytes: Any
    between_s: Any

    @property
    def layer_s(self) -> Any:
        """[layers, micro-steps] seconds of one forward pass: the slowest rank's."""
        return self.rank_s.max(axis=2)

    @property
    def layers_s(self) -> Any:
        """[layers] seconds of the RL step: recompute and update."""
        waits = PASSES * self.exposed_s[:, 1:].sum(axis=1) + self.exposed_s[:, 0] + self.between_s
        return PASSES * self.layer_s.sum(axis=1) + waits

    @property
    def exposed_total_s(self) -> float:
        """Seconds of the RL step in which compute waits for copies."""
        return float(self.layers_s.sum() - PASSES * self.layer_s.sum())

    @property
    def total_s(self) -> float:
        """Seconds of the RL step: recompute and update."""
        return float(self.layers_s.sum())


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
    nodes = int(nodes_R[-1]) + 1
    present = hosted(plan.hosts, experts)
    new = new_copies(plan)
    rank_s, exposed_s = np.zeros((layers, steps, ranks)), np.zeros((layers, steps))
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
        near_LR = np.bincount(by_rank, tokens * (source != rank), size).reshape(layers, ranks)
        by_node = np.bincount(layer * nodes + nodes_R[rank], tokens * far, layers * nodes).reshape(layers, nodes)
        far_LR = by_node[:, nodes_R] / np.bincount(nodes_R)[nodes_R]
        rank_s[:, m] = _rank_s(cost, (at_LER > 0).sum(axis=1), rows_LR, near_LR, far_LR)
        before_LRE = present[:, m - 1] if m else None
        window_L = rank_s[:, m - 1 if m else 0].max(axis=1)
        if m == 0:
            window_L = np.concatenate([[0.0], window_L[:-1]])  # the layer before; before the first there is none
        exposed_s[:, m] = np.maximum(0.0, _transfer_s(plan, cost, new[:, m], before_LRE, nodes_R) - window_L)
    first = present[:, 0] & ~present[:, -1]
    again_L = _transfer_s(plan, cost, first, present[:, -1], nodes_R) - rank_s[:, -1].max(axis=1)
    return Modelled(rank_s, exposed_s, new.sum(axis=(2, 3)) * cost.shape.expert_bytes, np.maximum(0.0, again_L))


def tokens_over(found: Modelled, cost: Cost) -> Any:
    """[M, L, R] counted token-slots (fractions too) by which each rank is slower than its layer's mean."""
    shape, links = cost.shape, cost.links
    token_s = 6 * shape.hidden * shape.inner / cost.flop_s + 2 * shape.hidden * shape.width / links.far_bytes_s
    over = (found.rank_s - found.rank_s.mean(axis=2, keepdims=True)) / (token_s * cost.row_scale)
    return over.transpose(1, 0, 2)


def force_balanced_s(counts_MLRE: Array, plan: StepPlan, cost: Cost) -> float:
    """Seconds of the RL step if the gate sent every expert the same: homes only, nothing moves, whole tiles or not."""
    _, _, ranks, experts = plan.shape
    slots_ML = counts_MLRE.sum(axis=(2, 3)) * cost.row_scale
    share = slots_ML / ranks
    beyond = (ranks - min(plan.ranks_per_node, ranks)) / ranks
    expert_rows = np.ceil(slots_ML / experts / cost.tile_rows) * cost.tile_rows
    rows = np.minimum(expert_rows * experts / ranks, np.ceil(share / cost.tile_rows) * cost.tile_rows)
    each = _rank_s(cost, experts / ranks, rows, share * (ranks - 1) / ranks, share * beyond)
    return float(PASSES * each.sum())


def transfer_s(cost: Cost, far: bool = False) -> float:
    """Seconds to bring one expert to a rank."""
    rate = cost.links.far_bytes_s if far else cost.links.near_bytes_s
    return cost.links.latency_s + cost.shape.expert_bytes / rate


def new_copies(plan: StepPlan) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[L, M, R, E] (expert, rank) pairs absent one micro-step before; the first is compared with contiguous homes."""
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


def _transfer_s(plan: StepPlan, cost: Cost, new_LRE: Any, before_LRE: Any, nodes_R: Any) -> Any:
    """[L] seconds until the fullest rank has its new copies: from its node where a holder was, else from afar."""
    layers, _, ranks, _ = plan.shape
    layer, rank, expert = np.nonzero(new_LRE)
    if not len(layer):
        return np.zeros(layers)
    near = nodes_R[plan.homes[layer, expert]] == nodes_R[rank]
    if before_LRE is not None:
        in_node = np.stack([before_LRE[:, nodes_R == node].any(axis=1) for node in range(nodes_R.max() + 1)], axis=1)
        near |= in_node[layer, nodes_R[rank], expert]
    seconds = np.where(near, transfer_s(cost), transfer_s(cost, far=True))
    return np.bincount(layer * ranks + rank, seconds, layers * ranks).reshape(layers, ranks).max(axis=1)
