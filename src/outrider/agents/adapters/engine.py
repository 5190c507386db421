"""What an engine says of itself under vLLM's names: /metrics and /v1/models -> numbers. Called by probe.py."""

import re

import msgspec

LINE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})?\s+([0-9eE+.\-]+)\s*$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Reading(msgspec.Struct, frozen=True):
    """One look at an engine. `kv_tokens` None: it does not say."""

    kv_tokens: int | None = None
    kv_usage: float = 0.0  # 0..1
    running: int = 0
    waiting: int = 0


def read_metrics(text: str) -> Reading:
    """Unknown lines are skipped, missing numbers are zero; several ranks are summed, their KV usage averaged."""
    kv_tokens: int | None = None
    totals = {"num_requests_running": 0.0, "num_requests_waiting": 0.0}
    usages: list[float] = []
    for name, labels, number in LINE.findall(text):
        try:
            value = float(number)
        except ValueError:
            continue
        if name == "cache_config_info":
            found = dict(LABEL.findall(labels))
            if found.get("block_size", "").isdigit() and found.get("num_gpu_blocks", "").isdigit():
                kv_tokens = (kv_tokens or 0) + int(found["block_size"]) * int(found["num_gpu_blocks"])
        elif name in totals:
            totals[name] += value
        elif name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            usages.append(min(1.0, max(0.0, value)))
    return Reading(
        kv_tokens=kv_tokens,
        kv_usage=sum(usages) / len(usages) if usages else 0.0,
        running=int(totals["num_requests_running"]),
        waiting=int(totals["num_requests_waiting"]),
    )


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model] = []


def read_models(body: bytes) -> tuple[str, ...]:
    """Ids in the order given; () when the answer is none of ours."""
    try:
        return tuple(model.id for model in msgspec.json.decode(body, type=Models).data[:256])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
