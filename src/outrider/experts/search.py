"""Search a plan for a whole RL step: homes once, then copies and token split of every micro-step. Pure.

Tiers, cheapest first: nothing; split over copies that are there; new copies; new homes. Under `balance` a layer gets
new homes only where its copies alone leave some micro-step above ceil(mean), or had to come from another node. Under
`time` several whole ways through the step are planned (ways.py), from standing still to following every micro-step,
between nodes with copies that stand for the whole step or without; each layer takes the one that the cost model calls
fastest (cost.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.cost import Cost, Modelled, modelled, tokens_over, transfer_s
from outrider.experts.events import Array
from outrider.experts.peers import make
from outrider.experts.plan import homes_of, slots_of
from outrider.experts.schedule import StepPlan, choose
from outrider.experts.split import split
from outrider.experts.ways import RELOCATION, Progress, Way, settle, through

REFINED, REFINEMENTS, DAMPING = 2, 8, 0.35  # the best ways, walked again, tokens shifted off ranks that links make slow
SHARES_OF_BREAK_EVEN = (0.5, 2.0)  # least gains that `time` tries, besides taking every gain
FAR = 2**31 - 1  # a gain that no copy reaches
SHARES, MOST = (0.5, 0.25, 0.75), (2, 1, 3)  # standing copies tried: of a node's slots, and of a home rank's experts
Go = Callable[..., StepPlan]


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
    excluded = tuple(sorted(set(excluded)))
    homes_LE = homes_of(homes, layers, experts, ranks, excluded)
    way = Way(counts_MLRE, slots_of(slots, ranks, excluded), ranks_per_node or ranks, excluded, progress)
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


class Race:
    """Ways are gone one after the other; of each layer the fastest so far is kept, of equals the first."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.runs: list[tuple[Go, Modelled]] = []
        self.mixed: list[StepPlan] = []  # of each layer the fastest: one plan, once a way was gone
        self.seconds_L: Any = np.inf
        self.whole: list[StepPlan] = []  # the fastest of the ways as they are
        self.whole_s = np.inf

    def run(self, go: Go) -> Modelled:
        """Go this way; what it takes."""
        plan = go()
        found = modelled(plan, self.cost)
        faster_L = found.layers_s < self.seconds_L
        if faster_L.any():
            self.mixed = [choose((*self.mixed, plan), faster_L.astype(np.int64) * len(self.mixed))]
            self.seconds_L = np.minimum(self.seconds_L, found.layers_s)
        if found.total_s < self.whole_s:
            self.whole, self.whole_s = [plan], found.total_s
        self.runs.append((go, found))
        return found

    def best(self) -> StepPlan:
        """Never slower than a way that was gone: a layer's first copies hide behind the layer before, so that layers of
        different ways may fit less well than they did."""
        return self.mixed[0] if modelled(self.mixed[0], self.cost).total_s <= self.whole_s else self.whole[0]

    def leaders(self, places: int) -> list[tuple[Go, Modelled]]:
        """The fastest ways as they are."""
        return sorted(self.runs, key=lambda run: run[1].total_s)[:places]


class Knobs(NamedTuple):
    """Of ways with standing copies: which homes, share of the slots, copies of one home rank's experts, and how other
    copies come inside nodes (ways.through)."""

    homes: int
    share: float
    most: int
    whole: bool
    least_gain: int


def _fastest(way: Way, homes_LE: Array, cost: Cost) -> StepPlan:
    """Of several ways through the step, in each layer the one of least modelled seconds; ties to the first tried."""
    between_LE = way.relocated(homes_LE, way.domain)
    all_homes = [homes_LE, between_LE, *([way.relocated(between_LE, 1)] if way.domain > 1 else [])]
    gains = [1, *(max(1, round(share * _break_even(cost))) for share in SHARES_OF_BREAK_EVEN), FAR]
    race = Race(cost)
    for homes in all_homes:
        for start in (None, way.whole(homes)):
            for gain in gains:
                race.run(partial(way.walk, homes, start, gain))
    _, _, ranks, experts = way.counts_MLRE.shape
    even = all((np.bincount(homes_E, minlength=ranks) * ranks == experts).all() for homes_E in homes_LE)
    if even and not way.excluded:
        layout, homes, start = _eplb_layout(way)
        race.run(partial(layout.walk, homes, start, FAR))
    if way.domain > 1 and way.slots_R.any():
        _run_standing(race, way, all_homes, gains)
    for go, found in race.leaders(REFINED):
        last, bias_MLR = found, np.zeros(way.counts_MLRE.shape[:3], dtype=np.int64)
        for _ in range(REFINEMENTS):
            bias_MLR = bias_MLR + np.rint(tokens_over(last, cost) * DAMPING).astype(np.int64)
            last = race.run(partial(go, bias_MLR=bias_MLR))
    return race.best()


def _run_standing(race: Race, way: Way, all_homes: Sequence[Array], gains: Sequence[int]) -> None:
    """Ways with standing copies: the homes that suit them, then how many, then how eagerly others come beside them."""
    seconds: dict[Knobs, float] = {}

    def best(options: list[Knobs]) -> Knobs:
        for knobs in options:
            if knobs not in seconds:
                settled = settle(way, all_homes[knobs.homes], knobs.share, knobs.most, race.cost)
                found = race.run(partial(through, way, settled, knobs.whole, knobs.least_gain))
                seconds[knobs] = found.total_s
        return min(seconds, key=seconds.__getitem__)  # of equals the first

    kinds = [(False, gains[0]), (True, gains[-1])]
    knobs = best([Knobs(i, SHARES[0], MOST[0], *kind) for i in range(len(all_homes)) for kind in kinds])
    knobs = best([knobs._replace(share=share, most=most) for share in SHARES for most in MOST])
    best([knobs._replace(whole=whole, least_gain=gain) for whole in (False, True) for gain in gains])


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
    """Counted tokens that a copy must take off the fullest rank to pay for its transfer, if none of it is hidden."""
    return transfer_s(cost) / (cost.row_s + cost.near_s) / cost.row_scale


def _far_copies(found: StepPlan) -> Array:
    """[L] copies away from their home's node, over all micro-steps."""
    nodes_R = np.arange(found.shape[2]) // found.ranks_per_node
    at = found.hosts.clip(min=0).astype(np.int64)
    home = np.take_along_axis(found.homes[:, None, None, :], at, axis=3)
    far: Array = ((found.hosts >= 0) & (nodes_R[home] != nodes_R[:, None])).sum(axis=(1, 2, 3))
    return far
