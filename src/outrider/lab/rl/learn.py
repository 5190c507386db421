"""Teach a tiny MoE model arithmetic by policy gradient and keep the routes: `python -m outrider.lab.rl.learn --help`.

    rollouts (routes recorded) -> advantages within a prompt's samples (GRPO) -> micro-steps (routes replayed) -> AdamW

The model is a Qwen3-MoE of random weights. It first sees a few batches of right answers, enough to answer in the
task's form and seldom rightly; from there on the rule's reward is all it learns from. One thread, one process.
`exact.py` runs the same step on several ranks.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from outrider.experts.foresee import source_edges
from outrider.lab.rl import trace
from outrider.lab.rl.arithmetic import END, OUTPUT_TOKENS, PROMPT_TOKENS, VOCABULARY, Problem, draw, reward
from outrider.lab.rl.gates import Gates
from outrider.lab.rl.generate import generate
from outrider.lab.rl.micro_batch import MicroBatch
from outrider.lab.rl.rollouts import Rollout, advantages

WIDTH = PROMPT_TOKENS + OUTPUT_TOKENS - 1  # tokens that are fed in, at most
WARM_UP_BATCH = 128  # problems

Replaying = Callable[[int, MicroBatch], AbstractContextManager[Any]]


class Recipe(msgspec.Struct, frozen=True):
    """All that a run depends on.

    steps           RL steps, each of `prompts` drawn anew with `samples` rollouts each, and one step of AdamW
    micro_batch     sequences of a micro-step
    warm_up         supervised batches of 128 problems before, at warm_up_rate; rate: of the RL steps
    balance_weight  of the routers' auxiliary loss, which pulls experts to equal load; 0: none
    layers, experts, top_k, hidden
                    shape of the model; an expert is as wide inside as the model
    """

    seed: int = 0
    steps: int = 400
    prompts: int = 32
    samples: int = 8
    micro_batch: int = 32
    warm_up: int = 25
    warm_up_rate: float = 2e-3
    rate: float = 4e-4
    balance_weight: float = 0.0
    layers: int = 4
    experts: int = 32
    top_k: int = 4
    hidden: int = 64


def model_of(recipe: Recipe) -> Any:
    """Random weights by the recipe's seed; torch's own random state is left as it was."""
    shape: Any = Qwen3MoeConfig
    config = shape(
        vocab_size=len(VOCABULARY), hidden_size=recipe.hidden, moe_intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=4, head_dim=recipe.hidden // 4,
        num_experts=recipe.experts, num_experts_per_tok=recipe.top_k, norm_topk_prob=True, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen3MoeForCausalLM(config)


def optimizer_of(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


def warm_up(model: Any, recipe: Recipe, rng: np.random.Generator) -> None:
    """Supervised, short: the model learns what an answer looks like, and few of the answers."""
    optimizer = optimizer_of(model, recipe.warm_up_rate)
    for _ in range(recipe.warm_up):
        batch = supervised([draw(rng) for _ in range(WARM_UP_BATCH)], model.config.num_hidden_layers)
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        shown = batch.weight > 0
        optimizer.zero_grad()
        F.cross_entropy(logits[shown], batch.targets[shown]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def supervised(problems: Sequence[Problem], layers: int) -> MicroBatch:
    """Right answers as a micro-batch whose routes are nobody's."""
    none = [np.zeros((len(p.prompt) + len(p.answer), layers, 1), dtype=np.int16) for p in problems]
    answered = [Rollout(p.prompt, p.answer, routes, 0, 1.0) for p, routes in zip(problems, none, strict=True)]
    return MicroBatch(answered, [1.0] * len(answered), WIDTH, layers, 1, 1)


class Engine:
    """What rolls out: a model with watched routers, and the randomness of prompts and samples."""

    def __init__(self, model: Any, recipe: Recipe, rng: np.random.Generator) -> None:
        self.model, self.recipe, self.rng, self.gates = model, recipe, rng, Gates(model)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def roll_out(self) -> list[Rollout]:
        """The rollouts of one step, those of a prompt side by side."""
        prompts = [draw(self.rng).prompt for _ in range(self.recipe.prompts)]
        groups = [group for group in range(self.recipe.prompts) for _ in range(self.recipe.samples)]
        asked = [prompts[group] for group in groups]
        return generate(self.model, self.gates, asked, groups, OUTPUT_TOKENS, END, reward, self.generator)


def packed(sequences: int, recipe: Recipe, ranks: int) -> list[list[range]]:
    """Sequences of each micro-batch and rank: contiguous runs as equal as can be, the first ranks have one more."""
    edges = range(0, sequences, recipe.micro_batch)
    whole = [range(begin, min(begin + recipe.micro_batch, sequences)) for begin in edges]
    return [[run[a:b] for a, b in pairwise(source_edges(len(run), ranks).tolist())] for run in whole]


def batches_of(rollouts: Sequence[Rollout], recipe: Recipe, rank: int = 0, ranks: int = 1) -> list[MicroBatch]:
    """The micro-batches of a step, of each of them this rank's sequences."""
    advantage, tokens = advantages(rollouts).tolist(), sum(len(r.output) for r in rollouts)
    batches = []
    for by_rank in packed(len(rollouts), recipe, ranks):
        some, gains = [rollouts[i] for i in by_rank[rank]], [advantage[i] for i in by_rank[rank]]
        batches.append(MicroBatch(some, gains, WIDTH, recipe.layers, recipe.top_k, tokens))
    return batches


def accumulate(batches: Sequence[MicroBatch], replaying: Replaying, loss: Callable[[MicroBatch], Tensor]) -> None:
    """Forward and backward of all micro-steps; inside `replaying` the routers take what was recorded."""
    for m, batch in enumerate(batches):
        with replaying(m, batch):
            loss(batch).backward()  # type: ignore[no-untyped-call]


def learn(recipe: Recipe) -> Iterator[tuple[list[Rollout], float]]:
    """One RL step at a time: its rollouts, and the share of routes that the update would have chosen otherwise."""
    rng, model = np.random.default_rng(recipe.seed), model_of(recipe)
    warm_up(model, recipe, rng)
    engine, optimizer = Engine(model, recipe, rng), optimizer_of(model, recipe.rate)
    gates, share = engine.gates, recipe.balance_weight * recipe.micro_batch / (recipe.prompts * recipe.samples)

    def replaying(_: int, batch: MicroBatch) -> AbstractContextManager[Any]:
        return gates.replaying(batch.routes)

    def loss(batch: MicroBatch) -> Tensor:
        policy = batch.loss(model)
        return policy + share * gates.balance_loss() if share else policy

    for _ in range(recipe.steps):
        rollouts = engine.roll_out()
        optimizer.zero_grad()
        gates.replayed = gates.changed = 0
        accumulate(batches_of(rollouts, recipe), replaying, loss)
        optimizer.step()
        yield rollouts, gates.changed / gates.replayed


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    words = "Teach a tiny MoE arithmetic by policy gradient and keep its routes. One core, about two minutes."
    parser = argparse.ArgumentParser(description=words, epilog=Recipe.__doc__, formatter_class=raw)
    for field in msgspec.structs.fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    parser.add_argument("--out", type=writable, help="write the routes of all steps to this npz")
    parser.add_argument("--keep", type=steps_of, help="only these steps of them, as 0,1,399")
    options = vars(parser.parse_args())
    out, kept = options.pop("out"), options.pop("keep")
    recipe = Recipe(**options)
    if kept is not None and not 0 <= min(kept) <= max(kept) < recipe.steps:
        parser.error(
            f"--keep {min(kept)} to {max(kept)}: the run has steps 0 to {recipe.steps - 1}. Name some of them."
        )
    torch.set_num_threads(1)
    steps, means = {}, []
    for step, (rollouts, changed) in enumerate(learn(recipe)):
        means.append(float(np.mean([r.reward for r in rollouts])))
        if kept is None or step in kept:
            steps[step] = rollouts
        if step % 10 == 9:
            line = f"step {step + 1}: reward {np.mean(means[-10:]):.3f}, {changed:.2%} of routes would differ live"
            sys.stdout.write(f"{line}, {time.process_time():.0f} s\n")
            sys.stdout.flush()
    if out:
        trace.write(out, steps, recipe.experts, msgspec.json.encode(recipe).decode())


def steps_of(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def writable(name: str) -> Path:
    """What would fail after the run fails before it."""
    try:
        Path(name).open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror}. Name a file that can be written.") from error
    return Path(name)


if __name__ == "__main__":
    main()
