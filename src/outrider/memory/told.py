"""What being told about the future does to blocks: wanted, not wanted any more, over. Pure; owned by `policy.py`.

Wants are kept in `paths.py`; here they meet the blocks' states. `missing` are the wanted blocks that lie below host
only: what is to be lifted, as soon as there is time and room; `file` keeps it as blocks change.
"""

import math
from collections.abc import Iterable

from outrider.memory import foresee
from outrider.memory.lifts import Lane, Lifts
from outrider.memory.paths import Paths
from outrider.memory.residency import At, Block, Residency
from outrider.memory.settings import Settings
from outrider.wants import Want


class Told:
    """Wants applied to residency."""

    def __init__(self, settings: Settings, residency: Residency, paths: Paths) -> None:
        self._settings, self._residency, self._paths = settings, residency, paths
        self.missing = Lifts()

    def want(self, want: Want, now: float) -> None:
        """Put a want in place of the older one of its item; one worth nothing is a withdrawal."""
        if want.saved_s <= 0:
            self.withdraw(want.item, now)
            return
        self.drop(want.item, now)
        self._paths.add_want(want)
        self.watch(self._paths.items(want.item), now)

    def watch(self, items: Iterable[str], now: float) -> None:
        """Of these blocks' wanted ones, lift those below host only; want again those on their way unwanted (law 4)."""
        for item in items:
            block = self._residency.blocks.get(item)
            if block is None or item not in self._paths.told:
                continue
            block.ended = False
            self._residency.mark(block)
            if block.state["host"] is At.UNWANTED:
                self._residency.turn(block, "host", "want", now)

    def drop(self, name: str, now: float) -> None:
        """This want is met, replaced or given up: what is on its way for it alone is unwanted."""
        if self._paths.drop_want(name) is not None:
            for item in self._paths.items(name):
                self.cancel(item, now)

    def withdraw(self, name: str, now: float) -> None:
        """The path is over: its blocks that nobody else holds or wants leave before all others."""
        self.drop(name, now)
        for item in self._paths.end(name):
            block = self._residency.blocks.get(item)
            if block is not None:
                block.ended = True
                self._residency.mark(block)

    def cancel(self, item: str, now: float) -> None:
        """A copy on its way to host that no lease and no want waits for is unwanted; it cannot be un-sent (law 4)."""
        block = self._residency.blocks.get(item)
        if block and block.state["host"] is At.COMING and not block.joins and item not in self._paths.told:
            self._residency.turn(block, "host", "cancel", now)

    def give_up(self, overdue_s: float, now: float) -> int:
        """Drop the wants whose deadline passed so long ago; how many."""
        count = 0
        while self._paths.deadlines and self._paths.deadlines[0][0] + overdue_s <= now:
            self.drop(self._paths.deadlines[0][1], now)
            count += 1
        return count

    def file(self, item: str) -> None:
        """Something about this block changed: is it missing, and in which lane?"""
        block = self._residency.blocks.get(item)
        lane = self._lane(block) if block is not None and item in self._paths.told else None
        if lane is None:
            self.missing.drop(item)
        else:
            self.missing.put(item, lane, self._paths.wants_of(item))

    def due_s(self, by_s: float, lane: Lane) -> float:
        """From when on a wanted block of this lane should be on its way to host.

        From disk at once; what the hybrid tier holds can wait in the device's cache until its time is near.
        """
        if lane[0] == "disk":
            return -math.inf
        return foresee.latest_start_s(by_s, self._copy_s(lane)) - foresee.SLACK_S

    def moments(self, now: float) -> list[float]:
        """When wants must next be looked at by themselves: latest starts and deadlines of lifts, ends of patience."""
        moments = [self._paths.deadlines[0][0] + self._settings.patience_s] if self._paths.deadlines else []
        for lane in self.missing.lanes():
            copy_s = self._copy_s(lane)
            start_s = foresee.latest_start_s(0.0, copy_s)
            for before_s in (0.0, start_s, start_s - foresee.SLACK_S)[: 2 if lane[0] == "disk" else 3]:
                by_s = self.missing.next_by_s(lane, now - before_s)
                while by_s + before_s <= now:  # but for rounding
                    by_s = self.missing.next_by_s(lane, by_s)
                moments.append(by_s + before_s)
        return [at_s for at_s in moments if at_s < math.inf]

    def _lane(self, block: Block) -> Lane | None:
        source = self._residency.source(block) if block.state["host"] is At.ABSENT else None
        if source is None:
            return None
        coming = source == "hybrid" and block.state.get("cache", At.ABSENT) is not At.ABSENT
        return "coming" if coming else source, block.size_bytes

    def _copy_s(self, lane: Lane) -> float:
        """Seconds for all that is missing, were it all of this kind."""
        return len(self.missing) * lane[1] / self._settings.read_rate(source_of(lane))


def source_of(lane: Lane) -> str:
    """Where the blocks of a lane are read."""
    return "hybrid" if lane[0] == "coming" else lane[0]
