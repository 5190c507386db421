"""The engine's numbers under vLLM's names, in a registry of their own. Read by GET /metrics."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from outrider.lab.engine.blocks import Blocks
from outrider.lab.engine.request import Request
from outrider.lab.engine.scheduler import Scheduler

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Meters:
    """Counters are stepped by the engine; gauges read its books when asked."""

    def __init__(self, blocks: Blocks, scheduler: Scheduler) -> None:
        self.block_tokens = blocks.block_tokens
        self.registry = r = CollectorRegistry()
        info = Gauge("vllm:cache_config_info", "Sizes of the KV cache", ["block_size", "num_gpu_blocks"], registry=r)
        info.labels(str(blocks.block_tokens), str(blocks.capacity)).set(1)
        self.gauge("num_requests_running", "Requests in the batch", lambda: len(scheduler.running))
        self.gauge(
            "num_requests_waiting",
            "Requests that wait or load",
            lambda: len(scheduler.waiting) + len(scheduler.loading),
        )
        self.gauge(
            "kv_cache_usage_perc", "Held blocks, 1 = all", lambda: 1 - len(blocks.free) / max(1, blocks.capacity)
        )
        self.preemptions = Counter("vllm:num_preemptions", "Requests that gave their blocks back", registry=r)
        self.prompt = Counter("vllm:prompt_tokens", "Prompt tokens of requests that started to answer", registry=r)
        self.generation = Counter("vllm:generation_tokens", "Tokens generated", registry=r)
        self.queries = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the own cache", registry=r)
        self.hits = Counter("vllm:prefix_cache_hits", "Prompt tokens found in the own cache", registry=r)
        self.external_queries = Counter(
            "vllm:external_prefix_cache_queries", "Prompt tokens beyond the own cache, asked of memory", registry=r
        )
        self.external_hits = Counter("vllm:external_prefix_cache_hits", "Prompt tokens loaded from memory", registry=r)
        self.finished_total = Counter("vllm:request_success", "Finished requests", ["finished_reason"], registry=r)
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", buckets=TTFT_BUCKETS_S, registry=r
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"vllm:{name}", text, registry=self.registry).set_function(read)

    def sampled(self, request: Request) -> None:
        """One token more; with the first one the prompt is booked."""
        self.generation.inc()
        if len(request.generated) > 1:
            return
        own, external = request.own_blocks * self.block_tokens, request.external_blocks * self.block_tokens
        self.ttft.observe(time.monotonic() - request.born_s)
        self.prompt.inc(len(request.prompt))
        self.queries.inc(len(request.prompt))
        self.hits.inc(own)
        self.external_queries.inc(len(request.prompt) - own)
        self.external_hits.inc(external)

    def finished(self, request: Request) -> None:
        self.finished_total.labels(request.finish).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
