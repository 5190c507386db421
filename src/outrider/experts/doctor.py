"""Does balancing pay here? The answer in plain words, from the routes and a cost model. Pure; called by commands.py.

Every figure is modelled: it compares plans of the same routes under the same assumptions, and says which assumption
would have to change for the answer to change.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.cost import LINKS, Cost, force_balanced_s, modelled
from outrider.experts.events import Array
from outrider.experts.plan import contiguous_homes
from outrider.experts.schedule import StepPlan
from outrider.experts.search import search
from outrider.experts.ways import Way

SLOTS = (0, 1, 2, 4)
ENOUGH = 0.01  # a slot more must save this share of the step
SCALES = (0.25, 1, 4, 16)
MUCH_PADDING = 0.2
LAYERS = 6


class Advice(msgspec.Struct, frozen=True):
    """Seconds by slots, of static homes and of an even gate; slots to take; share saved; what would change it.

    waiting   share of the ranks' time that they wait for the fullest one, at home
    padding   share of the rows computed at home that only fill up GEMM tiles
    """

    seconds_by_slots: dict[int, float]
    static_s: float
    force_balanced_s: float
    waiting: float
    padding: float
    slots: int
    saved: float
    saved_by_links: dict[str, float]
    saved_by_scale: dict[str, float]
    slot_bytes: int
    words: tuple[str, ...]


def advise(counts_MLRE: Array, cost: Cost, ranks_per_node: int, progress: Callable[[], None] = lambda: None) -> Advice:
    """Plan with several numbers of slots, under several links and sizes, and say what follows.

    Of many layers an even sample of LAYERS is looked at, and seconds are scaled up to all.
    """
    some = np.unique(np.linspace(0, counts_MLRE.shape[1] - 1, LAYERS).astype(int))
    share = counts_MLRE.shape[1] / len(some)
    slot_bytes = cost.shape.expert_bytes * counts_MLRE.shape[1]
    counts_MLRE = np.ascontiguousarray(counts_MLRE[:, some])

    def planned(slots: int, cost: Cost) -> StepPlan:
        found = search(counts_MLRE, slots, objective="time", cost=cost, ranks_per_node=ranks_per_node)
        progress()
        return found

    if not counts_MLRE.any():
        raise CallerError(
            "doctor: no token of these micro-batches has a route. Give a table whose rows are not all missing."
        )
    _, layers, ranks, experts = counts_MLRE.shape
    homes_LE = np.tile(contiguous_homes(experts, ranks), (layers, 1))
    static = Way(counts_MLRE, np.zeros(ranks, dtype=np.int64), ranks_per_node, (), lambda: None).walk(homes_LE)
    plans = {slots: planned(slots, cost) for slots in SLOTS}
    by_slots = {slots: share * modelled(plan, cost).total_s for slots, plan in plans.items()}
    at_home = modelled(static, cost)
    best_s, static_s = min(by_slots.values()), share * at_home.total_s
    slots = next(n for n in SLOTS if by_slots[n] <= best_s + ENOUGH * static_s)

    def saved(other: Cost) -> float:
        return 1 - modelled(planned(slots, other), other).total_s / modelled(static, other).total_s

    links = {name: saved(msgspec.structs.replace(cost, links=link)) for name, link in LINKS.items()}
    scales = {f"x{scale:g}": saved(msgspec.structs.replace(cost, row_scale=cost.row_scale * scale)) for scale in SCALES}
    advice = Advice(
        by_slots,
        static_s,
        share * force_balanced_s(counts_MLRE, static, cost),
        1 - float(at_home.rank_s.mean(axis=2).sum() / at_home.layer_s.sum()),
        _padding(counts_MLRE, cost),
        slots,
        1 - by_slots[slots] / static_s,
        links,
        scales,
        slot_bytes,
        (),
    )
    return msgspec.structs.replace(advice, words=_words(advice, static, plans[slots], counts_MLRE))


def _words(advice: Advice, static: StepPlan, plan: StepPlan, counts_MLRE: Array) -> tuple[str, ...]:
    load = counts_MLRE.sum(axis=2)
    steady = _likeness(load)
    first = (
        f"Without balancing, ranks spend {advice.waiting:.0%} of the modelled step waiting for the fullest one."
        if advice.waiting > ENOUGH
        else f"The load is even already: ranks wait for the fullest one {advice.waiting:.1%} of the modelled step."
    )
    if advice.padding > MUCH_PADDING:
        first += f" {advice.padding:.0%} of the rows computed only fill up GEMM tiles: larger micro-batches would help."
    if advice.saved <= ENOUGH:
        return (first, f"Balancing does not pay here: at best it saves {advice.saved:.1%}.", *_changes(advice))
    homes = (plan.homes != contiguous_homes(plan.shape[3], plan.shape[2])).mean()
    gain = f"{advice.saved:.0%} of the step ({advice.static_s / advice.seconds_by_slots[advice.slots]:.2f}x)"
    follow = "one placement serves most of the step" if steady > 0.95 else "copies have to follow the micro-steps"
    memory = advice.slot_bytes * advice.slots / 1e9
    how = (
        f"Balancing pays: {advice.slots} spare slot(s) a rank save {gain}, for {memory:.2f} GB a rank if every layer"
        f" has its own. {homes:.0%} of the experts relocate at the step boundary; neighbouring micro-steps are"
        f" {steady:.0%} alike, so {follow}."
        if advice.slots
        else f"Balancing pays without spare slots: {homes:.0%} of the experts relocate at the step boundary, and that"
        f" saves {gain}. Copies would cost what they save."
    )
    far = (
        (f"{_crossing(plan):.0%} of all token-slots cross between nodes, instead of {_crossing(static):.0%}.",)
        if plan.ranks_per_node < plan.shape[2]
        else ()
    )
    return (first, how, *far, *_changes(advice))


def _changes(advice: Advice) -> tuple[str, ...]:
    links = ", ".join(f"{name} {share:.0%}" for name, share in advice.saved_by_links.items())
    scales = ", ".join(f"{name} {share:.0%}" for name, share in advice.saved_by_scale.items())
    return f"Saved under other links: {links}.", f"Saved with micro-batches of other sizes: {scales}."


def _padding(counts_MLRE: Array, cost: Cost) -> float:
    rows = counts_MLRE.sum(axis=2) * cost.row_scale
    return 1 - float(rows.sum() / (np.ceil(rows / cost.tile_rows) * cost.tile_rows).sum())


def _crossing(plan: StepPlan) -> float:
    """Share of the token-slots that are computed in another node than their source's."""
    source, rank, tokens = plan.quota[:, 2], plan.quota[:, 4], plan.quota[:, 5]
    away = source // plan.ranks_per_node != rank // plan.ranks_per_node
    return float(tokens[away].sum() / max(1, tokens.sum()))


def _likeness(load_MLE: Any) -> float:
    """One less the total variation between neighbouring micro-steps' expert shares, mean over layers."""
    if len(load_MLE) < 2:
        return 1.0
    shares = load_MLE / load_MLE.sum(axis=2, keepdims=True).clip(min=1)
    return float(1 - np.abs(np.diff(shares, axis=0)).sum(axis=2).mean() / 2)
