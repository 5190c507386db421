"""A rollout engine in one function: many prompts at once, sampled, with the experts that each token took.

Slower than an engine and faster than `sample.py`: prompts of one length share forward passes and a KV cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from outrider.lab.rl.gates import Gates
from outrider.lab.rl.rollouts import Rollout

Tokens = tuple[int, ...]


def generate(
    model: Any,
    gates: Gates,
    prompts: Sequence[Tokens],
    groups: Sequence[int],
    most: int,
    end: int,
    reward: Callable[[Tokens, Tokens], float],
    generator: torch.Generator,
) -> list[Rollout]:
    """One rollout a prompt, in order: up to `most` tokens, drawn at temperature 1, no more after `end`.

    groups  rollouts of one prompt share a number; advantages are taken within it
    reward  of a prompt and its output
    The last token of a sequence was never fed in: its row of routes is -1. Deterministic by `generator`.
    """
    done: list[Rollout | None] = [None] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        mine = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        outputs, routes_NTLK = _continue(model, gates, [prompts[i] for i in mine], most, end, generator)
        for row, (i, output) in enumerate(zip(mine, outputs, strict=True)):
            tokens = length + len(output)
            routes = np.full((tokens, *routes_NTLK.shape[2:]), -1, dtype=np.int16)
            routes[:-1] = routes_NTLK[row, : tokens - 1]
            done[i] = Rollout(prompts[i], output, routes, groups[i], reward(prompts[i], output))
    return [rollout for rollout in done if rollout is not None]


@torch.no_grad()
def _continue(
    model: Any, gates: Gates, prompts: Sequence[Tokens], most: int, end: int, generator: torch.Generator
) -> tuple[list[Tokens], np.ndarray[Any, Any]]:
    """Outputs, and the routes of all tokens that were fed in; an ended sequence is fed on, and cut here."""
    fed, past = torch.tensor(prompts), None
    drawn: list[torch.Tensor] = []
    routes: list[torch.Tensor] = []
    open_N = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(most):
        gates.forget()
        result = model(input_ids=fed, past_key_values=past, use_cache=True)
        routes.append(gates.chosen().view(*fed.shape, gates.layers, gates.top_k))
        past = result.past_key_values
        fed = torch.multinomial(result.logits[:, -1].softmax(-1), 1, generator=generator)
        drawn.append(fed)
        open_N &= fed[:, 0] != end
        if not open_N.any():
            break
    outputs = [tuple(row[: row.index(end) + 1] if end in row else row) for row in torch.cat(drawn, dim=1).tolist()]
    return outputs, torch.cat(routes, dim=1).numpy()
