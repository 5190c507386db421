"""Who waits for what: open leases, blocks being written, debts of durability. Pure; owned by `policy.py`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from outrider.memory.events import Acknowledge, Grant, Span
from outrider.memory.residency import Residency


@dataclass(slots=True)
class Lease:
    """One client's hold on a chain of blocks, from its request until its release.

    waiting  blocks on their way to host, or still without room there
    unsent   those without: no copy of them was asked for yet, or it failed and there is another
    pinned   blocks in host that this lease holds
    lay      where each block lay when it was asked for: host, hybrid, disk
    """

    client: int
    request: int
    items: tuple[str, ...]
    by_s: float
    pinned: dict[str, None] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)
    unsent: dict[str, None] = field(default_factory=dict)
    lay: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> tuple[int, int]:
        return self.client, self.request

    def grant(self, residency: Residency) -> Grant:
        """The answer: every pinned block's span in the host arena, None for the others."""
        spans: list[Span | None] = []
        lay: dict[str, int] = {}
        for item in self.items:
            block = residency.blocks[item] if item in self.pinned else None
            spans.append(Span(block.at["host"], block.size_bytes) if block else None)
            if block:
                lay[self.lay[item]] = lay.get(self.lay[item], 0) + 1
        return Grant(self.client, self.request, tuple(spans), lay)


@dataclass(slots=True)
class Debt:
    """A client waits until these blocks are on disk, all at once: one that leaves it in the meantime has failed."""

    client: int
    request: int
    open: dict[str, None] = field(default_factory=dict)
    done: dict[str, None] = field(default_factory=dict)
    failed: dict[str, None] = field(default_factory=dict)


class Demands:
    """All leases by (client, request); the rest by client."""

    def __init__(self) -> None:
        self.leases: dict[tuple[int, int], Lease] = {}
        self._hungry: dict[tuple[int, int], Lease] = {}
        self._drafts: dict[int, dict[str, None]] = {}
        self._debts: list[Debt] = []

    def hungry(self) -> list[Lease]:
        """Leases not yet granted, oldest first."""
        return list(self._hungry.values())

    def asked(self, lease: Lease) -> None:
        self.leases[lease.name] = self._hungry[lease.name] = lease

    def answered(self, lease: Lease) -> None:
        del self._hungry[lease.name]

    def released(self, name: tuple[int, int]) -> Lease | None:
        self._hungry.pop(name, None)
        return self.leases.pop(name, None)

    def due(self, now: float) -> list[Lease]:
        return [lease for lease in self.hungry() if lease.by_s <= now]

    def stuck(self) -> bool:
        """True where no client can give room back of its own accord: none holds a grant, none writes."""
        return not self._drafts and len(self._hungry) == len(self.leases)

    def drafted(self, client: int, item: str) -> None:
        self._drafts.setdefault(client, {})[item] = None

    def writes(self, client: int, item: str) -> bool:
        return item in self._drafts.get(client, ())

    def written(self, client: int, item: str) -> None:
        del self._drafts[client][item]
        if not self._drafts[client]:
            del self._drafts[client]

    def leave(self, client: int) -> tuple[list[Lease], list[str]]:
        """A client is gone: its leases and the blocks it was writing, for the policy to end; nobody to pay debts to."""
        self._debts = [debt for debt in self._debts if debt.client != client]
        leases = [lease for lease in self.leases.values() if lease.client == client]
        return leases, list(self._drafts.pop(client, ()))

    def owe(self, debt: Debt) -> None:
        self._debts.append(debt)

    def saved(self, item: str) -> None:
        for debt in self._debts:
            if item in debt.open:
                del debt.open[item]
                debt.done[item] = None

    def lost(self, item: str) -> None:
        """This block is not on disk, and will not be: whoever waits for it hears so."""
        for debt in self._debts:
            if item in debt.open or item in debt.done:
                debt.open.pop(item, None)
                debt.done.pop(item, None)
                debt.failed[item] = None

    def settled(self) -> Iterator[Acknowledge]:
        """Answers to all whose blocks are on disk or lost."""
        paid = [debt for debt in self._debts if not debt.open]
        self._debts = [debt for debt in self._debts if debt.open]
        for debt in paid:
            yield Acknowledge(debt.client, debt.request, tuple(debt.failed))
