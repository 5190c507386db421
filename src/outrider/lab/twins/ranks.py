"""Modelled ranks for the twin of experts: how long a layer's turn takes, and how long what travels beside it.

A forward turn takes what the cost model says (cost.py: launches, whole tiles, tokens on links), a backward one twice
that. Its tokens are on the rank's links at its begin and at its end, half of them each, the far link outermost. Where
the cost model says `shared_links`, what a link carries stands still while tokens are on it.
An exchange goes in rounds of bounded size, as live; each takes one latency and then the fullest rank's seconds, each
link for itself, in and out side by side; all ranks take part, also with nothing. A pull out of host memory needs no
sender. Near links that are no faster than far
ones, or than the host's, are taken to be the same link.
"""
# ruff: noqa: N803, N806, N815 - array names end in a legend of their axes

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from outrider.errors import LawBroken
from outrider.experts.cost import PASSES, Cost
from outrider.experts.events import Array, Stage
from outrider.experts.exchange import CUDA_ROUND_BYTES, Hop, rounds
from outrider.experts.lane import Span
from outrider.lab.clock import Clock, Timer
from outrider.lab.twins.links import Crew, Task

BACKWARD = PASSES - 2  # a backward turn in forward ones: PASSES are two forward passes and a backward one
Do = Callable[[], object]
Parcels = dict[Hop, float]  # what travels, a number for an expert


class Host(msgspec.Struct, frozen=True):
    """Host memory. bytes_s: one rank's pulls, bytes/s; node_bytes_s: all pulls of its node at once, 0: no limit.

    round_bytes: what a rank sends at most in one round of an exchange.
    General knowledge (PCIe 5 x16), to be calibrated.
    """

    bytes_s: float = 50e9
    node_bytes_s: float = 0.0
    round_bytes: int = CUDA_ROUND_BYTES

    def pulls_s(self, bytes_R: Array, nodes_R: Array) -> Any:
        """[R] seconds until each rank has its bytes, if all begin at once and share their node's memory evenly."""
        own_s = bytes_R / self.bytes_s
        if not self.node_bytes_s:
            return own_s
        beside = np.minimum(bytes_R[:, None], bytes_R) * (nodes_R[:, None] == nodes_R)
        return np.maximum(own_s, beside.sum(axis=1) / self.node_bytes_s)


class Work(msgspec.Struct, frozen=True, eq=False):
    """One micro-batch on all ranks.

    forward_s [L, R]  seconds of a forward turn; tokens_s [L, R, 2]: of them, those of tokens on near and far link
    seen_LRE          token-slots by source and expert; computed_LR: by who computes them
    load_LE           token-slots; home_LE: those computed at home
    by_copies         (layer, rank) -> (expert, token-slots) that copies compute there
    """

    forward_s: Any
    tokens_s: Any
    seen_LRE: Array
    computed_LR: Array
    load_LE: Array
    home_LE: Array
    by_copies: dict[tuple[int, int], list[tuple[int, int]]]


def divided(quotas: Array, seen_LRE: Array, homes_LE: Array) -> Array:
    """Who computes what was seen, rows [n, 5] as in quotas: by quota, in the order of ranks; what is beyond, at home.

    quotas [n, 5]  layer, expert, source, rank, tokens
    """
    quotas = quotas[np.lexsort(quotas[:, 3::-1].T)].astype(np.int64)
    layer, expert, source, _, tokens = quotas.T
    group = (layer * seen_LRE.shape[2] + expert) * seen_LRE.shape[1] + source
    upto = np.cumsum(tokens)
    before = upto - tokens
    before -= before[np.searchsorted(group, group)]
    seen = seen_LRE[layer, source, expert]
    taken = np.minimum(seen, before + tokens) - np.minimum(seen, before)
    rest_LRE = seen_LRE.astype(np.int64)
    np.subtract.at(rest_LRE, (layer, source, expert), taken)
    at = np.argwhere(rest_LRE > 0)
    beyond = np.column_stack([at[:, [0, 2, 1]], homes_LE[at[:, 0], at[:, 2]], rest_LRE[tuple(at.T)]])
    rows: Array = np.concatenate([np.column_stack([quotas[:, :4], taken])[taken > 0], beyond]).astype(np.int64)
    return rows


def work(rows: Array, seen_LRE: Array, homes_LE: Array, nodes_R: Array, cost: Cost) -> Work:
    """Rows as from `divided`. Seconds as `cost.modelled` has them: a test holds the two together."""
    (layers, experts), ranks = homes_LE.shape, len(nodes_R)
    layer, expert, source, rank, tokens = rows.T
    cell = (layer * experts + expert) * ranks + rank
    at_LER = np.bincount(cell, tokens, layers * experts * ranks).reshape(layers, experts, ranks).astype(np.int64)
    tiles_LR = (np.ceil(at_LER * cost.row_scale / cost.tile_rows) * cost.tile_rows).sum(axis=1)
    slots, out, into = tokens * cost.row_scale, nodes_R[source], nodes_R[rank]
    near_LR = _more(layer, source, rank, slots * (source != rank), (layers, ranks))
    far_LN = _more(layer, out, into, slots * (out != into), (layers, int(nodes_R[-1]) + 1)) / np.bincount(nodes_R)
    tokens_s = np.stack([cost.near_s * near_LR, cost.far_s * far_LN[:, nodes_R]], axis=2)
    forward_s = cost.launch_s * (at_LER > 0).sum(axis=1) + cost.row_s * tiles_LR + tokens_s.sum(axis=2)
    home_LE: Array = np.take_along_axis(at_LER, homes_LE[:, :, None], axis=2)[:, :, 0]
    by_copies: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for at, e, r in np.argwhere(at_LER > 0).tolist():
        if homes_LE[at, e] != r:
            by_copies.setdefault((at, r), []).append((e, int(at_LER[at, e, r])))
    seen, load_LE = seen_LRE.astype(np.int64), at_LER.sum(axis=2)
    return Work(forward_s, tokens_s, seen, at_LER.sum(axis=1), load_LE, home_LE, by_copies)


def _more(layer: Any, out: Any, into: Any, tokens: Any, shape: tuple[int, int]) -> Any:
    """[layers, ranks or nodes] tokens that go out or that come in, whichever are more."""
    sums = [np.bincount(layer * shape[1] + end, tokens, shape[0] * shape[1]) for end in (out, into)]
    return np.maximum(*sums).reshape(shape)


class Timed(msgspec.Struct):
    """One pass. compute_s: the slowest rank's turns, added up; exposed_s: how much longer each turn took, because a
    rank waited for copies."""

    stage: Stage
    batch: int
    seconds: float = 0.0
    compute_s: float = 0.0
    exposed_s: list[float] = msgspec.field(default_factory=list)


class Outcome(msgspec.Struct):
    """One RL step, simulated. Lists but `passes`: a number for each rank.

    before_s, after_s   of `seconds`: before passes (masters change homes, weights into shared memory), and from the
                        last one until all gradients are at home
    lane_s              its lane carries something; waiting for other ranks is not counted
    sent_bytes          to other ranks; by_path: bytes of each way of carrying
    batches             exchanges, and pulls of single ranks
    frames, gradients   the most places for copies that a rank ever used, and gradients that one owed at once
    copies, unforeseen, absent   as in the live mover
    """

    lane_s: list[float]
    sent_bytes: list[int]
    seconds: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0
    passes: list[Timed] = msgspec.field(default_factory=list)
    by_path: dict[str, int] = msgspec.field(default_factory=dict)
    batches: int = 0
    frames: int = 0
    gradients: int = 0
    copies: int = 0
    unforeseen: int = 0
    absent: int = 0

    @property
    def compute_s(self) -> float:
        return sum(one.compute_s for one in self.passes)

    @property
    def exposed_s(self) -> float:
        """Seconds of the step in which nothing is computed: ranks wait for copies or gradients."""
        return self.seconds - self.compute_s


class Link:
    """A rank's link, which carries one thing at a time; what it carries stands still while tokens are on it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._taken: list[tuple[float, float]] = []  # by tokens: from, until; in order
        self._left_s = self._since_s = 0.0
        self._do: Do | None = None
        self._timer: Timer | None = None

    def carry(self, seconds: float, do: Do) -> None:
        """Carry something that takes the link so many seconds, then `do`."""
        assert self._do is None, "a link carries one thing at a time"
        self._left_s, self._since_s, self._do = seconds, self.clock.now, do
        self._arrange()

    def take(self, spans: Sequence[tuple[float, float]]) -> None:
        """Tokens will be on it then, from now on and after those that were named before."""
        now, free_s = self.clock.now, self._since_s
        for begin_s, end_s in self._taken:
            self._left_s -= max(0.0, min(begin_s, now) - free_s)
            free_s = max(free_s, min(end_s, now))
        self._left_s, self._since_s = max(0.0, self._left_s - max(0.0, now - free_s)), now
        self._taken = [span for span in (*self._taken, *spans) if span[1] > max(now, span[0])]
        self._arrange()

    def _arrange(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._do is None:
            return
        at_s, left_s = self._since_s, self._left_s
        for begin_s, end_s in self._taken:
            if at_s + left_s <= begin_s:
                break
            left_s -= max(0.0, begin_s - at_s)
            at_s = max(at_s, end_s)
        self._timer = self.clock.at(at_s + left_s, self._end)

    def _end(self) -> None:
        do, self._do = self._do, None
        assert do is not None
        do()


class Meeting:
    """One exchange: it begins when the last rank has come to it, and ends for all at once."""

    def __init__(self, lanes: "Lanes", name: object, hops: Sequence[Hop], size_bytes: int) -> None:
        self.name, self.parcels = name, Parcels()
        self._lanes, self._size_bytes = lanes, size_bytes
        self._begin_s = 0.0
        self._ends: dict[int, Callable[[Parcels], object]] = {}
        self._rounds = rounds(hops, size_bytes, lanes.host.round_bytes)
        self._open = 0

    def join(self, rank: int, name: object, end: Callable[[Parcels], object]) -> None:
        """A rank's lane has come to it. LawBroken where that rank thinks it is at another."""
        if name != self.name:
            raise LawBroken(7, f"rank {rank} comes to exchange {name} where others are at {self.name}")
        self._ends[rank] = end
        if len(self._ends) == len(self._lanes.near):
            self._begin_s = self._lanes.clock.now
            self._next()

    def _next(self) -> None:
        """The next round, or the end."""
        clock = self._lanes.clock
        if self._rounds:
            clock.at(clock.now + self._lanes.cost.links.latency_s, partial(self._carry, self._rounds.pop(0)))
            return
        for rank in sorted(self._ends):
            self._lanes.outcome.lane_s[rank] += clock.now - self._begin_s
            self._ends[rank](self.parcels)

    def _carry(self, hops: Sequence[Hop]) -> None:
        parts = self._lanes.parts(hops, self._size_bytes)
        self._open = 1 + len(parts)
        for link, seconds in parts:
            link.carry(seconds, self._part)
        self._part()

    def _part(self) -> None:
        self._open -= 1
        if not self._open:
            self._next()


class Lanes:
    """The lanes of all ranks, and the links that they use. spans: None, or a list for each rank."""

    def __init__(self, clock: Clock, nodes_R: Array, cost: Cost, host: Host, spans: list[list[Span]] | None) -> None:
        self.clock, self.nodes_R, self.cost, self.host, self.spans = clock, nodes_R, cost, host, spans
        ranks, near_bytes_s = range(len(nodes_R)), cost.links.near_bytes_s
        self.near = [Link(clock) for _ in ranks]
        self.far = self.near if near_bytes_s <= cost.links.far_bytes_s else [Link(clock) for _ in ranks]
        self.pci = self.near if near_bytes_s <= host.bytes_s else [Link(clock) for _ in ranks]
        self._crews = [Crew(1) for _ in ranks]
        self._put, self._done = [0 for _ in ranks], [0 for _ in ranks]
        self._waits: list[tuple[int, int, float, Do] | None] = [None for _ in ranks]
        self._meetings: list[Meeting] = []
        self._met = [0 for _ in ranks]
        self.begin()

    def begin(self) -> None:
        """A new step: nothing has been carried."""
        self.outcome = Outcome([0.0 for _ in self.near], [0 for _ in self.near])

    def put(self, rank: int, what: str, job: Task, layer: int = -1) -> int:
        """Queue a job, which calls what it is given when it is over; its ticket. As `experts.lane.Lane`."""
        self._put[rank] += 1
        self._crews[rank].start(partial(self._begin, rank, what, layer, job))
        return self._put[rank]

    def wait(self, rank: int, ticket: int | None, layer: int, do: Do) -> None:
        """`do` once this job and all before it are done; None: all that was put. Compute waits, one thing at a time.

        layer  whose turn it is, -1 for no one's
        """
        assert self._waits[rank] is None
        self._waits[rank] = (self._put[rank] if ticket is None else ticket), layer, self.clock.now, do
        self._wake(rank)

    def exchange(
        self,
        rank: int,
        name: object,
        what: str,
        hops: Sequence[Hop],
        size_bytes: int,
        pack: Callable[[int, int], float],
        arrived: Callable[[Parcels], object],
    ) -> None:
        """A job of all ranks: the n-th exchange of one is the n-th of all. pack: an expert of this rank, to send."""
        if self._met[rank] == len(self._meetings):
            self._meetings.append(Meeting(self, name, hops, size_bytes))
            self.count(what, size_bytes * sum(src != dst for src, dst, *_ in hops))
        meeting = self._meetings[self._met[rank]]
        self._met[rank] += 1
        for hop in hops:
            if hop[0] == rank:
                meeting.parcels[hop] = pack(*hop[2:])
                self.outcome.sent_bytes[rank] += size_bytes * (hop[1] != rank)
        meeting.join(rank, name, arrived)

    def pull(self, rank: int, what: str, size_bytes: int, seconds: float, arrived: Do) -> None:
        """A job of one rank, which takes its host link so many seconds."""
        self.count(what, size_bytes)
        began_s = self.clock.now

        def ended() -> None:
            self.outcome.lane_s[rank] += self.clock.now - began_s
            arrived()

        self.clock.at(began_s + self.cost.links.latency_s, lambda: self.pci[rank].carry(seconds, ended))

    def busy(self, rank: int, seconds: float, do: Do) -> None:
        """A part of a job that uses nothing which others do."""
        self.outcome.lane_s[rank] += seconds
        self.clock.at(self.clock.now + seconds, do)

    def host_s(self, size_bytes: int, ranks: Sequence[int]) -> Any:
        """[R] seconds until each rank has pulled or put its experts; those of a node are taken to begin together."""
        return self.host.pulls_s(size_bytes * np.bincount(ranks, minlength=len(self.near)), self.nodes_R)

    def take(self, rank: int, near_s: float, far_s: float, until_s: float) -> None:
        """A turn begins: tokens are on its links for so many seconds now, and again at its end."""
        now = self.clock.now
        if self.near[rank] is self.far[rank]:
            self.near[rank].take([(now, now + near_s + far_s), (until_s - near_s - far_s, until_s)])
        else:
            self.near[rank].take([(now + far_s, now + far_s + near_s), (until_s - far_s - near_s, until_s - far_s)])
            self.far[rank].take([(now, now + far_s), (until_s - far_s, until_s)])

    def parts(self, hops: Sequence[Hop], size_bytes: int) -> list[tuple[Link, float]]:
        """Each link that an exchange uses, and for how many seconds."""
        bytes_2RR = np.zeros((2, len(self.near), len(self.near)))  # near and far
        for src, dst, *_ in hops:
            bytes_2RR[int(self.nodes_R[src] != self.nodes_R[dst]), src, dst] += size_bytes * (src != dst)
        fuller = np.maximum(bytes_2RR.sum(axis=1), bytes_2RR.sum(axis=2))
        near_s, far_s = fuller[0] / self.cost.links.near_bytes_s, fuller[1] / self.cost.links.far_bytes_s
        if self.near is self.far:
            near_s, far_s = near_s + far_s, far_s * 0
        links = [*zip(self.near, near_s.tolist(), strict=True), *zip(self.far, far_s.tolist(), strict=True)]
        return [(link, seconds) for link, seconds in links if seconds > 0]

    def count(self, what: str, size_bytes: int) -> None:
        self.outcome.batches += 1
        self.outcome.by_path[what] = self.outcome.by_path.get(what, 0) + size_bytes

    def note(self, rank: int, what: str, layer: int, begin_s: float) -> None:
        if self.spans is not None:
            self.spans[rank].append(Span(what, layer, begin_s, self.clock.now))

    def _begin(self, rank: int, what: str, layer: int, job: Task, next_one: Callable[[], None]) -> None:
        begin_s = self.clock.now

        def over() -> None:
            self.note(rank, what, layer, begin_s)
            self._done[rank] += 1
            self._wake(rank)
            next_one()

        job(over)

    def _wake(self, rank: int) -> None:
        waits = self._waits[rank]
        if waits is not None and waits[0] <= self._done[rank]:
            self._waits[rank] = None
            _, layer, since_s, do = waits
            self.note(rank, "wait", layer, since_s)
            do()
