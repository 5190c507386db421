"""Rival planners in one form, so that they are counted and timed as ours is. Pure; for comparison, never for training.

    name            places                                           splits an expert's tokens          moves
    static          contiguous homes                                 -                                  nothing
    eplb            EPLB on the step's own totals                    evenly over copies                 once
    eplb-oracle     EPLB on each micro-step's own totals             evenly over copies                 every time
    split           as eplb                                          exactly, each micro-step           once
    lplb-like       EPLB without copies, then a fixed graph of them  exactly, each micro-step           once
    flexmoe-like    vExperts, adjusted to the micro-step before      evenly over vExperts               as it adjusts
    llep-like       contiguous homes, spills over the cap            as it spills                       every time
    force-balanced  the limit: any expert on any rank                equal ranks, to a token            every time

Each has what it is described to have, and what foresight gives at no cost: `eplb` and `split` see the whole step, while
the published ones see history. FlexMoE's Migrate, LPLB's solver (any optimum equals ours) and LLEP's token order are
left out. EPLB needs equal slots: where ranks differ, it takes what the poorest has. llep-like and force-balanced stream
weights and keep to no slots: their rows of hosts are as wide as there are experts, and every copy is to be counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from outrider.errors import CallerError
from outrider.experts.eplb import rebalance_experts
from outrider.experts.events import Array
from outrider.experts.plan import contiguous_homes
from outrider.experts.split import split

LLEP_FACTOR = 1.1  # published defaults: max_tokens_factor, min_tokens_per_gemm, and native below this max/mean
LLEP_LEAST_TOKENS = 1024
LLEP_NATIVE = 1.3
FLEXMOE_ENOUGH = 1.01  # max/mean below which nothing is adjusted; ours, low, to its favour in balance
CUBE = ((3, 0, 1, 2, 7, 4, 5, 6), (6, 7, 4, 5, 0, 1, 2, 3))  # 8 ranks: two rings of four, joined across

Step = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class Peer:
    """homes_LE: a rank that holds each expert before the first micro-step.

    step(m) gives hosts_LRS, the expert in each slot of each rank, homes included, -1 for none; and quota rows [n, 5],
    layer, expert, source, rank, tokens: sorted by the first four, positive, adding up to the counts. Both int64.
    """

    homes_LE: Array
    step: Callable[[int], Step]


@dataclass(frozen=True, slots=True)
class Given:
    """counts_MLRE of a step, spare slots of each rank, real rows that a counted token stands for; and what follows:
    contiguous homes, slots of each rank with its homes, the node of each rank."""

    counts_MLRE: Array
    slots_R: Array
    row_scale: int
    homes_LE: Array
    room_R: Array
    nodes_R: Array
    ranks_per_node: int


def make(name: str, counts_MLRE: Array, slots_R: Array, ranks_per_node: int, row_scale: int = 1) -> Peer:
    """The rival of that name for this step. CallerError for a name that is none and where its layout has no room."""
    if name not in PEERS:
        raise CallerError(f"planner {name}: none of {', '.join(PEERS)}. Name one of them.")
    if counts_MLRE.ndim != 4 or len(slots_R) != counts_MLRE.shape[2]:
        raise CallerError(
            f"counts {counts_MLRE.shape} with slots of {len(slots_R)} ranks."
            " Give [micro-steps, layers, ranks, experts] and a number of slots for each rank."
        )
    counts_MLRE, slots_R = np.ascontiguousarray(counts_MLRE, dtype=np.int64), np.asarray(slots_R, dtype=np.int64)
    _, layers, ranks, experts = counts_MLRE.shape
    homes_E = contiguous_homes(experts, ranks)
    homes_LE, room_R = np.broadcast_to(homes_E, (layers, experts)), np.bincount(homes_E, minlength=ranks) + slots_R
    nodes_R = np.arange(ranks, dtype=np.int64) // ranks_per_node
    return PEERS[name](Given(counts_MLRE, slots_R, row_scale, homes_LE, room_R, nodes_R, ranks_per_node))


def _static(given: Given) -> Peer:
    return _fixed(given, _at_home(given), _evenly)


def _eplb(given: Given) -> Peer:
    return _fixed(given, _placed(given, given.counts_MLRE.sum(axis=(0, 2))), _evenly)


def _split(given: Given) -> Peer:
    return _fixed(given, _placed(given, given.counts_MLRE.sum(axis=(0, 2))), _exactly)


def _eplb_oracle(given: Given) -> Peer:
    def step(m: int) -> Step:
        hosts_LRX = _placed(given, given.counts_MLRE[m].sum(axis=1))
        return hosts_LRX, _evenly(given, m, hosts_LRX)

    return Peer(given.homes_LE, step)


def _lplb(given: Given) -> Peer:
    """Slot j of a rank holds the (j+1)-th heaviest expert of its j-th neighbour, so that an expert has one copy more
    at most, and lighter experts none."""
    _, layers, ranks, experts = given.counts_MLRE.shape
    load_LE = given.counts_MLRE.sum(axis=(0, 2))
    homes_LRX = np.full((layers, ranks, int(given.room_R.max())), -1, dtype=np.int64)
    if experts % ranks:  # EPLB has no layout then
        own = _at_home(given)
    else:
        own = rebalance_experts(load_LE, experts, 1, 1, ranks)[0].reshape(layers, ranks, -1)
    homes_LRX[:, :, : own.shape[2]] = own
    hosts_LRX = homes_LRX.copy()
    heat = np.where(homes_LRX < 0, -1, np.take_along_axis(load_LE[:, None], homes_LRX.clip(0), axis=2))
    heaviest_LRX = np.take_along_axis(homes_LRX, np.argsort(-heat, axis=2, kind="stable"), axis=2)
    kept_R = (homes_LRX[0] >= 0).sum(axis=1)
    for j in range(int(given.slots_R.max(initial=0))):
        for r, neighbour in enumerate(neighbours(ranks, given.ranks_per_node, j)):
            if j < given.slots_R[r] and j < kept_R[neighbour] and neighbour != r:
                hosts_LRX[:, r, kept_R[r] + j] = heaviest_LRX[:, neighbour, j]
    return _fixed(given, hosts_LRX, _exactly)


def neighbours(ranks: int, ranks_per_node: int, slot: int) -> list[int]:
    """The rank whose expert each rank copies into this slot: a cube of 8 ranks, a hypercube of 16, a torus of nodes
    (first the node's ring, then the ring across nodes), a ring otherwise; from the third slot on farther along it.
    """
    everyone = range(ranks)
    if slot < 2 and ranks == 8:
        return list(CUBE[slot])
    if slot < 2 and ranks == 16:  # the 4-cube's edges as 4-rings of two dimensions each
        ring, low = (1, 3, 0, 2), 4**slot
        return [r + (ring[r // low % 4] - r // low % 4) * low for r in everyone]
    size = ranks_per_node
    if slot < 2 and 1 < size < ranks and ranks % size == 0:
        inside = [r // size * size + (r - 1) % size for r in everyone]
        return inside if slot == 0 else [(r - size) % ranks for r in everyone]
    return [(r - slot - 1) % ranks for r in everyone]


def _flexmoe(given: Given) -> Peer:
    from outrider.experts import rivals  # numba: heavy, and an optional dependency of the package

    seen = [_at_home(given)]  # hosts of each micro-step so far: the next are made from the last

    def step(m: int) -> Step:
        while len(seen) <= m:
            hosts_LRX, load_LE = seen[-1].copy(), given.counts_MLRE[len(seen) - 1].sum(axis=1)
            for layer, load_E in enumerate(load_LE):
                rivals.adjust(load_E, hosts_LRX[layer], given.room_R, FLEXMOE_ENOUGH)
            seen.append(hosts_LRX)
        return seen[m].copy(), _evenly(given, m, seen[m])

    return Peer(given.homes_LE, step)


def _llep(given: Given) -> Peer:
    from outrider.experts import quotas, rivals

    ranks, experts = given.counts_MLRE.shape[2:]
    least = -(-LLEP_LEAST_TOKENS // given.row_scale)

    def step(m: int) -> Step:
        counts_LRE, homes_LE = given.counts_MLRE[m], given.homes_LE
        tokens_LER = np.zeros((len(counts_LRE), experts, ranks), dtype=np.int64)
        for layer, load_E in enumerate(counts_LRE.sum(axis=1)):
            native = np.bincount(homes_LE[layer], load_E, ranks)
            if native.max() < LLEP_NATIVE * native.mean():
                tokens_LER[layer, np.arange(experts), homes_LE[layer]] = load_E
            else:
                tokens_LER[layer] = rivals.spill(load_E, homes_LE[layer], ranks, LLEP_FACTOR, least)
        shares = np.argwhere(tokens_LER)
        shares = np.column_stack([shares, tokens_LER[tuple(shares.T)]])
        return _hosts(given, shares[:, [0, 1, 2]]), quotas.by_source(counts_LRE, shares, given.nodes_R)

    return Peer(given.homes_LE, step)


def _force_balanced(given: Given) -> Peer:
    """Token-slots of a layer in a line, expert by expert and source by source, cut into equal parts: one a rank."""
    ranks = given.counts_MLRE.shape[2]

    def step(m: int) -> Step:
        rows = []
        for layer, counts_RE in enumerate(given.counts_MLRE[m]):
            ends = np.cumsum(counts_RE.T.ravel())  # of each (expert, source)
            total = int(ends[-1]) if len(ends) else 0
            cuts = np.cumsum(np.full(ranks, total // ranks) + (np.arange(ranks) < total % ranks))
            edges = np.union1d(ends, cuts)
            begins = np.concatenate([[0], edges[:-1]])
            some = edges > begins
            cell, rank = np.searchsorted(ends, begins[some], "right"), np.searchsorted(cuts, begins[some], "right")
            line = [np.full(len(cell), layer), cell // ranks, cell % ranks, rank, (edges - begins)[some]]
            rows.append(np.column_stack(line))
        quota = np.concatenate(rows).astype(np.int64)
        return _hosts(given, quota[:, [0, 1, 3]]), quota

    return Peer(given.homes_LE, step)


PEERS: Mapping[str, Callable[[Given], Peer]] = MappingProxyType(
    {
        "static": _static,
        "eplb": _eplb,
        "eplb-oracle": _eplb_oracle,
        "split": _split,
        "lplb-like": _lplb,
        "flexmoe-like": _flexmoe,
        "llep-like": _llep,
        "force-balanced": _force_balanced,
    }
)


def _fixed(given: Given, hosts_LRX: Array, share: Callable[[Given, int, Array], Array]) -> Peer:
    return Peer(_first_hosts(given, hosts_LRX), lambda m: (hosts_LRX.copy(), share(given, m, hosts_LRX)))


def _at_home(given: Given) -> Array:
    """hosts_LRX of contiguous homes, spare slots empty."""
    layers, experts = given.homes_LE.shape
    hosts_LRX = np.full((layers, len(given.slots_R), int(given.room_R.max())), -1, dtype=np.int64)
    homes_E = given.homes_LE[0]
    hosts_LRX[:, homes_E, np.arange(experts) - np.searchsorted(homes_E, homes_E)] = np.arange(experts)
    return hosts_LRX


def _placed(given: Given, load_LE: Array) -> Array:
    """hosts_LRX of EPLB, all GPUs as one node (there are no expert groups to keep together)."""
    layers, experts = load_LE.shape
    ranks, each = len(given.slots_R), int(given.room_R.min())
    if each * ranks < experts:
        raise CallerError(
            f"EPLB: {experts} experts in {each} slots of each of {ranks} ranks. It needs as many on every rank:"
            " give the poorest more spare slots."
        )
    hosts_LRX = np.full((layers, ranks, int(given.room_R.max())), -1, dtype=np.int64)
    hosts_LRX[:, :, :each] = rebalance_experts(load_LE, each * ranks, 1, 1, ranks)[0].reshape(layers, ranks, each)
    return hosts_LRX


def _evenly(given: Given, m: int, hosts_LRX: Array) -> Array:
    from outrider.experts import packing

    return packing.deal(given.counts_MLRE[m], hosts_LRX)


def _exactly(given: Given, m: int, hosts_LRX: Array) -> Array:
    """The least largest load that these hosts allow, near sources first."""
    from outrider.experts import quotas

    counts_LRE, homes_LE = given.counts_MLRE[m], _first_hosts(given, hosts_LRX)
    shares = []
    for layer, load_E in enumerate(counts_LRE.sum(axis=1)):
        best = split(load_E, homes_LE[layer], hosts_LRX[layer])
        line = np.column_stack([np.full(len(best.expert), layer), best.expert, best.rank, best.tokens])
        shares.append(line[best.tokens > 0])
    return quotas.by_source(counts_LRE, np.concatenate(shares).astype(np.int64), given.nodes_R)


def _first_hosts(given: Given, hosts_LRX: Array) -> Array:
    """homes_LE: the lowest rank that holds each expert."""
    homes_LE = np.empty(given.homes_LE.shape, dtype=np.int64)
    for r in reversed(range(hosts_LRX.shape[1])):
        layer, slot = np.nonzero(hosts_LRX[:, r] >= 0)
        homes_LE[layer, hosts_LRX[layer, r, slot]] = r
    return homes_LE


def _hosts(given: Given, used: Array) -> Array:
    """hosts_LRX, X experts wide: homes, and whatever computes. used [n, 3]: layer, expert, rank."""
    layers, experts = given.homes_LE.shape
    ranks = len(given.slots_R)
    held_LRE = np.zeros((layers, ranks, experts), dtype=np.bool_)
    held_LRE[:, given.homes_LE[0], np.arange(experts)] = True
    held_LRE[used[:, 0], used[:, 2], used[:, 1]] = True
    numbers = np.sort(np.where(held_LRE, np.arange(experts), experts), axis=2)
    hosts: Array = np.where(numbers == experts, -1, numbers)
    return hosts
