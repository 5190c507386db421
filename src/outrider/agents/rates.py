"""What tokens cost in seconds, learned from usage and timings. Pure; owned by the policy.

    service = computed prompt tokens x prefill + loaded tokens x load + output tokens x decode

Exponentially weighted means: a call that shared its engine with n others moves them 1/n as much, since its timings hold
the others' work too.
"""

from outrider.agents.events import Call, Usage
from outrider.agents.settings import Foresight

WEIGHT = 0.2  # of a call that had its engine to itself
LEAST_TOKENS = 16  # below, timings say more about the network than about the engine


class Rates:
    """Current beliefs; all in seconds per token, `tokens_per_char` in tokens per character of canonical prompt."""

    def __init__(self, settings: Foresight) -> None:
        self.tokens_per_char = settings.tokens_per_char
        self.prefill_s = settings.prefill_s_per_token
        self.decode_s = settings.decode_s_per_token
        self.load_s = settings.load_s_per_token

    def prompt_tokens(self, chars: int) -> int:
        return max(1, round(chars * self.tokens_per_char))

    def learn(self, call: Call, usage: Usage, ttft_s: float, decode_s: float, shared: int) -> None:
        """One finished call: seconds from dispatch to first byte, from there to the last, calls that ran beside it.

        A call that did not stream shows only their sum: prefill and decode are then scaled together.
        """
        if usage.estimated:
            return
        weight = WEIGHT / (1 + shared)
        if call.chars and usage.prompt_tokens >= LEAST_TOKENS:
            seen = clamp(usage.prompt_tokens / call.chars, 0.001, 4.0)
            self.tokens_per_char += WEIGHT * (seen - self.tokens_per_char)
        computed = max(0, usage.prompt_tokens - usage.cached_tokens)
        if not call.stream:
            loaded_s = usage.external_tokens * self.load_s
            expected_s = computed * self.prefill_s + loaded_s + usage.output_tokens * self.decode_s
            if expected_s > 0 and ttft_s > 0:
                scale = clamp((ttft_s + decode_s) / expected_s, 0.1, 10.0) ** weight
                self.prefill_s *= scale
                self.decode_s *= scale
            return
        loaded_s = usage.external_tokens * self.load_s
        if computed >= max(LEAST_TOKENS, usage.external_tokens):
            self.prefill_s += weight * (clamp((ttft_s - loaded_s) / computed, 1e-7, 1.0) - self.prefill_s)
        if usage.external_tokens >= max(LEAST_TOKENS, 2 * computed):  # else the prefill's error would be its
            seen_s = (ttft_s - computed * self.prefill_s) / usage.external_tokens
            self.load_s += weight * (clamp(seen_s, 1e-8, 1.0) - self.load_s)
        if usage.output_tokens >= 4:
            self.decode_s += weight * (clamp(decode_s / (usage.output_tokens - 1), 1e-6, 10.0) - self.decode_s)


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
