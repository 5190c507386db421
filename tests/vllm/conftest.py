"""Run by `make test-vllm` in an environment of its own, where vLLM is: nothing here is skipped.

The model is SmolLM2, converted by the main environment, whose transformers can; memory servers are real.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Memory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return converted("smollm2")


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    return converted("tiny-moe")


def converted(name: str) -> Path:
    code = f"from outrider.lab.engine import models; print(models.directory('{name}'))"
    done = subprocess.run([ROOT / ".venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    server = Memory(tmp_path, "host=8MiB,disk=16MiB")
    yield server
    if server.thread.is_alive():
        server.stop()
