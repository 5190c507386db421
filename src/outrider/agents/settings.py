"""Settings of the gateway and its policy, each with unit and default, checked where they are made. Pure.

`GatewaySettings` is what `[agents]` in outrider.toml decodes to, what the command line builds and what the first
line of a journal holds. A value that cannot work is a CallerError in one sentence.
"""

from typing import Literal
from urllib.parse import urlsplit

import msgspec

from outrider.errors import CallerError


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds at the door and towards the engines."""

    body_bytes: int = 32 * 1024 * 1024  # a larger request: 413
    answer_bytes: int = 8 * 1024 * 1024  # a whole answer is held back up to here, so that it can be retried
    connect_s: float = 2.0  # TCP connection to an engine
    first_byte_s: float = 600.0  # dispatch to first byte, else 504
    total_s: float = 1800.0  # arrival to last byte, queue included, else 504
    no_engine_s: float = 10.0  # wait for any engine to answer again, then 503
    probe_every_s: float = 1.0  # /health and /metrics of every engine
    attempts: int = 3  # dispatches of one call that broke or came back 5xx before its first byte

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise CallerError(f"agents.limits.{name}: {getattr(self, name)} given, must be above 0.")


class Foresight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Priors until history has spoken, and the bounds of that history. Rates are corrected online."""

    prior_output_tokens: int = 256
    prior_max_tokens: int = 4096  # assumed where a request sets no max_tokens
    prior_calls: float = 4.0  # calls that an unknown workflow is expected to have left, this one included
    prior_gap_s: float = 5.0  # from an answer to the workflow's next call
    prior_return: float = 0.5  # probability that a context comes back
    quantile: float = 0.95  # share of outputs that the reservation should cover
    tokens_per_char: float = 0.25
    prefill_s_per_token: float = 0.001
    decode_s_per_token: float = 0.03
    load_s_per_token: float = 0.00005  # from memory into an engine
    memory_tokens: int = 1_000_000  # prefix tokens that memory is believed to hold, over all tiers
    kv_tokens: int = 0  # KV capacity of an engine that does not report it; 0: unknown, no reservation is enforced
    roles: int = 1024  # (role, stage) histories kept, least recently used out
    workflows: int = 4096  # workflows remembered at once, least recently used out

    def __post_init__(self) -> None:
        for name in ("quantile", "prior_return"):
            if not 0 < getattr(self, name) < 1:
                raise CallerError(f"agents.foresight.{name}: {getattr(self, name)} given, must lie between 0 and 1.")
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0 and name != "kv_tokens":
                raise CallerError(f"agents.foresight.{name}: {getattr(self, name)} given, must be above 0.")


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gateway: engines behind it, its door, its order and its routing."""

    engines: tuple[str, ...] = ()  # base URLs, http://host:port; their order breaks ties
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    policy: Literal["fcfs", "srtf"] = "srtf"
    routing: Literal["sticky", "residency"] = "residency"
    credit: int = 8  # calls in flight per engine; the rest waits here, where it can be reordered
    queue_limit: int = 1024  # waiting calls; beyond: 429
    oldest_share_every: int = 10  # every Nth start of an engine goes to its oldest waiting call (law 9)
    memory_attached: bool = False  # a memory server hears our wants, and gives remembered prefixes back to engines
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = Limits()
    foresight: Foresight = Foresight()

    def __post_init__(self) -> None:
        if not self.engines:
            raise CallerError("agents.engines: none given. Name at least one, as in --engine http://127.0.0.1:8001.")
        for url in self.engines:
            check_url(url)
        if len({url.rstrip("/") for url in self.engines}) < len(self.engines):
            raise CallerError(f"agents.engines: one of {', '.join(self.engines)} is there twice. Name each once.")
        if not 0 <= self.port < 65536:
            raise CallerError(f"agents.port: {self.port} given, ports run from 0 (any free one) to 65535.")
        for name in ("credit", "queue_limit", "oldest_share_every"):
            if getattr(self, name) < 1:
                raise CallerError(f"agents.{name}: {getattr(self, name)} given, must be at least 1.")


def check_url(url: str) -> None:
    """CallerError unless `url` is http(s)://host[:port][/path], without credentials (they would enter the journal)."""
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        ok = False
        parts = urlsplit("")
    if not ok or parts.query or parts.fragment or any(c.isspace() for c in url):
        raise CallerError(f"agents.engines: {url!r} is no engine URL. Write it as http://host:port.")
    if parts.username or parts.password:
        raise CallerError(
            f"agents.engines: the URL of {parts.hostname} holds credentials. Clients send them as headers."
        )
