"""Run on each of two ranks by test_balanced.py: `python huggingface_ranks.py DIRECTORY RANK RANKS`.

Tiny random models of four families, balanced on two ranks without foresight and with it, against the stock model that
sees all tokens in one process. fp32: losses, gradients and trained weights within TOLERANCE of their largest value.
"""

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from outrider.errors import CallerError
from outrider.experts import balance

TOLERANCE = 2e-5  # measured: 2e-6
VOCABULARY, STEPS = 96, 3
WORST: list[float] = []
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = [[(2, 9), (1, 17)], [(3, 7), (0, 5)]]  # by micro-batch and rank: sequences and their length; rank 1 idles once


def build(kind: str) -> Any:
    torch.manual_seed(7)
    if kind == "qwen3":
        config = Qwen3MoeConfig(**SHAPE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, head_dim=16)
        model: Any = Qwen3MoeForCausalLM(config)
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=5, intermediate_size=16))
    elif kind == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=2, intermediate_size=16))
    else:
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **SHAPE, intermediate_size=24, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3,
                n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
                qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("gate.weight"):
                parameter.mul_(10)  # routers that choose, experts that matter
    return model.train()


def batches(step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    return [[torch.randint(VOCABULARY, shape, generator=generator) for shape in row] for row in TOKENS]


TARGETS = sum(rows * (length - 1) for row in TOKENS for rows, length in row)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / TARGETS
    return loss


def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    far = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3)
    assert far <= TOLERANCE, f"{what}: {far}"
    WORST.append(far)


def check(kind: str, rank: int, foreseen: bool, again: str, bitwise: bool, journal: Path | None = None) -> None:
    stock = build(kind)
    model = copy.deepcopy(stock)
    what = f"{kind}, foreseen {foreseen}, checkpointing {again}, bitwise {bitwise}"
    balanced = balance(model, slots=2, bitwise=bitwise, block_rows=8, journal=journal)
    if again != "no":
        model.activation_checkpointing_enable({"use_reentrant": again == "reentrant"})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (stock, model)]
    homes = balanced.blocks[0].experts.homes_E
    for step in range(STEPS):
        data = batches(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = torch.zeros(())
        for row in data:
            for ids in row:
                if len(ids):
                    part = loss_of(stock, ids)
                    part.backward()
                    expected += part.detach()
        counts = np.random.default_rng(step).poisson(9, (2, len(balanced.blocks), 2, len(homes)))
        total = torch.zeros(())
        with balanced.step(counts if foreseen else None) as run:
            for m, row in enumerate(data):
                idle = len(row[rank]) == 0
                real = torch.zeros(1, dtype=torch.bool) if idle else None
                with run.micro_step(m, real=real):
                    part = loss_of(model, torch.zeros((1, 1), dtype=torch.int64) if idle else row[rank])
                    part.backward()
                    total += part.detach()
            run.finish_gradients()
        dist.all_reduce(total)
        close(total, expected, f"{what}: loss of step {step}")
        theirs = dict(stock.named_parameters())
        for name, parameter in model.named_parameters():
            gradient = theirs[name].grad[torch.from_numpy(homes == rank)] if ".experts." in name else theirs[name].grad
            close(parameter.grad, gradient, f"{what}: gradient of {name} in step {step}")
        for optimizer in optimizers:
            optimizer.step()
    assert balanced.mover.copies_moved > 0, f"{what}: nothing was balanced"
    if not foreseen and again == "no":
        load = np.stack(balanced.mover.computed_MLR)
        assert (load.max(axis=2) <= np.ceil(load.mean(axis=2)) + 2 * 8 * bitwise).all(), f"{what}: {load}"
    whole = balanced.state_dict()
    assert set(whole) == set(stock.state_dict())
    for name, tensor in stock.state_dict().items():
        close(whole[name], tensor, f"{what}: trained {name}")
    check_state(kind, whole, rank)
    balanced.close()


def check_state(kind: str, whole: Any, rank: int) -> None:
    """Trained under one plan: loads into the plain model, and into another plan, and comes out the same."""
    plain, other = build(kind), build(kind)
    plain.load_state_dict(whole)
    wrapped = balance(other, slots=0)
    wrapped.load_state_dict(whole)
    again = wrapped.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    with torch.no_grad():
        ids = batches(99)[0][rank]
        close(other(input_ids=ids).logits, plain(input_ids=ids).logits, f"{kind}: logits after loading")


def check_refusals() -> None:
    for model, message in (
        (torch.nn.Linear(2, 2), "fused experts"),
        (MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=16, router_jitter_noise=0.1)), "jitter"),
    ):
        try:
            balance(model)
            raise AssertionError("spread what cannot be")
        except CallerError as error:
            assert message in str(error), error  # noqa: PT017
    balanced = balance(build("olmoe"))
    try:
        with balanced.step():
            pass
        raise AssertionError("a step ended with gradients away")
    except CallerError as error:
        assert "finish_gradients" in str(error)  # noqa: PT017


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for kind in ("qwen3", "mixtral", "olmoe", "deepseek"):
        check(kind, rank, foreseen=False, again="no", bitwise=False)
    check("qwen3", rank, foreseen=True, again="not reentrant", bitwise=False)
    check("mixtral", rank, foreseen=False, again="not reentrant", bitwise=False)
    journal = Path(directory) / f"experts.{rank}.jsonl"
    check("olmoe", rank, foreseen=False, again="reentrant", bitwise=True, journal=journal)
    check("deepseek", rank, foreseen=True, again="no", bitwise=True)
    check_refusals()
    sys.stdout.write(f"{len(WORST)} comparisons, worst {max(WORST):.1e}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
