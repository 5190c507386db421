"""What a plan costs in seconds under a model of links, shape and kernels. Modelled, never measured. Pure.

For rank r in one layer of one forward pass, with N_r token-slots of which some come from other ranks:

    T_r = launch_s * G_r + 6 * hidden * inner * rows_r / flop_s + 2 * hidden * width * (near_r / near + far_r / far)

G_r experts with tokens, rows_r their tokens rounded up to whole GEMM tiles. near_r: token-slots that come from other
ranks, or that go to them, whichever are more; all use the node's links in the end. far_r: a rank's share of those that
come into its node, or that leave it, whichever are more, since rails spread them over the node's ranks (a dispatch of
two hops, as DeepEP's). A layer takes max over r of T_r.

Copies get their weights from home, or from the lowest rank of their own node that held the expert one micro-step
before; their gradients go home in fp32, which takes twice as long. A rank receives and sends side by side, and the
longer counts, on near and on far links. It hides while the micro-step before leaves that link idle: all of its seconds,
less those of the rank's tokens on that link (without `shared_links`: all). Near links that are no faster than far ones
are taken to be the same.

An RL step runs each micro-batch twice: recompute (forward; weights come) and update (forward and backward, three times
the work; weights come, and gradients of copies that are given up go home). The first micro-step of recompute has the
layer before to hide copies behind, and its first layer nothing; that of the update has the last of recompute. After the
last, the gradients of all copies go home while the layer before runs backward, two thirds of its update; the first
layer's are waited for. The form is ours; rates are assumptions until calibrated. Optimizer state is left out.
"""

import math
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
    """Effective rates of one rank, bytes/s: `near` inside a node, `far` between nodes; latency of a copy in seconds.

    ValueError for rates that are none: 0, negative, endless.
    """

    near_bytes_s: float
    far_bytes_s: float
    latency_s: float = 20e-6

    def __post_init__(self) -> None:
        for name, value in (("near_bytes_s", self.near_bytes_s), ("far_bytes_s", self.far_bytes_s)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, which is no rate")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"latency_s is {self.latency_s}, which is no time")


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
    many; shared_links: copies wait while tokens are on their link."""

    links: Links
    shape: Shape
    flop_s: float = 400e12
    tile_rows: int = 128
    launch_s: float = 0.2e-6
    row_scale: float = 1
    shared_links: bool = True

    @property
    def row_s(self) -> float:
        """Seconds that a token-slot computes."""
        return 6 * self.shape.hidden * self.shape.inner / self.flop_s

    @property
    def near_s(self) -> float:
        """Seconds that a token-slot is on a rank's near link, there and back."""
        return 2 * self.shape.hidden * self.shape.width / self.links.near_bytes_s

    @property
    def far_s(self) -> float:
        """Seconds that a token-slot is on a rank's far link, there and back."""
        return 2 * self.shape.hidden * self.shape.width / self.links.far_bytes_s


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
    """rank_s [L, M, R]: seconds of one forward pass. moved_bytes [L, M]: weights of new copies.

    recompute_wait_s, update_wait_s [L, M], last_wait_s [L]: seconds in which compute waits for copies in either stage,
    and at last for gradients.
    """

    rank_s: Any
    moved_bytes: Any
    recompute_wait_s: Any
    update_wait_s: Any
    last_wait_s: Any

    @property
    def layer_s(self) -> Any:
        """[layers, micro-steps] seconds of one forward pass: the slowest rank's."""
        return self.rank_s.max(axis=2)

    @property
    def layers_s(self) -> Any:
        """[layers] seconds of the RL step: recompute and update."""
        waits = (self.recompute_wait_s + self.update_wait_s).sum(axis=1) + self.last_wait_s
        return PASSES * self.layer_s.sum(axis=1) + waits

    @property
    def exposed_total_s(self) -> float:
        """Seconds of the RL step in which compute waits for copies."""
        return float((self.recompute_wait_s + self.update_wait_s).sum() + self.last_wait_s.sum())

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
    rank_s, tokens_s = np.zeros((layers, steps, ranks)), np.zeros((layers, steps, ranks, 2))
    starts = np.argsort(plan.quota[:, 1], kind="stable")
    bounds = np.searchsorted(plan.quota[starts, 1], np.arange(steps + 1))
    for m in range(steps):
        layer, _, source, expert, rank, tokens = plan.quota[starts[bounds[m] : bounds[m + 1]]].astype(np.int64).T
        tokens = tokens * cost.row_scale
        here = (layers, experts, ranks)
        at_LER = np.bincount((layer * experts + expert) * ranks + rank, tokens, layers * experts * ranks).reshape(here)
        rows_LR = (np.ceil(at_LER / cost.tile_rows) * cost.tile_rows).sum(axis=1)
        near_LR = _more(layer, source, rank, tokens * (source != rank), (layers, ranks))
        out, into = nodes_R[source], nodes_R[rank]
        far_LN = _more(layer, out, into, tokens * (out != into), (layers, int(nodes_R[-1]) + 1)) / np.bincount(nodes_R)
        tokens_s[:, m] = np.stack([cost.near_s * near_LR, cost.far_s * far_LN[:, nodes_R]], axis=2)
        rank_s[:, m] = cost.launch_s * (at_LER > 0).sum(axis=1) + cost.row_s * rows_LR + tokens_s[:, m].sum(axis=2)
    new = new_copies(plan)
    waits = _waits(plan, cost, new, _idle_s(cost, rank_s, tokens_s))
    return Modelled(rank_s, new.sum(axis=(2, 3)) * cost.shape.expert_bytes, *waits)


def tokens_over(found: Modelled, cost: Cost) -> Any:
    """[M, L, R] counted token-slots (fractions too) by which each rank is slower than its layer's mean."""
    over = (found.rank_s - found.rank_s.mean(axis=2, keepdims=True)) / ((cost.row_s + cost.far_s) * cost.row_scale)
    return over.transpose(1, 0, 2)


def force_balanced_s(counts_MLRE: Array, plan: StepPlan, cost: Cost) -> float:
    """Seconds of the RL step under an even gate: every source sends every expert as many tokens, experts are at home
    only, nothing moves, whole tiles or not.

    Such a gate has no likes, so that all tokens but one node's share cross between nodes. It is the field's yardstick,
    not a bound: a plan that keeps tokens in their node may be faster.
    """
    _, _, ranks, experts = plan.shape
    slots_ML = counts_MLRE.sum(axis=(2, 3)) * cost.row_scale
    share = slots_ML / ranks
    beyond = (ranks - min(plan.ranks_per_node, ranks)) / ranks
    expert_rows = np.ceil(slots_ML / experts / cost.tile_rows) * cost.tile_rows
    rows = np.minimum(expert_rows * experts / ranks, np.ceil(share / cost.tile_rows) * cost.tile_rows)
    travel_s = share * ((ranks - 1) / ranks * cost.near_s + beyond * cost.far_s)
    return float(PASSES * (cost.launch_s * experts / ranks + cost.row_s * rows + travel_s).sum())


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


def _more(layer: Any, out: Any, into: Any, tokens: Any, shape: tuple[int, int]) -> Any:
    """[layers, ranks or nodes] tokens that go out or that come in, whichever are more."""
    sums = [np.bincount(layer * shape[1] + end, tokens, shape[0] * shape[1]) for end in (out, into)]
    return np.maximum(*sums).reshape(shape)


def _idle_s(cost: Cost, rank_s: Any, tokens_s: Any) -> Any:
    """[L, M, R, 2] seconds of a forward pass in which a rank's near and far link may carry copies."""
    if not cost.shared_links:
        tokens_s = np.zeros_like(tokens_s)
    return rank_s.max(axis=2)[:, :, None, None] - _as_links_are(cost, tokens_s)


def _as_links_are(cost: Cost, seconds: Any) -> Any:
    """Seconds on near and far links [..., 2]: the sum on both, where both are one link."""
    one = cost.links.near_bytes_s <= cost.links.far_bytes_s
    return np.repeat(seconds.sum(axis=-1, keepdims=True), 2, axis=-1) if one else seconds


def _waits(plan: StepPlan, cost: Cost, new: Any, idle_s: Any) -> tuple[Any, Any, Any]:
    """recompute_wait_s, update_wait_s [L, M], last_wait_s [L]."""
    present = hosted(plan.hosts, plan.shape[3])
    come = np.concatenate([new, present[:, :1] & ~present[:, -1:]], axis=1)  # the last ones: again for the update
    weights_s = _carried_s(plan, cost, come, np.concatenate([np.zeros_like(present[:, :1]), present], axis=1))
    copies = present.copy()
    layer, expert = np.indices(plan.homes.shape)
    copies[layer, :, plan.homes, expert] = False
    given_up = copies & ~np.concatenate([present[:, 1:], np.zeros_like(present[:, :1])], axis=1)
    gradients_s = 2 * _carried_s(plan, cost, given_up, None)
    before_s = np.concatenate([np.zeros_like(idle_s[:1]), idle_s[:-1]])  # of the layer before
    hidden_s = np.concatenate([before_s[:, :1], idle_s[:, :-1]], axis=1)
    recompute_s = _over(weights_s[:, :-1], hidden_s)
    first_s = _over(weights_s[:, -1:], idle_s[:, -1:])
    later_s = _over(weights_s[:, 1:-1] + gradients_s[:, :-1], 3 * hidden_s[:, 1:])
    last_s = _over(gradients_s[:, -1], 2 * before_s[:, -1])
    return recompute_s, np.concatenate([first_s, later_s], axis=1), last_s


def _over(seconds: Any, hidden_s: Any) -> Any:
    """Seconds of the worst rank and link that are not hidden: the last two axes."""
    return np.maximum(0.0, seconds - hidden_s).max(axis=(-2, -1))


def _carried_s(plan: StepPlan, cost: Cost, copies: Any, before: Any) -> Any:
    """[L, M, R, 2] seconds of a rank's near and far link for these copies [L, M, R, E].

    before: who held which expert one micro-step before, for weights; None: gradients. The first micro-step's weights
    come from contiguous homes, so that homes elsewhere are paid for.
    """
    layers, steps, ranks, experts = copies.shape
    nodes_R = np.arange(ranks) // plan.ranks_per_node
    layer, m, rank, expert = np.nonzero(copies)
    end = plan.homes[layer, expert].astype(np.int64)
    if before is not None:
        end = np.where(m == 0, contiguous_homes(experts, ranks)[expert], end)
        away = np.flatnonzero(nodes_R[end] != nodes_R[rank])
        holds = before[layer[away], m[away], :, expert[away]] & (nodes_R == nodes_R[rank[away], None])
        some = holds.any(axis=1)
        end[away[some]] = holds[some].argmax(axis=1)
    far = nodes_R[end] != nodes_R[rank]
    seconds = np.where(far, transfer_s(cost, far=True), transfer_s(cost))
    size = layers * steps * ranks * 2
    sums = [np.bincount(((layer * steps + m) * ranks + side) * 2 + far, seconds, size) for side in (end, rank)]
    return _as_links_are(cost, np.maximum(*sums).reshape(layers, steps, ranks, 2))
