"""Run on each rank by test_exact.py: `python exact_ranks.py DIRECTORY RANK RANKS`. Exit code 0: all held.

All ranks learn together, experts balanced; then rank 0 learns alone, balancing off. Everything must be equal to the
bit: rollouts, every gradient of every step, every parameter of the model.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from outrider.lab.rl.exact import ExactLearner
from outrider.lab.rl.learn import Recipe, model_of

STEPS = 3
RECIPE = Recipe(seed=3, prompts=5, samples=4, micro_batch=7, warm_up=25, layers=2)  # 20 sequences: the last one of 6
LIMIT = timedelta(seconds=120)


def run(group: Any, slots: int) -> tuple[ExactLearner, list[Any], dict[str, torch.Tensor]]:
    """Learn; the learner, its rollouts and gradients by step, and whole weights."""
    learner, history = ExactLearner(RECIPE, group, slots), []
    for _ in range(STEPS):
        rollouts = learner.step()
        mine = {name: p.grad.clone() for name, p in learner.balanced.model.named_parameters()}
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        whole = {n: torch.cat([one[n] for one in everyone]) if ".experts." in n else mine[n] for n in mine}
        history.append(([(r.tokens, r.reward) for r in rollouts], whole))
    return learner, history, learner.balanced.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape
        assert tensor.numpy().tobytes() == b[name].numpy().tobytes(), (
            f"{what} {name}: apart by {float((tensor - b[name]).abs().max())}"
        )


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=LIMIT)
    alone, *_ = [dist.new_group([one], timeout=LIMIT) for one in range(ranks)]  # all ranks have as many groups
    learner, history, state = run(dist.group.WORLD, slots=2)
    copies = learner.balanced.mover.copies_moved
    assert copies > 0, "no copies, nothing proven"
    assert learner.balanced.mover.unforeseen == learner.balanced.mover.absent == 0
    if rank == 0:
        _, expected, end = run(alone, slots=0)
        for step, ((rollouts, gradients), (other_rollouts, other)) in enumerate(zip(history, expected, strict=True)):
            assert rollouts == other_rollouts
            same(gradients, other, f"step {step}, gradient of")
        taught = [len({reward for _, reward in rollouts}) == 2 for rollouts, _ in history]
        assert sum(taught) >= 2, "the same reward for all teaches nothing"
        same(state, end, "after training,")
        begin = model_of(RECIPE).state_dict()
        assert begin.keys() == end.keys()
        assert not any(torch.equal(tensor, begin[name]) for name, tensor in end.items()), "nothing was learned"
        sys.stdout.write(f"{len(end)} parameters and gradients, {copies} copies moved, 0 bits apart\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
