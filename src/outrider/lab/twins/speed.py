"""How long one step of an engine takes, as a function of what is computed in it; named profiles. Pure.

    step = per_step + prompt tokens x per_prompt_token + decoding requests x per_decode + positions x per_position

positions: for every token computed in the step, how many tokens it attends to. The first term is what reading the
weights costs, the last is attention. `calibrate.py` fits the four constants to a run.
"""

import msgspec


class Speed(msgspec.Struct, frozen=True):
    """Seconds."""

    per_step_s: float
    per_prompt_token_s: float
    per_decode_s: float
    per_position_s: float = 0.0

    def step_s(self, prompt_tokens: int, decodes: int, positions: float) -> float:
        return (
            self.per_step_s
            + prompt_tokens * self.per_prompt_token_s
            + decodes * self.per_decode_s
            + positions * self.per_position_s
        )


class Profile(msgspec.Struct, frozen=True):
    """A modelled engine. `provenance` says where its constants come from, in one sentence."""

    name: str
    speed: Speed
    provenance: str
    kv_tokens: int  # what one such engine's cache holds, where the caller names nothing else
    kv_bytes_per_token: int
    max_batch_tokens: int
    max_num_seqs: int
    hop_s: float = 0.001  # gateway to engine, and back
    copy_bytes_per_s: float = 20e9  # between host and this engine, each way
