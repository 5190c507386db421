"""One engine as the policy sees it: alive or not, what runs there, what is reserved, what is believed resident. Pure.

0 <= calls in flight <= credit          after every event
reserved tokens <= kv_tokens            unless one call alone is larger: it may run, alone
"""

import msgspec

from outrider.agents.events import Dispatch
from outrider.agents.line import Waiting
from outrider.agents.prefixes import Prefixes

UNKNOWN_KV_TOKENS = 100_000  # prefix index of an engine that does not say what it holds
MISSES = 3  # slow or 5xx probes in a row before an engine counts as down


class Running(msgspec.Struct):
    """One call in flight at one engine."""

    waiting: Waiting
    dispatch: Dispatch
    started_s: float
    prefill_s: float  # predicted, loads included
    decode_s: float  # predicted
    shared: int  # calls beside it when it started
    first_byte_s: float | None = None  # when it came

    def left_s(self, now: float) -> tuple[float, float]:
        """Predicted seconds of prefill and of decode still to come; a late call is never believed to be free."""
        if self.first_byte_s is None:
            return max(self.prefill_s - (now - self.started_s), 0.1 * self.prefill_s), self.decode_s
        return 0.0, max(self.decode_s - (now - self.first_byte_s), 0.1 * self.decode_s)


class Engine:
    """State of one engine; only the policy changes it."""

    def __init__(self, name: str, credit: int, kv_tokens: int) -> None:
        self.name = name
        self.credit = credit
        self.kv_tokens = kv_tokens  # 0: unknown
        self.alive = False
        self.misses = 0
        self.models: tuple[str, ...] = ()
        self.kv_usage = 0.0
        self.running: dict[str, Running] = {}
        self.reserved_tokens = 0
        self.starts = 0
        self.answered = 0
        self.failed = 0
        self.prefixes = Prefixes(kv_tokens or UNKNOWN_KV_TOKENS)
        self._outstanding: tuple[float, float] | None = None  # (now, seconds)

    @property
    def free(self) -> int:
        return self.credit - len(self.running)

    def serves(self, model: str) -> bool:
        """An engine that names no models may serve any."""
        return not self.models or not model or model in self.models

    def has_room(self, tokens: int) -> bool:
        if self.free <= 0:
            return False
        return not self.running or not self.kv_tokens or self.reserved_tokens + tokens <= self.kv_tokens

    def outstanding_s(self, now: float) -> float:
        """Seconds of work before a newcomer's first byte: all prefill ahead of it, and its share of the decoding.

        Asked for every waiting call at every event, so the answer is kept for the moment, until something changes.
        """
        if self._outstanding is not None and self._outstanding[0] == now:
            return self._outstanding[1]
        prefill_s = decode_s = 0.0
        for running in self.running.values():
            left = running.left_s(now)
            prefill_s += left[0]
            decode_s += left[1]
        self._outstanding = (now, prefill_s + decode_s / self.credit)
        return self._outstanding[1]

    def take(self, running: Running) -> None:
        self._outstanding = None
        self.running[running.dispatch.call] = running
        self.reserved_tokens += running.dispatch.reserved_tokens
        self.starts += 1

    def began(self, call_id: str, now: float) -> None:
        """Its first byte came."""
        self._outstanding = None
        self.running[call_id].first_byte_s = now

    def release(self, call_id: str) -> Running:
        self._outstanding = None
        running = self.running.pop(call_id)
        self.reserved_tokens -= running.dispatch.reserved_tokens
        return running

    def up(self, models: tuple[str, ...], kv_tokens: int | None, kv_usage: float) -> bool:
        """It answered a probe. True if it was down."""
        back = not self.alive
        self.alive, self.misses, self.models, self.kv_usage = True, 0, models, kv_usage
        if kv_tokens and kv_tokens != self.kv_tokens:
            self.kv_tokens = kv_tokens
            self.prefixes.resize(kv_tokens)
        return back

    def down(self, refused: bool) -> bool:
        """It did not answer. True if it is down from now on; what it held is then forgotten."""
        self.misses += 1
        if not self.alive or not (refused or self.misses >= MISSES):
            return False
        self.alive = False
        self.prefixes.clear()
        return True
