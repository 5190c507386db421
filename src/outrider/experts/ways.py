"""Ways through a whole step: micro-step after micro-step, given homes and knobs. Pure; search.py compares them.

`Way.walk` plans all ranks as one. `settle` and `through` go node by node: which experts a node holds for the whole
step, and which node computes which tokens, is settled first (nodes.py), and then each node is planned by itself, its
standing copies' tokens counting as carried already, so that copies inside a node are of its own experts: their weights
and gradients stay on near links.
"""

from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from outrider.experts.cost import Cost
from outrider.experts.events import Array
from outrider.experts.plan import HORIZON, Plan, check_rows, plan
from outrider.experts.schedule import TIERS, StepPlan, assemble, with_homes

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
    def nodes_R(self) -> Array:  # noqa: N802
        nodes: Array = np.arange(len(self.slots_R)) // self.ranks_per_node
        return nodes

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
        steps = list(self.steps(homes_LE, start_LRS, least_gain, bias_MLR))
        return assemble(
            "foresight",
            homes_LE,
            [with_homes(homes_LE, step.replicas_LRS) for step in steps],
            [step.quotas for step in steps],
            ranks_per_node=self.ranks_per_node,
            tiers_ML=np.stack([tiers(step.quotas, step.moves, homes_LE) for step in steps]),
            proof_MLE=None if bias_MLR is not None else np.stack([step.proof_LE for step in steps]),
            proof_MLR=None if bias_MLR is not None else np.stack([step.proof_LR for step in steps]),
        )

    def steps(
        self, homes_LE: Array, start_LRS: Array | None, least_gain: int, bias_MLR: Array | None
    ) -> Iterator[Plan]:
        """The plans of the micro-steps, one after the other."""
        load_MLE, before_LRS = self.load_MLE, start_LRS
        for m, counts_LRE in enumerate(self.counts_MLRE):
            bias_LR = None if bias_MLR is None else bias_MLR[m]
            ahead_HLE = load_MLE[m + 1 : m + 1 + HORIZON]
            step = self.step(counts_LRE, homes_LE, before_LRS, ahead_HLE, least_gain, bias_LR)
            before_LRS = step.replicas_LRS
            self.progress()
            yield step

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

    def whole(self, homes_LE: Array, bias_MLR: Array | None = None) -> Array:
        """replicas_LRS that would serve all micro-steps taken together."""
        bias_LR = None if bias_MLR is None else bias_MLR.sum(axis=0)
        together = self.step(self.counts_MLRE.sum(axis=0), homes_LE, None, self.load_MLE[:0], bias_LR=bias_LR)
        return together.replicas_LRS

    def relocated(self, homes_LE: Array, size: int) -> Array:
        """New homes: exchanges between groups of `size` ranks."""
        from outrider.experts.relocate import HYSTERESIS, relocate  # numba: heavy

        domains_R = np.arange(len(self.slots_R)) // size
        load_LME = np.ascontiguousarray(self.load_MLE.transpose(1, 0, 2))
        return np.stack([relocate(*layer, domains_R, HYSTERESIS) for layer in zip(load_LME, homes_LE, strict=True)])


class Settled(msgspec.Struct, frozen=True, eq=False):
    """What is settled between nodes for the whole step. N nodes.

    standing_LNE   rank of each node's standing copy of an expert, -1 for none
    tokens_MLNE    token-slots that each node computes
    slots_R        slots left for copies inside the node
    """

    homes_LE: Array
    standing_LNE: Array
    tokens_MLNE: Array
    slots_R: Array


def settle(way: Way, homes_LE: Array, share: float, most: int, cost: Cost) -> Settled:
    """Give standing copies this share of each node's slots; `most` of them for the experts of one home rank."""
    from outrider.experts import nodes  # numba: heavy

    nodes_R, ranks = way.nodes_R, len(way.slots_R)
    room_R = np.zeros(ranks, dtype=np.int64)
    for node in range(int(nodes_R[-1]) + 1):
        mine = np.flatnonzero(nodes_R == node)
        for depth in range(int(way.slots_R.max(initial=0))):  # every rank's first slot, then every rank's second
            for rank in mine[way.slots_R[mine] > depth].tolist():
                room_R[rank] += room_R[mine].sum() < round(share * way.slots_R[mine].sum())
    by_node = np.add.reduceat(way.counts_MLRE, np.searchsorted(nodes_R, np.unique(nodes_R)), axis=2)
    load_LMNE = np.ascontiguousarray(by_node.transpose(1, 0, 2, 3), dtype=np.int64)
    room_N = np.bincount(nodes_R, room_R).astype(np.int64)
    open_N = np.bincount(nodes_R, ~np.isin(np.arange(ranks), way.excluded)).astype(np.int64)
    rank_s, far_s = cost.row_scale * (cost.row_s + cost.near_s), cost.row_scale * cost.far_s
    standing, tokens = [], []
    for load_MNE, homes_E in zip(load_LMNE, homes_LE, strict=True):
        held_NE = nodes.stand(load_MNE, homes_E, nodes_R, room_N, most)
        standing.append(nodes.seat(load_MNE, homes_E, nodes_R, held_NE, room_R))
        tokens.append(nodes.route(load_MNE, homes_E, nodes_R, open_N, standing[-1], rank_s, far_s))
    return Settled(homes_LE, np.stack(standing), np.stack(tokens, axis=1), way.slots_R - room_R)


def through(
    way: Way, settled: Settled, whole: bool = False, least_gain: int = 1, bias_MLR: Array | None = None
) -> StepPlan:
    """Plan every node by itself. whole: from the copies that serve all micro-steps taken together, instead of none."""
    homes_LE, nodes_R = settled.homes_LE, way.nodes_R
    nodes = [n for n in np.unique(nodes_R).tolist() if not set(np.flatnonzero(nodes_R == n)) <= set(way.excluded)]
    layer, node, expert = np.nonzero(settled.standing_LNE >= 0)
    rank = settled.standing_LNE[layer, node, expert]
    standing_LRS = np.full((len(homes_LE), len(nodes_R), int(way.slots_R.max(initial=0))), -1, dtype=np.int64)
    standing_LRS[layer, rank, settled.slots_R[rank] + _place(layer * len(nodes_R) + rank)] = expert
    plans = [_inside(way, settled, n, whole, least_gain, bias_MLR) for n in nodes]
    replicas, rows, tiers_ML = [], [], []
    for m, steps in enumerate(zip(*plans, strict=True)):
        replicas_LRS = standing_LRS.copy()
        tokens = settled.tokens_MLNE[m, layer, node, expert]
        shares, moves = [np.stack([layer, expert, rank, tokens], axis=1)], []
        for n, step in zip(nodes, steps, strict=True):
            mine = np.flatnonzero(nodes_R == n)
            inside_LRS = replicas_LRS[:, mine, : step.replicas_LRS.shape[2]]
            replicas_LRS[:, mine, : inside_LRS.shape[2]] = np.where(
                step.replicas_LRS < 0, inside_LRS, step.replicas_LRS
            )
            shares.append(step.quotas[:, [0, 1, 3, 4]] + [0, 0, mine[0], 0])
            moves.append(step.moves)
        rows.append(_by_source(way.counts_MLRE[m], np.concatenate(shares), homes_LE, replicas_LRS, nodes_R))
        tiers_ML.append(tiers(rows[m], np.concatenate(moves), homes_LE))
        replicas.append(with_homes(homes_LE, replicas_LRS))
        way.progress()
    per_node, tiered = way.ranks_per_node, np.stack(tiers_ML)
    return assemble("foresight", homes_LE, replicas, rows, ranks_per_node=per_node, tiers_ML=tiered)


def tiers(quotas: Array, moves: Array, homes_LE: Array) -> Array:
    """[L] the cheapest tier that describes what a micro-step did; relocation is told from the homes later."""
    tiers_L = np.full(len(homes_LE), NOTHING)
    away = homes_LE[quotas[:, 0], quotas[:, 1]] != quotas[:, 3]
    tiers_L[quotas[away, 0]] = SPLIT
    tiers_L[moves[:, 0]] = REPLICAS
    return tiers_L


def _inside(
    way: Way, settled: Settled, node: int, whole: bool, least_gain: int, bias_MLR: Array | None
) -> Iterator[Plan]:
    """The plans of one node by itself: its own experts and what it computes of them; ranks count from its first.

    All tokens are said to come from that one: sources are told when all is planned.
    """
    mine = np.flatnonzero(way.nodes_R == node)
    standing_LE, tokens_MLE = settled.standing_LNE[:, node], settled.tokens_MLNE[:, :, node]
    own_LE = way.nodes_R[settled.homes_LE] == node
    counts_MLRE = np.zeros((*tokens_MLE.shape[:2], len(mine), own_LE.shape[1]), dtype=np.int64)
    counts_MLRE[:, :, 0] = tokens_MLE * own_LE
    carried_MLR = np.zeros(counts_MLRE.shape[:3], dtype=np.int64)
    if bias_MLR is not None:
        carried_MLR += bias_MLR[:, :, mine]
    for layer, expert in np.argwhere(standing_LE >= 0).tolist():
        carried_MLR[:, layer, standing_LE[layer, expert] - mine[0]] += tokens_MLE[:, layer, expert]
    inside = msgspec.structs.replace(
        way,
        counts_MLRE=counts_MLRE,
        slots_R=settled.slots_R[mine],
        excluded=tuple(rank - int(mine[0]) for rank in way.excluded if rank in mine),
        progress=lambda: None,
    )
    nowhere = np.setdiff1d(mine, way.excluded)[0]  # experts of other nodes: without tokens, wherever they are
    homes_LE = np.where(own_LE, settled.homes_LE, nowhere) - mine[0]
    start_LRS = inside.whole(homes_LE, carried_MLR) if whole else None
    return inside.steps(homes_LE, start_LRS, least_gain, carried_MLR)


def _by_source(counts_LRE: Array, shares: Array, homes_LE: Array, replicas_LRS: Array, nodes_R: Array) -> Array:
    """Quota rows of a micro-step from shares [n, 4] layer, expert, rank, tokens. LawBroken if they do not come out."""
    from outrider.experts import quotas  # numba: heavy

    layers, ranks, _ = counts_LRE.shape
    shares = shares[shares[:, 3] > 0].astype(np.int64)
    shares = shares[np.lexsort(shares[:, 2::-1].T)]
    load_LR = np.bincount(shares[:, 0] * ranks + shares[:, 2], shares[:, 3], layers * ranks).reshape(layers, ranks)
    counts_LRE = np.ascontiguousarray(counts_LRE, dtype=np.int64)
    rows: Array = quotas.by_source(counts_LRE, shares, nodes_R)
    check_rows(rows, counts_LRE, homes_LE, replicas_LRS, load_LR.max(axis=1).astype(np.int64))
    return rows


def _place(keys: Array) -> Array:
    """0, 1, ... among equal keys, in their order."""
    order = np.argsort(keys, kind="stable")
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = np.arange(len(keys)) - np.searchsorted(keys[order], keys[order])
    return place
