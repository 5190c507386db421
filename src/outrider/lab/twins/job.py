"""One request at a modelled engine: what it needs and how far it is; an engine's order, and its hook to memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from outrider.lab.twins.pool import Ids


@dataclass(eq=False, slots=True)
class Job:
    """One request at an engine. `chain`: ids of the whole blocks of prompt and output, as far as they have any."""

    id: str
    prompt_tokens: int
    output_tokens: int
    chain: Ids
    on_first: Callable[[], object]  # the first token is out
    on_finished: Callable[[], object]
    on_failed: Callable[[str, str], object]  # kind as in `agents.events.Failed`, and why
    priority: int = 0

    arrival: int = 0
    computed: int = 0  # tokens whose keys and values are in the pool
    generated: int = 0
    named: int = 0  # leading blocks of `chain` that it holds
    private: int = 0  # further blocks that it holds
    external: int | None = 0  # leading blocks that memory can give; None: being looked up
    own_blocks: int = 0  # found in the engine's cache at the first admission
    external_blocks: int = 0  # loaded from memory then
    tiers: dict[str, int] = field(default_factory=dict)  # of those, by the place where each lay
    admitted: bool = False
    closed: bool = False
    passed: int = 0  # tokens computed for it, those twice after a preemption included
    lost: int = 0  # of them, thrown away by preemptions

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.prompt_tokens + self.generated - self.computed


class Hook(Protocol):
    """The engine's side of memory; none of these calls waits. See `lab/engine/hook.py`."""

    def look_up(self, job: Job) -> None: ...

    def load(self, job: Job) -> None: ...

    def save(self, job: Job, start: int, stop: int) -> None: ...

    def remember(self, job: Job) -> None: ...


Order = Callable[[Job], tuple[float, ...]]


def by_arrival(job: Job) -> tuple[float, ...]:
    """vLLM's sign of priority, ties by arrival."""
    return (job.priority, job.arrival)
