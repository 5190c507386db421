"""Train a small MoE model with balanced experts: `torchrun --nproc-per-node 2 examples/train_balanced.py`

Every rank holds half of the experts and may copy two more in each layer, wherever the gate sends most tokens just now.
The task is to repeat a sequence; random data, a few seconds on a CPU.
"""

import os

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import outrider.experts

STEPS, MICRO_BATCHES, SEQUENCES, HALF = 30, 2, 8, 8


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights on every rank
    config = Qwen3MoeConfig(
        vocab_size=16, hidden_size=64, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    balanced = outrider.experts.balance(model, slots=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(rank)
    targets = ranks * MICRO_BATCHES * SEQUENCES * HALF
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        with balanced.step() as run:
            for m in range(MICRO_BATCHES):
                half = torch.randint(16, (SEQUENCES, HALF), generator=data)
                ids = torch.cat([half, half], dim=1)
                with run.micro_step(m):
                    logits = model(input_ids=ids, use_cache=False).logits[:, HALF - 1 : -1].flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, half.flatten(), reduction="sum") / targets
                    loss.backward()
                total += loss.detach()
            run.finish_gradients()
        optimizer.step()
        dist.all_reduce(total)
        if rank == 0 and step % 10 in (0, 9):
            load = balanced.mover.computed_MLR[-1]  # [layers, ranks] of the last micro-step
            print(f"step {step}: loss {total:.3f}, fullest rank {(load.max(1) / load.mean(1)).max():.3f} of the mean")
    if rank == 0:
        print(f"{balanced.mover.copies_moved} copies of experts moved")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
