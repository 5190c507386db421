"""Two engine processes and one memory server: blocks are shared, survive an engine's restart, and change no answer."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider import memory
from outrider.lab.engine.forward import LAYOUT
from outrider.lab.engine.models import digest
from outrider.lab.processes import Child, Children, await_http, await_path, free_port

WORDS = "def read(path, mode):\n    with open(path, mode) as file:\n        return file.read()\n" * 4


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as running:
        yield running


class Pair:
    """A memory server and engines on it."""

    def __init__(self, children: Children, folder: Path, tmp_path: Path) -> None:
        self.children, self.folder, self.socket = children, folder, tmp_path / "m.sock"
        self.tiers = f"host=16MiB,disk=64MiB,path={tmp_path}/blocks"
        self.server = self.serve_memory("memory")

    def serve_memory(self, name: str) -> Child:
        server = self.children.outrider(name, "memory", "serve", "--socket", str(self.socket), "--tiers", self.tiers)
        await_path(server, self.socket, 30)
        return server

    def engines(self, *names: str) -> list[tuple[Child, str]]:
        """Started together, as each loads for seconds; all answer when this returns."""
        started = []
        for name in names:
            port = free_port()
            options = ["--model", str(self.folder), "--kv-tokens", "512", "--memory", str(self.socket)]
            child = self.children.outrider(name, "engine", "--port", str(port), *options)
            started.append((child, f"http://127.0.0.1:{port}"))
        for child, url in started:
            await_http(child, f"{url}/health", 60)
        return started


def ask(url: str, prompt: Any, name: str, count: int = 12) -> tuple[list[int], dict[str, Any]]:
    """Generated token ids and the prompt's details."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    call = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"X-Request-Id": name})
    with urllib.request.urlopen(call, timeout=60) as answer:
        said = json.loads(answer.read())
    return said["choices"][0]["token_ids"], said["usage"]["prompt_tokens_details"]


@pytest.mark.slow
def test_blocks_are_shared_and_survive(llama: Path, tmp_path: Path, children: Children, generate: Any) -> None:
    prompt = AutoTokenizer.from_pretrained(llama).encode(WORDS)
    expected = generate(llama, prompt, 12)
    turn = prompt + expected + prompt[:5]
    expected_turn = generate(llama, turn, 12)
    pair = Pair(children, llama, tmp_path)
    (first, url), (_, other) = pair.engines("a", "b")
    assert ask(url, prompt, "call-1") == (expected, {"cached_tokens": 0, "external_tokens": 0})
    whole = (len(prompt) - 1) // 16 * 16
    with memory.connect(pair.socket) as store:  # the saver is done when all whole blocks of the context are there
        keys = space_of(llama).chain(prompt + expected[:-1])
        by_s = time.monotonic() + 10
        while store.lookup(keys) < len(keys):
            assert time.monotonic() < by_s
            time.sleep(0.01)
        store.flush()
    assert ask(other, prompt, "call-2") == (expected, {"cached_tokens": whole, "external_tokens": whole})

    first.kill()
    ((_, again),) = pair.engines("a-again")
    got, details = ask(again, turn, "call-3")
    assert (got, details["external_tokens"]) == (expected_turn, (len(prompt) + 11) // 16 * 16)

    os.kill(pair.server.process.pid, signal.SIGKILL)
    assert ask(again, turn[16:], "call-4")[0] == generate(llama, turn[16:], 12), "the server is dead: time, no answer"
    pair.server.process.wait()
    pair.serve_memory("memory-again")
    ((_, fresh),) = pair.engines("c")
    got, details = ask(fresh, prompt, "call-5")
    assert (got, details["external_tokens"]) == (expected, whole), "what was durable is there after kill -9"


def space_of(folder: Path) -> memory.KeySpace:
    return memory.KeySpace(model=digest(folder), dtype="float32", layout=LAYOUT, block_tokens=16)
