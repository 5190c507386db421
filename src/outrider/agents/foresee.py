"""What a call will cost and what comes after it: output length, remaining work, return of its context. Pure.

Three histories, each bounded, each asked by the policy before it plans and told by it when the truth is known:
    Lengths    output tokens, and the bound that `quantile` of the calls stay under
    Remaining  seconds of engine time that a workflow still needs
    Returns    whether and after how many seconds a finished call's context is used again
Source: the fallback order and the adaptive correction follow what measured best on agent traces: history of the same
stage in the same workflow first, roles as the cold start; raw quantiles under-cover by up to 11 points.
"""

from collections.abc import Sequence
from math import exp, log

import msgspec

from outrider.agents.events import Call
from outrider.agents.lru import Lru
from outrider.agents.settings import Foresight

SAMPLES = 64  # kept per history
ENOUGH = 5  # samples before a quantile is believed
STEP = 0.05  # of the adaptive correction, in log tokens
OWN_AT = 50  # observations at which a role's own correction weighs as much as the pooled one


class Samples:
    """The last `SAMPLES` numbers seen, oldest out."""

    def __init__(self) -> None:
        self._seen: list[float] = []

    def add(self, value: float) -> None:
        self._seen.append(value)
        if len(self._seen) > SAMPLES:
            del self._seen[0]

    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """Linear between neighbours; ValueError when nothing was seen."""
        ordered = sorted(self._seen)
        if not ordered:
            raise ValueError("no samples")
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def total(self) -> float:
        return sum(self._seen)

    def __len__(self) -> int:
        return len(self._seen)


class Forecast(msgspec.Struct, frozen=True):
    """Predicted output of one call, in tokens. `origin` names the history that spoke."""

    tokens: int
    bound_tokens: int
    origin: str


Key = tuple[str, str]  # (role, stage name)


class Histories:
    """Samples by (role, stage), by role and over all: the most specific that has spoken answers."""

    def __init__(self, bound: int) -> None:
        self._by_stage: Lru[Key, Samples] = Lru(bound)
        self._by_role: Lru[str, Samples] = Lru(bound)
        self._all = Samples()

    def add(self, key: Key, value: float) -> None:
        self._by_stage.ensure(key, Samples).add(value)
        self._by_role.ensure(key[0], Samples).add(value)
        self._all.add(value)

    def levels(self, key: Key) -> list[tuple[str, Samples]]:
        """Non-empty histories with their names, most specific first."""
        stage, role = self._by_stage.get(key), self._by_role.get(key[0])
        named = (("role and stage", stage), ("role", role), ("all calls", self._all))
        return [(name, samples) for name, samples in named if samples]

    def median(self, key: Key) -> float | None:
        levels = self.levels(key)
        return levels[0][1].median() if levels else None

    def __len__(self) -> int:
        return len(self._by_stage)


class Correction:
    """One adaptive offset in log tokens (ACI): rises when a bound was too low, sinks slowly while bounds hold."""

    def __init__(self) -> None:
        self.offset = 0.0
        self.seen = 0

    def learn(self, missed: bool, quantile: float) -> None:
        self.offset += STEP * quantile if missed else -STEP * (1.0 - quantile)
        self.offset = min(max(self.offset, -1.0), 3.0)
        self.seen += 1


class Lengths:
    """Output length by (workflow, role, stage), falling back to ever wider histories and at last to a prior."""

    def __init__(self, settings: Foresight) -> None:
        self.settings = settings
        self.histories = Histories(settings.roles)
        self._pooled = Correction()
        self._by_role: Lru[str, Correction] = Lru(settings.roles)

    def predict(self, call: Call, own: Samples | None) -> Forecast:
        """`own`: outputs of the same role and stage in this workflow so far. Never above the call's max_tokens."""
        key = (call.identity.role, call.identity.stage_name)
        levels = ([("this workflow", own)] if own else []) + self.histories.levels(key)
        limit = call.max_tokens if call.max_tokens is not None else self.settings.prior_max_tokens
        if not levels:
            tokens, origin = float(min(self.settings.prior_output_tokens, limit)), "prior"
        else:
            tokens, origin = levels[0][1].median(), levels[0][0]
        believed = [samples for name, samples in levels if name != "this workflow" and len(samples) >= ENOUGH]
        prior_bound = float(min(limit, 4 * self.settings.prior_output_tokens))
        raw_bound = believed[0].quantile(self.settings.quantile) if believed else prior_bound
        bound = max(tokens, exp(log(raw_bound + 1.0) + self._offset(call.identity.role)) - 1.0)
        return Forecast(max(1, min(round(tokens), limit)), max(1, min(round(bound), limit)), origin)

    def learn(self, call: Call, forecast: Forecast, output_tokens: int) -> None:
        """The truth about one call. Truth that cannot be true is ignored."""
        if not 0 <= output_tokens <= 10_000_000:
            return
        role = call.identity.role
        missed = output_tokens > forecast.bound_tokens
        self._pooled.learn(missed, self.settings.quantile)
        self._by_role.ensure(role, Correction).learn(missed, self.settings.quantile)
        self.histories.add((role, call.identity.stage_name), float(output_tokens))

    def _offset(self, role: str) -> float:
        """A role's own correction, shrunk to the pooled one while it is young."""
        own = self._by_role.get(role)
        if own is None:
            return self._pooled.offset
        weight = own.seen / (own.seen + OWN_AT)
        return weight * own.offset + (1.0 - weight) * self._pooled.offset


class Remaining:
    """Engine seconds that a workflow still needs from a call of (role, stage) on, that call included."""

    def __init__(self, settings: Foresight) -> None:
        self.settings = settings
        self.histories = Histories(settings.roles)

    def predict(self, call: Call, service_s: float) -> float:
        """`service_s`: predicted seconds of this call alone, and the least that can remain."""
        if call.identity.final:
            return service_s
        median = self.histories.median((call.identity.role, call.identity.stage_name))
        return max(service_s, service_s * self.settings.prior_calls if median is None else median)

    def learn(self, served: Sequence[tuple[Key, float]]) -> None:
        """A workflow ended: (role and stage, engine seconds) of its calls in the order in which they finished."""
        remaining_s = 0.0
        for key, service_s in reversed(served):
            remaining_s += service_s
            self.histories.add(key, remaining_s)


class Returns:
    """Whether a context of (role, stage) comes back, and how long after its answer."""

    def __init__(self, settings: Foresight) -> None:
        self.settings = settings
        self.gaps = Histories(settings.roles)
        self.outcomes = Histories(settings.roles)

    def predict(self, key: Key) -> tuple[float, float]:
        """(gap in seconds, probability of a return). The prior probability weighs as much as two observations."""
        gap_s = self.gaps.median(key)
        levels = self.outcomes.levels(key)
        came, seen = 0.0, 0
        if levels:
            seen = len(levels[0][1])
            came = levels[0][1].total()
        chance = (came + 2.0 * self.settings.prior_return) / (seen + 2.0)
        return (self.settings.prior_gap_s if gap_s is None else gap_s), chance

    def learn(self, key: Key, gap_s: float | None) -> None:
        """`gap_s` None: the workflow ended without it."""
        self.outcomes.add(key, 0.0 if gap_s is None else 1.0)
        if gap_s is not None:
            self.gaps.add(key, gap_s)
