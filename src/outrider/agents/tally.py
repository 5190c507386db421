"""Running totals of one policy: what was asked, decided and reserved. Pure; read by /v1/outrider/stats and /metrics."""

from collections.abc import Sequence
from typing import Any

from outrider.agents.engines import Engine, Running
from outrider.agents.events import Command, Dispatch, Hold, Usage
from outrider.agents.rates import Rates


class Tally:
    """Sums since start. Token sums run over the calls that were answered with 200 and whose length is known."""

    def __init__(self) -> None:
        self.calls = 0
        self.failed_attempts = 0
        self.decisions = 0
        self.commands: dict[str, int] = {}
        self.queued_s = 0.0
        self.longest_queued_s = 0.0
        self.held = 0
        self.answered = 0
        self.reserved_tokens = 0
        self.used_tokens = 0
        self.max_tokens_reserved = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.covered = 0
        self.absolute_error_tokens = 0
        self.estimated = 0

    def count(self, commands: Sequence[Command]) -> None:
        for command in commands:
            name = type(command).__name__
            self.commands[name] = self.commands.get(name, 0) + 1
            if isinstance(command, Dispatch):
                self.decisions += 1
                self.queued_s += command.queued_s
                self.longest_queued_s = max(self.longest_queued_s, command.queued_s)
            elif isinstance(command, Hold):
                self.held += 1

    def learn(self, running: Running, usage: Usage, prior_max_tokens: int) -> None:
        """Prediction against truth. Where the engine named no prompt length, our estimate stands for both."""
        waiting = running.waiting
        prompt_tokens = usage.prompt_tokens or waiting.prompt_tokens
        limit = waiting.call.max_tokens if waiting.call.max_tokens is not None else prior_max_tokens
        self.answered += 1
        self.reserved_tokens += running.dispatch.reserved_tokens
        self.used_tokens += prompt_tokens + usage.output_tokens
        self.max_tokens_reserved += waiting.prompt_tokens + max(limit, usage.output_tokens)
        self.prompt_tokens += prompt_tokens
        self.output_tokens += usage.output_tokens
        self.cached_tokens += usage.cached_tokens
        self.covered += usage.output_tokens <= running.dispatch.bound_tokens
        self.absolute_error_tokens += abs(usage.output_tokens - running.dispatch.predicted_tokens)
        self.estimated += usage.estimated

    def report(self, engines: Sequence[Engine], waiting: int, workflows: int, rates: Rates) -> dict[str, Any]:
        """All totals, and the present state of every engine."""
        dispatched = max(1, self.commands.get("Dispatch", 0))
        return {
            "calls": self.calls,
            "answered": self.answered,
            "waiting": waiting,
            "held": self.held,
            "workflows": workflows,
            "reserved_tokens": self.reserved_tokens,
            "used_tokens": self.used_tokens,
            "max_tokens_reserved": self.max_tokens_reserved,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "bound_coverage": self.covered / self.answered if self.answered else None,
            "output_mae_tokens": self.absolute_error_tokens / self.answered if self.answered else None,
            "estimated_usages": self.estimated,
            "queued_mean_s": self.queued_s / dispatched,
            "queued_max_s": self.longest_queued_s,
            "failed_attempts": self.failed_attempts,
            "decisions": self.decisions,
            "commands": dict(sorted(self.commands.items())),
            "rates": {
                "tokens_per_char": rates.tokens_per_char,
                "prefill_s_per_token": rates.prefill_s,
                "decode_s_per_token": rates.decode_s,
                "load_s_per_token": rates.load_s,
            },
            "engines": {engine.name: _engine(engine) for engine in engines},
        }


def _engine(engine: Engine) -> dict[str, Any]:
    return {
        "alive": engine.alive,
        "running": len(engine.running),
        "credit": engine.credit,
        "starts": engine.starts,
        "answered": engine.answered,
        "failed": engine.failed,
        "kv_tokens": engine.kv_tokens,
        "reserved_tokens": engine.reserved_tokens,
        "used_tokens": round(engine.kv_usage * engine.kv_tokens),
        "resident_prefix_tokens": round(engine.prefixes.held_tokens),
    }
