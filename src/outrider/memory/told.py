"""What being told about the future does to blocks: wanted, not wanted any more, over. Pure; owned by `policy.py`.

Wants are kept in `paths.py`; here they meet the blocks' states. `missing` are the wanted blocks that lie below host
only: what is to be lifted, as soon as there is time and room.
"""

import math
from collections.abc import Iterable

from outrider.memory import foresee, plan
from outrider.memory.paths import Paths
from outrider.memory.residency import At, Residency
from outrider.memory.settings import Settings
from outrider.wants import Want


class Told:
    """Wants applied to residency."""

    def __init__(self, settings: Settings, residency: Residency, paths: Paths) -> None:
        self._settings, self._residency, self._paths = settings, residency, paths
        self.missing: dict[str, None] = {}

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
            if block.state["host"] is At.ABSENT:
                self.missing[item] = None
            elif block.state["host"] is At.UNWANTED:
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

    def cancel(self, item: str, now: float) -> None:
        """A copy on its way to host that no lease and no want waits for is unwanted; it cannot be un-sent (law 4)."""
        block = self._residency.blocks.get(item)
        if block and block.state["host"] is At.COMING and not block.joins and item not in self._paths.told:
            self._residency.turn(block, "host", "cancel", now)

    def give_up(self, overdue_s: float, now: float) -> int:
        """Drop the wants whose deadline passed so long ago; how many."""
        late = [want.item for want in self._paths.wants.values() if want.by_s + overdue_s <= now]
        for item in late:
            self.drop(item, now)
        return len(late)

    def queue(self) -> list[tuple[Want, str]]:
        """What is to be lifted, in the order of `plan.lifts`."""
        self.missing = {item: None for item in self.missing if item in self._paths.told}
        return plan.lifts([(want, at, item) for item in self.missing for want, at in self._paths.wants_of(item)])

    def due_s(self, want: Want, source: str, size_bytes: int) -> float:
        """From when on a wanted block of this size, which lies at `source`, should be on its way to host.

        From disk at once; what the hybrid tier holds can wait in the device's cache until its time is near.
        """
        if source == "disk":
            return -math.inf
        return foresee.latest_start_s(want.by_s, self._copy_s(source, size_bytes)) - foresee.SLACK_S

    def moments(self) -> list[float]:
        """When wants must be looked at by themselves: latest starts and deadlines of lifts, ends of patience."""
        moments = [want.by_s + self._settings.patience_s for want in self._paths.wants.values()]
        alike: dict[tuple[str, int, str], Want] = {}  # most blocks of a path lie at one place, with one size
        for item in self.missing:
            block = self._residency.blocks[item]
            source = self._residency.source(block) or "disk"
            for name in self._paths.told.get(item, ()):
                alike[source, block.size_bytes, name] = self._paths.wants[name]
        for (source, size_bytes, _), want in alike.items():
            start_s = foresee.latest_start_s(want.by_s, self._copy_s(source, size_bytes))
            moments += [self.due_s(want, source, size_bytes), start_s, want.by_s]
        return moments

    def _copy_s(self, source: str, size_bytes: int) -> float:
        """Seconds for all that is missing, were it all of this kind."""
        return len(self.missing) * size_bytes / self._settings.read_rate(source)
