"""The gateway's own /metrics for Prometheus, fed by what the policy saw and said. Called by the gateway."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from outrider.agents.events import Abort, Break, Command, Dispatch, Reject, Relay, Settle

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAUGES = ("alive", "running", "credit", "kv_tokens", "reserved_tokens", "used_tokens", "resident_prefix_tokens")


class Exposition:
    """One registry of its own; `stats` is read at every scrape."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats
        self._registry = CollectorRegistry()
        self._ended = Counter(
            "outrider_calls", "Calls that ended, by how.", ["ending", "status"], registry=self._registry
        )
        self._dispatched = Counter(
            "outrider_dispatches", "Calls sent to an engine.", ["engine"], registry=self._registry
        )
        self._tokens = Counter("outrider_tokens", "Tokens of answered calls.", ["kind"], registry=self._registry)
        self._queued = Histogram(
            "outrider_queued_seconds", "Arrival to dispatch.", buckets=SECONDS, registry=self._registry
        )
        self._ttft = Histogram(
            "outrider_time_to_first_byte_seconds", "Arrival to first byte.", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(self)

    def note(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                self._dispatched.labels(command.engine).inc()
                self._queued.observe(command.queued_s)
            elif isinstance(command, Settle):
                self._ended.labels("settle", str(command.status)).inc()
                self._ttft.observe(command.ttft_s)
                if command.usage is not None:
                    self._tokens.labels("prompt").inc(command.usage.prompt_tokens)
                    self._tokens.labels("output").inc(command.usage.output_tokens)
                    self._tokens.labels("cached").inc(command.usage.cached_tokens)
            elif isinstance(command, Reject):
                self._ended.labels("reject", str(command.status)).inc()
            elif isinstance(command, Relay | Break | Abort):
                self._ended.labels(type(command).__name__.lower(), "").inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        stats = self._stats()
        for name, what in (
            ("waiting", "Calls in the line."),
            ("workflows", "Workflows under way."),
            ("reserved_tokens", "KV tokens reserved over all answered calls: prompt and predicted bound."),
            ("used_tokens", "KV tokens that these calls came to use."),
            ("max_tokens_reserved", "KV tokens that prompt and max_tokens would have reserved for them."),
        ):
            yield GaugeMetricFamily(f"outrider_{name}", what, value=stats[name])
        for name in GAUGES:
            family = GaugeMetricFamily(f"outrider_engine_{name}", f"{name} of one engine.", labels=["engine"])
            for engine, numbers in stats["engines"].items():
                family.add_metric([engine], float(numbers[name]))
            yield family
