"""The line of waiting calls: bounded by the policy, ordered by urgency and by age at once. Pure."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import msgspec

from outrider.agents.events import Call
from outrider.agents.foresee import Forecast

Urgency = tuple[int, float, int]  # class rank, predicted remaining seconds, arrival number: lower = sooner


class Waiting(msgspec.Struct):
    """One waiting call. `number` counts arrivals and survives a second try, so that a retried call keeps its age."""

    call: Call
    number: int
    arrived_s: float
    urgency: Urgency
    forecast: Forecast
    remaining_s: float
    prompt_tokens: int
    workflow: str
    tried: tuple[str, ...] = ()  # engines that failed it
    attempts: int = 0  # all dispatches
    broken: int = 0  # those that broke or came back 5xx
    home: str = ""  # sticky engine, as of home_epoch
    home_epoch: int = -1

    @property
    def reserve_tokens(self) -> int:
        return self.prompt_tokens + self.forecast.bound_tokens


class Line:
    """Waiting calls by id; iterable by urgency and by age. All orders are total, so no ties."""

    def __init__(self) -> None:
        self._calls: dict[str, Waiting] = {}
        self._by_urgency: list[tuple[Urgency, str]] = []
        self._by_age: list[tuple[int, str]] = []

    def add(self, waiting: Waiting) -> None:
        self._calls[waiting.call.id] = waiting
        insort(self._by_urgency, (waiting.urgency, waiting.call.id))
        insort(self._by_age, (waiting.number, waiting.call.id))

    def remove(self, call_id: str) -> Waiting:
        """KeyError when it does not wait."""
        waiting = self._calls.pop(call_id)
        del self._by_urgency[bisect_left(self._by_urgency, (waiting.urgency, call_id))]
        del self._by_age[bisect_left(self._by_age, (waiting.number, call_id))]
        return waiting

    def by_urgency(self) -> Iterator[Waiting]:
        return (self._calls[call_id] for _, call_id in self._by_urgency)

    def by_age(self) -> Iterator[Waiting]:
        return (self._calls[call_id] for _, call_id in self._by_age)

    def oldest(self) -> Waiting | None:
        return self._calls[self._by_age[0][1]] if self._by_age else None

    def ahead_of(self, call_id: str) -> list[str]:
        """Ids before it in order, the nearest to their start first."""
        waiting = self._calls[call_id]
        return [other for _, other in self._by_urgency[: bisect_left(self._by_urgency, (waiting.urgency, call_id))]]

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, call_id: object) -> bool:
        return call_id in self._calls
