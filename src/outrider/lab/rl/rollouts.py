"""Rollouts: what an engine generated, the routes it took, and how good it was. Used by the demo and by `step.py`.

Rewards are real functions of the generated text, but nothing that one would train for: `readable` is the share of
letters, digits and spaces. What the RL step shows is that balancing changes no number, not that the model learns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError

Ints = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Rollout(msgspec.Struct, frozen=True, eq=False):
    """One sequence. routes: [prompt + output tokens, layers, top_k] int16; rows of -1 were not recorded.

    group   rollouts of the same prompt share it: advantages are taken within the group
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    routes: Ints
    group: int
    reward: float

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.output


def readable(text: str) -> float:
    """The demo's reward: share of the characters that are ASCII letters, digits or spaces; 0 for no text."""
    return sum(c.isascii() and (c.isalnum() or c == " ") for c in text) / len(text) if text else 0.0


def from_choice(
    prompt: Sequence[int], output: Sequence[int], choice: Mapping[str, Any], group: int, reward: float
) -> Rollout:
    """A rollout from a choice of an OpenAI-style answer that carries vLLM's fields.

    choice  `prompt_routed_experts` [prompt, layers, top_k] and `routed_experts` [generated, layers, top_k]
    The last generated token was never fed back and may have no row; missing rows at the end become -1. CallerError
    where the prompt's rows are not one per token, or there are more rows than tokens.
    """
    parts = [np.asarray(choice.get(name) or [], dtype=np.int16) for name in ("prompt_routed_experts", "routed_experts")]
    if len(parts[0]) != len(prompt) or len(parts[1]) > len(output):
        raise CallerError(
            f"routes: {len(parts[0])} rows for {len(prompt)} prompt tokens, {len(parts[1])} for {len(output)} more."
            ' Ask the engine with "return_routed_experts": true, and give the token ids of that very answer.'
        )
    routes = np.full((len(prompt) + len(output), *parts[0].shape[1:]), -1, dtype=np.int16)
    routes[: len(prompt)] = parts[0]
    routes[len(prompt) : len(prompt) + len(parts[1])] = parts[1].reshape(-1, *routes.shape[1:])
    return Rollout(tuple(prompt), tuple(output), routes, group, reward)


def advantages(rollouts: Sequence[Rollout]) -> Floats:
    """Reward minus its group's mean, over the group's deviation plus 1e-4 (as GRPO does), one per rollout."""
    reward = np.array([r.reward for r in rollouts], dtype=np.float64)
    group = np.array([r.group for r in rollouts], dtype=np.int64)
    result = np.empty_like(reward)
    for g in np.unique(group):
        mine = reward[group == g]
        result[group == g] = (mine - mine.mean()) / (mine.std() + 1e-4)
    return result


def pack(lengths: Sequence[int], ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Indices of sequences by micro-batch and rank, at most `micro_batch_tokens` a rank, in order of arrival.

    Each goes to the emptiest rank, the lowest among equals; a longer sequence gets a rank to itself. A rank of the
    last micro-batch may be empty.
    """
    packed: list[list[list[int]]] = []
    filled: list[int] = []
    for index, length in enumerate(lengths):
        rank = filled.index(min(filled)) if filled else 0
        if not filled or (filled[rank] and filled[rank] + length > micro_batch_tokens):
            packed.append([[] for _ in range(ranks)])
            filled, rank = [0] * ranks, 0
        packed[-1][rank].append(index)
        filled[rank] += length
    return packed


def save(path: Path, rollouts: Sequence[Rollout]) -> None:
    """One NAME.npz with the flattened table."""
    np.savez(
        path,
        tokens=np.concatenate([np.array(r.tokens, dtype=np.int64) for r in rollouts]),
        routes=np.concatenate([r.routes for r in rollouts]),
        lengths=np.array([[len(r.prompt), len(r.output)] for r in rollouts], dtype=np.int64),
        group=np.array([r.group for r in rollouts], dtype=np.int64),
        reward=np.array([r.reward for r in rollouts], dtype=np.float64),
    )


def load(path: Path) -> list[Rollout]:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as table:
        tokens, routes, lengths = table["tokens"], table["routes"], table["lengths"]
        group, reward = table["group"].tolist(), table["reward"].tolist()
    rollouts, begin = [], 0
    for index, (prompt, output) in enumerate(lengths.tolist()):
        middle, end = begin + prompt, begin + prompt + output
        ids = tuple(tokens[begin:end].tolist())
        rollouts.append(Rollout(ids[:prompt], ids[prompt:], routes[begin:end], group[index], reward[index]))
        begin = middle + output
    return rollouts
