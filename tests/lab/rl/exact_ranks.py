"""Run on each rank by test_exact.py: `python exact_ranks.py DIRECTORY RANK RANKS`. Exit code 0: all held.

All ranks learn together, experts balanced; then rank 0 learns alone, balancing off. Everything must be equal to the
bit: rollouts, and every parameter of the model.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from outrider.lab.rl.exact import ExactLearner
from outrider.lab.rl.learn import Recipe, model_of

STEPS = 3
RECIPE = Recipe(seed=3, prompts=5, samples=4, micro_batch=7, warm_up=20, layers=2)  # 20 sequences: the last one of 6
LIMIT = timedelta(seconds=60)


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=LIMIT)
    alone = [dist.new_group([one], timeout=LIMIT) for one in range(ranks)][0]  # all have as many groups
    together = dist.group.WORLD
    assert together is not None
    learner = ExactLearner(RECIPE, together, slots=2)
    rollouts = [learner.step() for _ in range(STEPS)]
    state = learner.balanced.state_dict()
    assert learner.balanced.mover.copies_moved > 0, "no copies, nothing proven"
    assert learner.balanced.mover.unforeseen == learner.balanced.mover.absent == 0
    if rank == 0:
        single = ExactLearner(RECIPE, alone, slots=0)
        for mine, theirs in zip([single.step() for _ in range(STEPS)], rollouts, strict=True):
            assert [(r.tokens, r.reward) for r in mine] == [(r.tokens, r.reward) for r in theirs]
        assert len({r.reward for step in rollouts for r in step}) == 2, "the same reward for all teaches nothing"
        begin, end = model_of(RECIPE).state_dict(), single.balanced.state_dict()
        assert end.keys() == state.keys() == begin.keys()
        for name, tensor in end.items():
            assert tensor.numpy().tobytes() == state[name].numpy().tobytes(), (
                f"{name}: apart by {float((tensor - state[name]).abs().max())}"
            )
            assert not torch.equal(tensor, begin[name]), f"{name} was never trained"
        print(f"{len(end)} parameters, {learner.balanced.mover.copies_moved} copies moved, 0 bits apart")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
