"""Search a plan for a whole RL step: homes once, then copies and token split of every micro-step. Pure.

Tiers, cheapest first: nothing; split over copies that are there; new copies; new homes. Under `balance` a layer gets
new homes only where its copies alone leave some micro-step above ceil(mean), or had to come from another node. Under
`time` several whole ways through the step are planned, from standing still to following every micro-step, and each
layer takes the one that the cost model calls fastest (cost.py).
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.cost import Cost, modelled, tokens_over, transfer_s
from outrider.experts.events import Array
from outrider.experts.peers import make
from outrider.experts.plan import Plan, homes_of, plan, slots_of
from outrider.experts.schedule import TIERS, StepPlan, assemble, choose, with_homes
from outrider.experts.split import split

HORIZON = 3  # micro-steps that a plan looks ahead (docs/log.md)
REFINED, REFINEMENTS, DAMPING = 2, 8, 0.35  # the best ways, walked again, tokens shifted off ranks that links make slow
SHARES_OF_BREAK_EVEN = (0.5, 2.0)  # least gains that `time` tries, besides taking every gain
FAR = 2**31 - 1  # a gain that no copy reaches
NOTHING, SPLIT, REPLICAS, RELOCATION = range(len(TIERS))
Progress = Callable[[], None]


class Way(msgspec.Struct, frozen=True, eq=False):
    """What all ways through a step have in common; `walk` goes one of them."""

    counts_MLRE: Array
    slots_R: Array
    ranks_per_node: int
    excluded: tuple[int, ...]
    progress: Progress

    @property
    def load_MLE(self) -> Array:  # noqa: N802 - array names end in a legend of their axes
        load: Array = self.counts_MLRE.sum(axis=2)
        return load

    @property
    def domain(self) -> int:
        """Ranks between whose groups experts relocate: nodes, or single ranks where there is but one node."""
        return self.ranks_per_node if self.ranks_per_node < len(self.slots_R) else 1

    def walk(
        self,
        homes_LE: Array,
        start_LRS: Array | None = None,
        least_gain: int = 1,
        bias_MLR: Array | None = None,
    ) -> StepPlan:
        """Plan micro-step after micro-step, from the copies `start_LRS`; `progress` is called after each."""
        load_MLE, before_LRS = self.load_MLE, start_LRS
        steps: list[Plan] = []
        for m, counts_LRE in enumerate(self.counts_MLRE):
            bias_LR = None if bias_MLR is None else bias_MLR[m]
            ahead_HLE = load_MLE[m + 1 : m + 1 + HORIZON]
            steps.append(self.step(counts_LRE, homes_LE, before_LRS, ahead_HLE, least_gain, bias_LR))
            before_LRS = steps[-1].replicas_LRS
            self.progress()
        return assemble(
            "foresight",
            homes_LE,
            [with_homes(homes_LE, step.replicas_LRS) for step in steps],
            [step.quotas for step in steps],
            ranks_per_node=self.ranks_per_node,
            tiers_ML=np.stack([self._tiers(step, homes_LE) for step in steps]),
            proof_MLE=None if bias_MLR is not None else np.stack([step.proof_LE for step in steps]),
            proof_MLR=None if bias_MLR is not None else np.stack([step.proof_LR for step in steps]),
        )

    def step(
        self,
        counts_LRE: Array,
        homes_LE: Array,
        before_LRS: Array | None,
        ahead_HLE: Array,
        least_gain: int = 1,
        bias_LR: Array | None = None,
    ) -> Plan:
        return plan(
            counts_LRE,
            self.slots_R.tolist(),
            homes_LE,
            before_LRS,
            ahead_HLE=ahead_HLE,
            ranks_per_node=self.ranks_per_node,
            excluded=self.excluded,
            bias_LR=bias_LR,
            least_gain=least_gain,
        )

    def relocated(self, homes_LE: Array, size: int) -> Array:
        """New homes: exchanges between groups of `size` ranks."""
        from outrider.experts.relocate import HYSTERESIS, relocate  # numba: heavy

        domains_R = np.arange(len(self.slots_R)) // size
        load_LME = np.ascontiguousarray(self.load_MLE.transpose(1, 0, 2))
        return np.stack([relocate(*layer, domains_R, HYSTERESIS) for layer in zip(load_LME, homes_LE, strict=True)])

    def _tiers(self, step: Plan, homes_LE: Array) -> Array:
        """[L] the cheapest tier that describes what the micro-step did; relocation is told from the homes later."""
        tiers_L = np.full(len(homes_LE), NOTHING)
        away = homes_LE[step.quotas[:, 0], step.quotas[:, 1]] != step.quotas[:, 3]
        tiers_L[step.quotas[away, 0]] = SPLIT
        tiers_L[step.moves[:, 0]] = REPLICAS
        return tiers_L


def search(
    counts_MLRE: Array,
    slots: int | Sequence[int],
    *,
    objective: str = "balance",
    cost: Cost | None = None,
    homes: Array | None = None,
    ranks_per_node: int | None = None,
    excluded: Sequence[int] = (),
    progress: Progress = lambda: None,
) -> StepPlan:
    """Plan one RL step.

    counts_MLRE  token-slots per micro-step, layer, source rank and expert (foresee.py)
    slots        spare slots of every rank, or of each rank
    objective    balance: least largest load, then few copies; time: least modelled seconds under `cost`
    homes        of the step before, [E] or [L, E]; None: contiguous
    progress     called after each micro-step planned, several times as often as there are micro-steps
    Deterministic. CallerError where arguments do not fit.
    """
    if counts_MLRE.ndim != 4 or not len(counts_MLRE):
        raise CallerError(
            f"counts: shape {counts_MLRE.shape}. Give [micro-steps, layers, ranks, experts], one or more."
        )
    if objective not in ("balance", "time") or (objective == "time" and cost is None):
        raise CallerError(f"objective {objective}: give `balance`, or `time` together with a cost model.")
    _, layers, ranks, experts = counts_MLRE.shape
    homes_LE = homes_of(homes, layers, experts, ranks, excluded)
    way = Way(counts_MLRE, slots_of(slots, ranks, excluded), ranks_per_node or ranks, tuple(excluded), progress)
    found = _fastest(way, homes_LE, cost) if cost and objective == "time" else _balanced(way, homes_LE)
    moved_L = (found.homes != homes_LE).any(axis=1)
    found.tiers[moved_L, 0] = RELOCATION
    return found


def _balanced(way: Way, homes_LE: Array) -> StepPlan:
    """Homes as they are; new ones for the layers in which that is not enough."""
    first = way.walk(homes_LE)
    least_LM = -(-way.load_MLE.sum(axis=2).T // (len(way.slots_R) - len(way.excluded)))
    over_L = (first.most - least_LM).sum(axis=1)
    far_L = _far_copies(first)
    wanting_L = (over_L > 0) | (far_L > 0)
    if not wanting_L.any():
        return first
    second = way.walk(np.where(wanting_L[:, None], way.relocated(homes_LE, way.domain), homes_LE))
    now_L = (second.most - least_LM).sum(axis=1)
    better_L = (now_L < over_L) | ((now_L == over_L) & (_far_copies(second) < far_L))
    return choose((first, second), better_L.astype(np.int64))


def _fastest(way: Way, homes_LE: Array, cost: Cost) -> StepPlan:
    """Of several ways through the step, in each layer the one of least modelled seconds; ties to the first named."""
    between_LE = way.relocated(homes_LE, way.domain)
    all_homes = [homes_LE, between_LE, *([way.relocated(between_LE, 1)] if way.domain > 1 else [])]
    _, _, ranks, experts = way.counts_MLRE.shape
    total_LRE = way.counts_MLRE.sum(axis=0)
    nothing_HLE = way.load_MLE[:0]
    gains = [1, *(max(1, round(share * _break_even(cost))) for share in SHARES_OF_BREAK_EVEN), FAR]
    tried: list[tuple[Way, Array, Array | None, int]] = []
    for homes in all_homes:
        whole = way.step(total_LRE, homes, None, nothing_HLE).replicas_LRS
        tried += [(way, homes, start, gain) for start in (None, whole) for gain in gains]
    even = all((np.bincount(homes_E, minlength=ranks) * ranks == experts).all() for homes_E in homes_LE)
    if even and not way.excluded:
        tried.append((*_eplb_layout(way), FAR))
    ways = [one.walk(homes, start, gain) for one, homes, start, gain in tried]
    costs = [modelled(one, cost) for one in ways]
    for i in np.argsort([one.total_s for one in costs], kind="stable")[:REFINED].tolist():
        one, homes, start, gain = tried[i]
        refined, bias_MLR = costs[i], np.zeros(way.counts_MLRE.shape[:3], dtype=np.int64)
        for _ in range(REFINEMENTS):
            bias_MLR = bias_MLR + np.rint(tokens_over(refined, cost) * DAMPING).astype(np.int64)
            ways.append(one.walk(homes, start, gain, bias_MLR))
            refined = modelled(ways[-1], cost)
            costs.append(refined)
    seconds = np.stack([one.layers_s for one in costs])
    return choose(ways, seconds.argmin(axis=0))


def _eplb_layout(way: Way) -> tuple[Way, Array, Array]:
    """EPLB's placement on the step's totals: a way whose slots hold it, its homes and its copies.

    Homes are spread over ranks as evenly as the placement allows; together with its copies a rank never holds more
    than its slots, only the mix differs from layer to layer.
    """
    _, layers, ranks, experts = way.counts_MLRE.shape
    hosts_LRX, _ = make("split", way.counts_MLRE, way.slots_R, way.ranks_per_node).step(0)
    homes_LE = np.empty((layers, experts), dtype=np.int64)
    replicas_LRS = np.full(hosts_LRX.shape, -1, dtype=np.int64)
    for layer, hosts_RX in enumerate(hosts_LRX):
        first_E = np.array([np.flatnonzero((hosts_RX == expert).any(axis=1))[0] for expert in range(experts)])
        share = split(np.ones(experts, dtype=np.int64), first_E, hosts_RX)  # one token an expert: it lies at its home
        home = share.tokens == 1
        homes_LE[layer, share.expert[home]] = share.rank[home]
        for rank in range(ranks):
            copies = share.expert[~home & (share.rank == rank)]
            replicas_LRS[layer, rank, : len(copies)] = copies
    width = int((replicas_LRS >= 0).sum(axis=2).max())
    slots_R = np.full(ranks, width, dtype=np.int64)
    return msgspec.structs.replace(way, slots_R=slots_R), homes_LE, replicas_LRS[:, :, :width]


def _break_even(cost: Cost) -> float:
    """Counted tokens that a copy must take off the fullest rank to pay for its exposed transfer."""
    flop = 6 * cost.shape.hidden * cost.shape.inner * cost.row_scale
    return transfer_s(cost) * cost.flop_s / flop


def _far_copies(found: StepPlan) -> Array:
    """[L] copies away from their home's node, over all micro-steps."""
    nodes_R = np.arange(found.shape[2]) // found.ranks_per_node
    at = found.hosts.clip(min=0).astype(np.int64)
    home = np.take_along_axis(found.homes[:, None, None, :], at, axis=3)
    far: Array = ((found.hosts >= 0) & (nodes_R[home] != nodes_R[:, None])).sum(axis=(1, 2, 3))
    return far
