"""From logits to the next token of each request: greedy, or temperature and top-p from its own random state."""

from collections.abc import Sequence

import torch

from outrider.lab.engine.request import Request


@torch.inference_mode()
def sample(requests: Sequence[Request], logits: torch.Tensor, eos: frozenset[int]) -> list[int]:
    """One token id for each row of float32 logits [requests, vocabulary]. Greedy ties go to the smaller id."""
    return [choose(request, row, eos) for request, row in zip(requests, logits, strict=True)]


def choose(request: Request, row: torch.Tensor, eos: frozenset[int]) -> int:
    params = request.params
    if len(request.generated) < params.min_tokens:
        row[list(eos) + list(params.stop_token_ids)] = -torch.inf
    if request.random is None:
        return int(row.argmax())
    weights = ((row - row.max()) / params.temperature).softmax(-1)  # at most 0: no temperature is too small
    if params.top_p < 1:
        ordered, ids = weights.sort(descending=True, stable=True)
        weights = torch.zeros_like(weights)
        kept = ordered.cumsum(0) - ordered < params.top_p  # the one that crosses top_p is kept
        weights[ids[kept]] = ordered[kept]
    return int(torch.multinomial(weights, 1, generator=request.random))
