"""Which copy lies in which frame, and when it is carried there: paging with a known future. Pure; called by policy.py.

A rank has a few frames, places for one expert of any layer. Visits (a layer's turn in a pass) come in a known order and
each needs certain copies. What is evicted for one is what is needed again last of all (Belady's rule: no other way
fetches less), and it is fetched as soon as the visit is over that used the evicted one last. Whether a copy is held
until its backward pass or fetched again follows from the number of frames alone: weights are constant within a step.

A copy's life is TABLE, which the mover checks at each turn (`Copy`). A transfer cannot be un-sent (law 4): a copy that
is not wanted any more arrives all the same, and one that is wanted again while it travels is not sent twice.

    planned -> fetching -> ready <-> in use;  ready -> gradient return -> free, or -> free where no gradient is owed
    planned, fetching -> cancelled -> spare -> free;  cancelled -> fetching and spare -> ready: wanted again
"""

from types import MappingProxyType

import numpy as np

from outrider.errors import LawBroken
from outrider.experts.compiled import compiled
from outrider.experts.events import CANCEL, END, RETURN, WANT, Array

TABLE = MappingProxyType(  # (state, what happens) -> state; whatever else happens breaks law 4
    {
        ("planned", "start"): "fetching",
        ("planned", "cancel"): "cancelled",
        ("fetching", "start"): "fetching",  # cancelled and wanted again before it had started
        ("fetching", "cancel"): "cancelled",
        ("fetching", "end"): "ready",
        ("cancelled", "start"): "cancelled",
        ("cancelled", "want"): "fetching",
        ("cancelled", "end"): "spare",
        ("spare", "want"): "ready",
        ("spare", "evict"): "free",
        ("ready", "cancel"): "spare",
        ("ready", "enter"): "in use",
        ("in use", "enter"): "in use",  # activations are computed again
        ("in use", "leave"): "ready",
        ("ready", "evict"): "free",
        ("ready", "return"): "gradient return",
        ("gradient return", "end"): "free",
    }
)


class Copy:
    """One copy of an expert on this rank, from its planning to its end. owes: it gathered a gradient."""

    def __init__(self, layer: int, expert: int, frame: int) -> None:
        self.layer, self.expert, self.frame = layer, expert, frame
        self.state, self.owes = "planned", False
        self._story: list[str] = []

    def turn(self, what: str) -> None:
        """`what` happens to it. LawBroken, with its story, where TABLE does not know that."""
        then = TABLE.get((self.state, what))
        if then is None or (what == "evict" and self.owes):
            raise LawBroken(4, f"{self} cannot {what}{' and owes a gradient' if self.owes else ''}; {self.story()}")
        self._story.append(what)
        self.state = then
        if what == "return":
            self.owes = False

    def story(self) -> str:
        return f"its story: plan, {', '.join(self._story)}" if self._story else "it was only planned"

    def __str__(self) -> str:
        return f"the copy of layer {self.layer}, expert {self.expert} in frame {self.frame} ({self.state})"


@compiled
def carry(
    page_RF: Array,
    owes_RF: Array,
    fresh_RF: Array,
    cancelled_RF: Array,
    start_R: Array,
    needs: Array,
    homes_P: Array,
    backward_V: Array,
    first: int,
    visits: int,
    last_RP: Array,
    number: int,
) -> Array:
    """Carry rows, not sorted by rank, of the visits from `first` to `first + visits`; needs beyond are fetched ahead.

    page_RF       layer * experts + expert in each frame, -1 for none; changed to what is then so, as the next three
    owes_RF       1: its gradient is not home; fresh_RF 1: no visit has used it yet; cancelled_RF 1: not wanted any more
    start_R       [ranks + 1] where each rank's needs begin
    needs         [n, 3]: visit, page, kind of the transfer; of each rank by visit, from `first` on
    homes_P       home rank of each page
    backward_V    1 where the visit `first + v` has a backward part, for all visits of needs
    last_RP       [ranks, pages] the last pass that needs each, as far as is known; number: of the one that begins. What
                  no later pass needs goes home with its gradient as soon as it was used last
    No visit may need more copies of a rank than it has frames.
    """
    ranks, frames = page_RF.shape
    pages, never, end = homes_P.shape[0], len(needs), first + visits
    rows = np.empty((2 * len(needs) + ranks * frames, 8), dtype=np.int64)
    n_rows = 0
    at_P = np.full(pages, -1, dtype=np.int64)  # frame of a page
    soon_P = np.full(pages, never, dtype=np.int64)  # the next need of a page
    next_N = np.empty(len(needs), dtype=np.int64)  # the next need of the same page
    next_F = np.empty(frames, dtype=np.int64)
    last_F = np.empty(frames, dtype=np.int64)  # the visit that used a frame's content last
    for r in range(ranks):
        low, high = start_R[r], start_R[r + 1]
        for n in range(high - 1, low - 1, -1):
            next_N[n] = soon_P[needs[n, 1]]
            soon_P[needs[n, 1]] = n
        last_F[:] = first - 1
        for f in range(frames):
            page = page_RF[r, f]
            next_F[f] = never
            if page >= 0:
                at_P[page], next_F[f] = f, soon_P[page]
                if next_F[f] == never and fresh_RF[r, f] and not cancelled_RF[r, f]:
                    cancelled_RF[r, f] = 1
                    rows[n_rows] = (first - 1, first, CANCEL, page, 0, homes_P[page], r, f)
                    n_rows += 1
        for n in range(low, high):
            visit, page, kind = needs[n]
            f = at_P[page]
            if f < 0:
                for g in range(frames):  # what is needed again last; of what never is, what has been free for longest
                    if last_F[g] < visit and (next_F[g] == never or needs[next_F[g], 0] > visit):
                        later = f < 0 or next_F[g] > next_F[f]
                        if later or (next_F[g] == next_F[f] and last_F[g] < last_F[f]):
                            f = g
                after = last_F[f]
                if visit >= end and (f < 0 or after >= end - 1):
                    break  # the next pass sees to it
                assert f >= 0, "a visit needs more copies than a rank has frames"
                old = page_RF[r, f]
                if old >= 0:
                    at_P[old] = -1
                    if owes_RF[r, f]:
                        rows[n_rows] = (after, visit, RETURN, old, 0, r, homes_P[old], f)
                        n_rows += 1
                rows[n_rows] = (after, visit, kind, page, 0, homes_P[page], r, f)
                n_rows += 1
                page_RF[r, f], at_P[page] = page, f
                owes_RF[r, f], fresh_RF[r, f], cancelled_RF[r, f] = 0, 1, 0
            elif cancelled_RF[r, f]:
                cancelled_RF[r, f] = 0
                rows[n_rows] = (first - 1, visit, WANT, page, 0, homes_P[page], r, f)
                n_rows += 1
            last_F[f], next_F[f] = visit, next_N[n]
            if visit < end:
                fresh_RF[r, f] = 0
                if backward_V[visit - first]:
                    owes_RF[r, f] = 1
        for f in range(frames):
            page = page_RF[r, f]
            if page >= 0:
                at_P[page] = -1
                if owes_RF[r, f] and next_F[f] == never and last_RP[r, page] <= number:
                    rows[n_rows] = (last_F[f], END, RETURN, page, 0, r, homes_P[page], f)
                    n_rows += 1
                    page_RF[r, f], owes_RF[r, f] = -1, 0
        for n in range(low, high):
            soon_P[needs[n, 1]] = never
    return rows[:n_rows]
