"""Real servers for memory's tests: each a process of its own, each ended whatever the test does."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.memory import KeySpace

SERVE = """
import sys
from pathlib import Path
from outrider.errors import CallerError
from outrider.memory.server import serve
try:
    serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
except CallerError as error:
    sys.exit(f"caller: {error}")
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server on `socket` and wait until it is ready; all are killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(socket: Path, tiers: str = "host=4MiB", *more: str, ready: bool = True) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", SERVE, str(socket), tiers, *more]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        running.append(process)
        if ready:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("ready on"), line
        return process

    yield run
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def keys_of(name: str, count: int) -> list[bytes]:
    """Keys of `count` blocks in a space of this name."""
    return KeySpace(model=name, dtype="float32", layout="test", block_tokens=1).chain(range(count))
