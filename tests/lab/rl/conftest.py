"""One distributed run for all tests of the RL step: rollouts of the tiny MoE, unbalanced and balanced, on two ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider.lab.engine.models import load
from outrider.lab.rl import step
from outrider.lab.rl.rollouts import Rollout
from outrider.lab.rl.sample import sample

MICRO_BATCH_TOKENS = 40


def spread_of(ids: Sequence[int]) -> float:
    """A reward for tests: share of distinct tokens."""
    return len(set(ids)) / len(ids)


@pytest.fixture(scope="session")
def tiny_moe() -> Any:
    torch.set_num_threads(1)
    return load("tiny-moe", "float32")[0].train()


@pytest.fixture(scope="session")
def rollouts(tiny_moe: Any) -> list[Rollout]:
    """Seven sequences of two groups and of different lengths; the last micro-batch leaves rank 1 without any.

    Two of them have rows that the engine did not record: whole ones, one layer's, one id of a row.
    """
    prompts = [range(100, 112)] * 3 + [range(7000, 7020)] * 4
    sampled = sample(tiny_moe, prompts[:5], 10, 1, spread_of) + sample(tiny_moe, prompts[5:], 4, 2, spread_of)
    for index in (0, 4):
        routes = sampled[index].routes
        routes[3 + index] = -1
        routes[1, 2] = -1
        routes[2, 0, 1] = -1
    return sampled


@pytest.fixture(scope="session")
def journal_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals")


@pytest.fixture(scope="session")
def arms(rollouts: list[Rollout], journal_dir: Path) -> tuple[step.StepResult, step.StepResult]:
    """(unbalanced, balanced), from one start of the ranks."""
    static = journal_dir / "static"
    static.mkdir()
    both = [step.Arm("static", 0, str(static)), step.Arm("balanced", 2, str(journal_dir))]
    first, second = step.run_arms(both, "tiny-moe", rollouts, micro_batch_tokens=MICRO_BATCH_TOKENS)
    return first, second


@pytest.fixture(scope="session")
def single(tiny_moe: Any) -> Any:
    return lambda rollouts: single_process(tiny_moe, rollouts)


class ReplayedRouter(torch.nn.Module):
    """The reference's router, written apart from ours: recorded ids where there are any, live probabilities."""

    def __init__(self, router: torch.nn.Module, routes: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.top_k, self.routes = router.weight, router.top_k, routes

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden @ self.weight.T  # type: ignore[operator, union-attr]
        probabilities = logits.softmax(-1)
        ids = probabilities.topk(self.top_k, dim=-1).indices  # type: ignore[arg-type]
        for token, row in enumerate(self.routes):
            if min(row) >= 0:
                ids[token] = row
        scores = torch.stack([p[row] / p[row].sum() for p, row in zip(probabilities, ids, strict=True)])
        return logits, scores, ids


def single_process(model: Any, rollouts: list[Rollout]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the same step on the plain model: one sequence at a time, no ranks, no plan, no padding."""
    model.zero_grad(set_to_none=True)
    reward = np.array([r.reward for r in rollouts])
    loss = 0.0
    for rollout in rollouts:
        peers = reward[[r.group == rollout.group for r in rollouts]]
        advantage = (rollout.reward - peers.mean()) / (peers.std() + 1e-4)
        n = len(rollout.tokens) - 1
        routers = [layer.mlp.gate for layer in model.model.layers]
        for index, layer in enumerate(model.model.layers):
            routes = torch.from_numpy(rollout.routes[:n, index].astype(np.int64))
            layer.mlp.gate = ReplayedRouter(routers[index], routes)
        ids = torch.tensor([rollout.tokens])
        log_p = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        for layer, router in zip(model.model.layers, routers, strict=True):
            layer.mlp.gate = router
        first = len(rollout.prompt) - 1
        taken = log_p[range(n), ids[0, 1:]][first:]
        ratio = (taken - taken.detach()).exp()  # the recompute pass sees the same weights
        entropy = torch.distributions.Categorical(logits=log_p[first:]).entropy()
        part = -(ratio * advantage + 0.01 * entropy).sum() / sum(len(r.output) for r in rollouts)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
