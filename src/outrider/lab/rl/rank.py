"""One rank of the RL step: `python -m outrider.lab.rl.rank JOB.json RANK`, started and read by `step.py`.

    foresee -> recompute pass (old log-probs, forward only) -> update pass (clipped policy gradient) -> gradients home

Dense parameters are whole on every rank, their gradients summed over ranks; experts live where they are at home. The
loss is normalised by the step's token count, so sums over ranks and micro-batches are exact.
"""

import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from outrider.errors import CallerError
from outrider.experts.foresee import foresee
from outrider.experts.layer import SpreadBlock, spread
from outrider.experts.move import Mover
from outrider.experts.plan import contiguous_homes, plan
from outrider.experts.policy import Policy, Settings
from outrider.lab.rl.rollouts import Rollout, advantages, load, pack
from outrider.lab.rl.step import SAID_WRONG, Arm, Job

CLIP = 0.2  # PPO's clip range of the probability ratio
ENTROPY = 0.01  # weight of the entropy bonus; it also keeps the loss of an on-policy step away from 0 = 0


class MicroBatch:
    """This rank's sequences of one micro-batch, right-padded; the last token of each is a target only, never fed in.

    A rank without sequences gets one padding token: it computes nothing and takes part in everything.
    """

    def __init__(self, rollouts: Sequence[Rollout], advantage: Sequence[float], like: Rollout) -> None:
        width = max((len(r.tokens) - 1 for r in rollouts), default=1)
        shape = (max(len(rollouts), 1), width)
        targets, advantages_of = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        self.inputs = torch.zeros(shape, dtype=torch.int64)
        self.real = torch.zeros(shape, dtype=torch.bool)
        self.acts = torch.zeros(shape, dtype=torch.bool)  # the next token was generated here: it carries loss
        self.routes = torch.full((*shape, *like.routes.shape[1:]), -1, dtype=torch.int64)
        for row, rollout in enumerate(rollouts):
            ids = torch.tensor(rollout.tokens)
            n = len(ids) - 1
            self.inputs[row, :n], targets[row, :n] = ids[:-1], ids[1:]
            self.real[row, :n] = True
            self.acts[row, len(rollout.prompt) - 1 : n] = True
            self.routes[row, :n] = torch.from_numpy(rollout.routes[:n].astype(np.int64))
            advantages_of[row] = advantage[row]
        self.targets, self.advantage = targets[self.acts], advantages_of[self.acts]  # [generated]

    def log_probs(self, model: Any, blocks: Sequence[SpreadBlock]) -> tuple[Tensor, Tensor]:
        """[generated] log-probability of each generated token, and the entropy it was drawn from; routes replayed."""
        for layer, block in enumerate(blocks):
            block.replay(self.routes[:, :, layer].flatten(0, 1), self.real.flatten())
        hidden = model.base_model(input_ids=self.inputs, use_cache=False).last_hidden_state[self.acts]
        everything = torch.log_softmax(model.get_output_embeddings()(hidden).float(), dim=-1)
        entropy = -(everything.exp() * everything).sum(-1)
        return everything.gather(-1, self.targets[:, None])[:, 0], entropy

    def loss_sum(self, log_probs: Tensor, entropy: Tensor, old: Tensor) -> Tensor:
        """Minus the sum of PPO's clipped objective and bonus; 0, but differentiable, where nothing was generated."""
        ratio = (log_probs - old).exp()
        gain = torch.minimum(ratio * self.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * self.advantage)
        return -(gain + ENTROPY * entropy).sum()


def foreseen(rollouts: Sequence[Rollout], packed: Sequence[Sequence[Sequence[int]]], experts: int, ranks: int) -> Any:
    """counts_MLRE of the whole step: every rank reads the same table and foresees the same."""
    routes, batch, source = [], [], []
    for m, by_rank in enumerate(packed):
        for rank, indices in enumerate(by_rank):
            for index in indices:
                n = len(rollouts[index].tokens) - 1
                routes.append(rollouts[index].routes[:n])
                batch.append(np.full(n, m))
                source.append(np.full(n, rank))
    table = np.concatenate(routes), np.concatenate(batch), np.concatenate(source)
    return foresee(*table, experts, ranks, len(packed))


def step(model: Any, blocks: Sequence[SpreadBlock], mover: Mover, rollouts: Sequence[Rollout], job: Job) -> float:
    """One RL step on this rank; afterwards the gradients are whole and at home. Returns the loss."""
    rank = mover.rank
    packed = pack([len(r.tokens) - 1 for r in rollouts], job.ranks, job.micro_batch_tokens)
    advantage = advantages(rollouts).tolist()
    batches = [
        MicroBatch([rollouts[i] for i in by_rank[rank]], [advantage[i] for i in by_rank[rank]], rollouts[0])
        for by_rank in packed
    ]
    generated = sum(len(r.output) for r in rollouts)
    model.zero_grad(set_to_none=True)
    mover.foresee(foreseen(rollouts, packed, len(blocks[0].seen_E), job.ranks))
    old = []
    for m, batch in enumerate(batches):
        with mover.micro_step("recompute", m), torch.no_grad():
            old.append(batch.log_probs(model, blocks)[0])
    loss = torch.zeros(1, dtype=torch.float64)
    for m, batch in enumerate(batches):
        with mover.micro_step("update", m):
            part = batch.loss_sum(*batch.log_probs(model, blocks), old[m]) / generated
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
    mover.finish()
    dist.all_reduce(loss)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    return float(loss)


def run_arm(model: Any, blocks: Sequence[SpreadBlock], rollouts: Sequence[Rollout], job: Job, arm: Arm) -> None:
    rank = dist.get_rank()
    settings = Settings(layers=len(blocks), experts=len(blocks[0].seen_E), ranks=job.ranks, slots=arm.slots)
    journal = None if arm.journal is None else Path(arm.journal) / f"experts.{rank}.jsonl"
    control, lane = (dist.new_group(timeout=timedelta(seconds=job.timeout_s)) for _ in range(2))
    mover = Mover(Policy(settings), blocks, control, lane, journal, watchdog_s=job.timeout_s)
    dist.barrier()
    begin_s = time.perf_counter()
    loss = step(model, blocks, mover, rollouts, job)
    dist.barrier()
    seconds = time.perf_counter() - begin_s
    mover.close()
    gradients = {
        f"gradient:{name}": parameter.grad.float().numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (rank == 0 or ".experts." in name)
    }
    figures: dict[str, Any] = {
        "loss": loss,
        "seconds": seconds,
        "computed_MLR": np.stack(mover.computed_MLR),
        "sent_bytes": mover.sent_bytes,
        "copies_moved": mover.copies_moved,
        "unforeseen": mover.unforeseen,
        "absent": mover.absent,
        "tokens": sum(len(r.tokens) - 1 for r in rollouts),
    }
    np.savez(Path(job.directory) / f"{arm.name}.{rank}.npz", **figures, **gradients)
    dist.destroy_process_group(control)
    dist.destroy_process_group(lane)


def read_model(model: str, dtype: str) -> Any:
    """The Hugging Face model alone: a name that the embedded engine knows, or a directory that it wrote or accepts."""
    from outrider.lab.engine.models import load as load_model  # needs torch and transformers, as this whole file does

    return load_model(model, dtype)[0]


def main(job_path: str, rank_text: str) -> None:
    job, rank = msgspec.json.decode(Path(job_path).read_bytes(), type=Job), int(rank_text)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(job.directory) / 'rendezvous'}"
    timeout = timedelta(seconds=job.timeout_s)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.ranks, timeout=timeout)
    model = read_model(job.model, job.dtype)
    model.train()
    rollouts = load(Path(job.directory) / "rollouts.npz")
    group = dist.group.WORLD
    assert group is not None
    blocks = spread(model, contiguous_homes(getattr(model.config, "num_experts", 0), job.ranks), group)
    plan(np.arange(64, dtype=np.int64).reshape(2, 2, 16) ** 2, slots=1)  # compiles, so that no arm is timed with it
    for arm in job.arms:
        run_arm(model, blocks, rollouts, job, arm)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2])
    except CallerError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(SAID_WRONG)  # at once: tearing gloo down would write more lines, and the other rank waits
