"""What the connector counts, as vLLM wants to be told: a line in its log, counters in its /metrics. Needs vllm.

loaded_blocks, failed_blocks   blocks that memory gave, and that were asked for in vain and computed
saved_blocks                   blocks that memory took
late_loads, late_saves         loads and saves that were given up at their deadline
unanswered_calls               calls that memory did not answer, or refused
"""

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

NAMES = {
    "loaded_blocks": "KV blocks loaded from Outrider's memory.",
    "failed_blocks": "KV blocks that could not be loaded from Outrider's memory, and were computed.",
    "saved_blocks": "KV blocks saved to Outrider's memory.",
    "late_loads": "Loads from Outrider's memory that were given up at their deadline.",
    "late_saves": "Saves to Outrider's memory that were given up at their deadline.",
    "unanswered_calls": "Calls that Outrider's memory did not answer, or refused.",
}


class OutriderStats(KVConnectorStats):  # type: ignore[misc]  # vllm is not installed where mypy runs
    """`data` counts since the last report; vLLM sums it over ranks and time."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> "OutriderStats":
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class OutriderMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """vllm:outrider_loaded_blocks_total and the others, one series an engine."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._series = {
            name: metric_types[Counter](f"vllm:outrider_{name}", what, labelnames=labelnames)
            for name, what in NAMES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in self._series:
                self._series[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(count)
