"""A micro-batch of whole sequences as tensors, its routes and its policy-gradient loss. Used by `learn` and `exact`.

Every row has the same width whatever lies beside it, and log-probabilities are taken row by row: in exact mode a
sequence's bits must not depend on its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.lab.rl.rollouts import Rollout


class MicroBatch:
    """Rollouts [n] with their advantages, right-padded to `width` tokens; the last token of each is a target only.

    Without rollouts: one row of padding, so that a rank without sequences can take part.

    inputs, targets  [n, width]; real: no padding; weight: advantage / generated tokens of the step where a token was
                     generated, else 0
    routes           [n * width, layers, top_k], padding -1
    """

    def __init__(
        self, rollouts: Sequence[Rollout], advantage: Sequence[float], width: int, layers: int, top_k: int, tokens: int
    ) -> None:
        shape = max(1, len(rollouts)), width
        self.inputs, self.targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        self.real, self.weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        routes = np.full((*shape, layers, top_k), -1, dtype=np.int64)
        for row, (rollout, gain) in enumerate(zip(rollouts, advantage, strict=True)):
            ids = torch.tensor(rollout.tokens)
            n = len(ids) - 1
            self.inputs[row, :n], self.targets[row, :n], self.real[row, :n] = ids[:-1], ids[1:], True
            self.weight[row, len(rollout.prompt) - 1 : n] = gain / tokens
            routes[row, :n] = rollout.routes[:n]
        self.routes = torch.from_numpy(routes).flatten(0, 1)

    def loss(self, model: Any) -> Tensor:
        """Minus the weighted sum of log-probabilities of what was generated: REINFORCE, its value means nothing."""
        logits = model(input_ids=self.inputs, use_cache=False).logits
        log_p = torch.stack([row.float().log_softmax(-1) for row in logits.unbind(0)])
        return -(log_p.gather(-1, self.targets[:, :, None])[:, :, 0] * self.weight).sum()
