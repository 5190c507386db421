"""Named modelled engines, each with where its constants come from. Facts and small numbers; pure.

KV bytes a token are arithmetic from the models' published shapes; `kv_tokens` of the GPU profiles too: 0.9 of 96 GB,
less weights and 3 GB. Copies between host and GPU are taken as PCIe 5 x16, those of one machine's memory as measured.
"""

from outrider.errors import CallerError
from outrider.lab.twins.speed import Profile, Speed

VLLM_RUNS = "vLLM 0.19 on an RTX PRO 6000, 300 ShareGPT requests at 10/s (casys-kaist/LLMServingSim @ 5daddb2, MIT)"
DEFAULT = "rtxpro6000-llama-3.1-8b"
EMBEDDED = "smollm2-cpu"
PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name=DEFAULT,
            speed=Speed(per_step_s=0.01363, per_prompt_token_s=2.99e-5, per_decode_s=1.252e-4, per_position_s=4.0e-9),
            provenance=f"fitted to {VLLM_RUNS}, Llama-3.1-8B in bf16",
            kv_tokens=500_000,
            kv_bytes_per_token=131_072,
            max_batch_tokens=2048,
            max_num_seqs=128,
            copy_bytes_per_s=50e9,
        ),
        Profile(
            name="rtxpro6000-qwen3-30b-a3b",
            speed=Speed(per_step_s=0.02215, per_prompt_token_s=6.13e-5, per_decode_s=1.927e-4, per_position_s=2.8e-9),
            provenance=f"fitted to one of two data-parallel ranks of {VLLM_RUNS}, Qwen3-30B-A3B in bf16",
            kv_tokens=500_000,
            kv_bytes_per_token=98_304,
            max_batch_tokens=2048,
            max_num_seqs=128,
            copy_bytes_per_s=50e9,
        ),
        Profile(
            name=EMBEDDED,
            speed=Speed(per_step_s=0.0454, per_prompt_token_s=2.58e-3, per_decode_s=2.46e-2, per_position_s=5.5e-7),
            provenance="fitted to a live run of `outrider demo`: SmolLM2-135M in fp32, two engines on 2 AMD EPYC cores",
            kv_tokens=1792,
            kv_bytes_per_token=46_080,
            max_batch_tokens=512,
            max_num_seqs=8,
            hop_s=0.002,
            copy_bytes_per_s=5e9,
        ),
    )
}


def named(name: str) -> Profile:
    """CallerError where there is none of that name."""
    if name not in PROFILES:
        raise CallerError(f"--profile {name}: not known. Choose one of {', '.join(PROFILES)}, or use --calibrate.")
    return PROFILES[name]
