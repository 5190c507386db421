"""Rollouts straight from a transformers model, without an engine: for tests and for a first look. Slow and simple."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from outrider.lab.rl.rollouts import Rollout


def sample(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int, reward: Callable[[Sequence[int]], float]
) -> list[Rollout]:
    """Continue every prompt by `new_tokens` sampled tokens; its place in `prompts` is not its group: equal prompts are.

    reward  function of the generated token ids
    The routes are what the model's routers chose; the last token of a sequence was never fed in and has rows of -1.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[torch.Tensor] = []
    gates = [m for m in model.modules() if isinstance(getattr(m, "gate", None), nn.Module) and hasattr(m, "experts")]
    hooks = [m.gate.register_forward_hook(lambda _, __, output: chosen.append(output[-1])) for m in gates]
    groups: dict[tuple[int, ...], int] = {}
    rollouts = []
    try:
        for prompt in map(tuple, prompts):
            output: list[int] = []
            rows: list[torch.Tensor] = []
            past, fed = None, list(prompt)
            for _ in range(new_tokens):
                chosen.clear()
                with torch.no_grad():
                    result = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
                rows.append(torch.stack(chosen, dim=1))
                past = result.past_key_values
                probabilities = torch.softmax(result.logits[0, -1].float(), dim=-1)
                fed = [int(torch.multinomial(probabilities, 1, generator=generator))]
                output += fed
            routes = np.full((len(prompt) + new_tokens, *rows[0].shape[1:]), -1, dtype=np.int16)
            routes[:-1] = torch.cat(rows).numpy()
            group = groups.setdefault(prompt, len(groups))
            rollouts.append(Rollout(prompt, tuple(output), routes, group, reward(output)))
    finally:
        for hook in hooks:
            hook.remove()
    return rollouts
