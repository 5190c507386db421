"""The books of a modelled engine's KV cache. Pure; the same rules as `lab/engine/blocks.py`, a chain at a time.

    capacity = private + held + cached + free       after every call (law 2)

private  blocks in use whose content has no id yet, or never gets one
held     blocks in use, by id: `refs[id]` requests stand on each
cached   nobody uses them, their content is kept: taken again least recently released first, a chain back to front
free     never used, or forgotten; taken first

A chain is an array of block ids, root first. Ids are small numbers, so that a chain of a thousand blocks is a few array
operations, not a thousand look-ups.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from outrider.errors import LawBroken

Ids = NDArray[np.int64]


class Pool:
    """`capacity` blocks; ids run from 0 to below `ids`."""

    def __init__(self, capacity: int, ids: int) -> None:
        self.capacity = capacity
        self.private = self.held = self.cached = 0
        self._here = np.zeros(ids, bool)
        self._refs = np.zeros(ids, np.int32)
        self._released = np.zeros(ids, np.int64)  # number of the release that made it cached
        self._releases = 0
        self._oldest: deque[tuple[int, Ids]] = deque()  # releases, in the order in which blocks are taken again

    @property
    def free(self) -> int:
        return self.capacity - self.private - self.held - self.cached

    @property
    def available(self) -> int:
        """What `take` can give: free blocks, then cached ones."""
        return self.capacity - self.private - self.held

    def match(self, chain: Ids) -> int:
        """How many leading blocks of the chain are here. Holds nothing."""
        here = self._here[chain]
        first = int(here.argmin()) if len(here) else 0
        return len(here) if len(here) and here[first] else first

    def hold(self, chain: Ids) -> None:
        """One more user for each; all must be here."""
        cached = int(np.count_nonzero(self._refs[chain] == 0))
        self._refs[chain] += 1
        self.cached -= cached
        self.held += cached

    def take(self, count: int) -> None:
        """`count` more private blocks; the caller checks `available` first."""
        self._evict(count - self.free)
        self.private += count

    def give(self, count: int) -> None:
        """Private blocks that are not used any more; what was in them is lost."""
        self.private -= count

    def release(self, chain: Ids) -> None:
        """One user less for each; those without any stay cached."""
        self._refs[chain] -= 1
        cached = chain[self._refs[chain] == 0][::-1]
        if not len(cached):
            return
        self._releases += 1
        self._released[cached] = self._releases
        self._oldest.append((self._releases, cached))
        self.held -= len(cached)
        self.cached += len(cached)

    def name(self, chain: Ids) -> None:
        """As many private blocks now hold this content; where it is here already, that is held and ours is free."""
        here = self._here[chain]
        self.hold(chain[here])
        fresh = chain[~here]
        self._here[fresh] = True
        self._refs[fresh] = 1
        self.held += len(fresh)
        self.private -= len(chain)

    def _evict(self, count: int) -> None:
        """Forget so many cached blocks, least recently released first."""
        while count > 0:
            if not self._oldest:
                raise LawBroken(2, f"{count} KV blocks more were taken than {self.capacity} hold")
            release, blocks = self._oldest.popleft()
            still = blocks[self._here[blocks] & (self._refs[blocks] == 0) & (self._released[blocks] == release)]
            self._here[still[:count]] = False
            self.cached -= min(count, len(still))
            if len(still) > count:
                self._oldest.appendleft((release, still[count:]))
            count -= len(still)

    def check(self) -> None:
        """Law 2, counted afresh; costs a pass over all ids."""
        held = int(np.count_nonzero(self._refs > 0))
        cached = int(np.count_nonzero(self._here & (self._refs == 0)))
        if (held, cached) != (self.held, self.cached) or self._refs.min(initial=0) < 0:
            raise LawBroken(
                2, f"KV pool: books say {self.held} held and {self.cached} cached, there are {held}, {cached}"
            )
        if min(self.private, self.free) < 0:
            raise LawBroken(2, f"KV pool of {self.capacity}: {self.private} private, {held} held, {cached} cached")
