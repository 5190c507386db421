"""Reinforce a small MoE model, loads foreseen: `torchrun --nproc-per-node 2 examples/train_foreseen.py`

Rollouts record each token's experts; recompute and update replay them. Reward: to count, one more each time."""

import os

import numpy as np
import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

from outrider.experts import balance, foresee

BATCHES, SEQUENCES, LENGTH, WORDS = 3, 8, 8, 8  # micro-batches of so many sequences on each rank


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on every rank
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # 8 experts, top-2
    model = MixtralForCausalLM(MixtralConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=32, **shape))
    balanced = balance(model, slots=2)
    optimizer, dice = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(rank)
    chosen, old = [], {}  # experts by layer, log-probabilities by micro-batch
    for block in balanced.blocks:  # an inference engine returns routes with its tokens: see outrider.experts.adapters
        block.gate.register_forward_hook(lambda gate, given, said: chosen.append(said[2]))
    for step in range(17):
        ids = torch.randint(WORDS, (BATCHES * SEQUENCES, 1), generator=dice)
        for _ in range(LENGTH):
            chosen.clear()
            odds = model(input_ids=ids, use_cache=False).logits[:, -1].detach().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=dice)], dim=1)
        routes, batch = torch.stack(chosen, dim=1), np.arange(BATCHES).repeat(SEQUENCES * LENGTH)
        mine = foresee(routes.numpy(), batch, np.full_like(batch, rank), 8, ranks)
        reward = (ids[:, 1:] == (ids[:, :-1] + 1) % WORDS).float()
        for part in (counts := torch.from_numpy(mine), mean := reward.mean() / ranks):
            dist.all_reduce(part)  # over the tokens of all ranks
        optimizer.zero_grad()
        with balanced.step(counts) as run:
            for stage, m in [(stage, m) for stage in ("recompute", "update") for m in range(BATCHES)]:
                some, route, gain = (whole.chunk(BATCHES)[m] for whole in (ids, routes, reward - mean))
                with run.micro_step(m, stage, route), torch.set_grad_enabled(stage == "update"):
                    odds = model(input_ids=some[:, :-1], use_cache=False).logits.log_softmax(-1)
                    said = odds.gather(2, some[:, 1:, None])[..., 0]
                    if stage == "update":
                        (-((said - old[m]).exp() * gain).sum() / (ranks * BATCHES * gain.numel())).backward()
                    old[m] = said.detach()
            run.finish_gradients()
        balanced.clip_grad_norm_(1.0)
        optimizer.step()
        if rank == 0 and step % 8 == 0:
            print(f"step {step}: reward {mean:.2f}, token-slots by rank {balanced.mover.computed_MLR[-1].sum(0)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
