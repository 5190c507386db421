"""The routers of a plain transformers model, watched and overruled by forward hooks. Used by `generate` and `learn`.

A rollout engine records what its routers chose; the update replays those choices, with live probabilities, so that
router gradients stay whole (R3). Blocks that `outrider.experts` has spread do this by themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Gates:
    """Hooks on every router of `model`, in the order of layers, until `close`.

    replayed, changed  tokens x layers replayed so far, and those where the live router would have chosen other experts
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = [m for m in model.modules() if isinstance(getattr(m, "gate", None), nn.Module)]
        routers: list[Any] = [m.gate for m in blocks if hasattr(m, "experts")]
        self.layers, self.top_k = len(routers), int(routers[0].top_k)
        self.replayed = self.changed = 0
        self._chosen: list[Tensor] = []
        self._real: list[tuple[Tensor, Tensor]] = []  # by layer, padding left out
        self._routes_TLK: Tensor | None = None
        self._hooks = [gate.register_forward_hook(self._passed) for gate in routers]

    @contextmanager
    def replaying(self, routes_TLK: Tensor) -> Iterator[None]:
        """The one forward pass inside takes these experts; rows of -1 (padding) are routed live."""
        self.forget()
        self._routes_TLK = routes_TLK
        try:
            yield
        finally:
            self._routes_TLK = None

    def forget(self) -> None:
        """A forward pass begins."""
        self._chosen, self._real = [], []

    def chosen(self) -> Tensor:
        """[tokens, layers, top_k] the experts that the last forward pass took."""
        return torch.stack(self._chosen, dim=1)

    def balance_loss(self) -> Tensor:
        """Switch Transformer's auxiliary loss of the last pass, mean over layers: E * sum of share_E * probability_E.

        1 where all experts are taken equally often. Source: Fedus et al., arXiv 2101.03961, equation 4, for top_k.
        """
        losses = []
        for chosen_TK, logits_TE in self._real:
            experts = logits_TE.shape[1]
            share_E = torch.bincount(chosen_TK.flatten(), minlength=experts) / chosen_TK.numel()
            losses.append(experts * (share_E * logits_TE.softmax(-1).mean(0)).sum())
        return torch.stack(losses).mean()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _passed(self, gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = output
        known_T = torch.ones(len(chosen), dtype=torch.bool)
        if self._routes_TLK is not None:
            recorded = self._routes_TLK[:, len(self._chosen)]
            known_T = (recorded >= 0).all(dim=1)
            differs = (recorded.sort(dim=1).values != chosen.sort(dim=1).values).any(dim=1) & known_T
            self.replayed, self.changed = self.replayed + int(known_T.sum()), self.changed + int(differs.sum())
            chosen = torch.where(known_T[:, None], recorded, chosen)
            weights = logits.softmax(-1).gather(1, chosen)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self._chosen.append(chosen)
        self._real.append((chosen[known_T], logits[known_T]))
        return logits, weights, chosen
