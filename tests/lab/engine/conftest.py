"""Small real models, an engine driven step by step, and a store in a dictionary with faults on demand."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from outrider.errors import StoreGone
from outrider.lab.engine import models
from outrider.lab.engine.engine import Engine
from outrider.lab.engine.request import Limits, Output, Params, Request
from outrider.lab.engine.server import build
from outrider.memory.keys import KeySpace


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    return models.directory("tiny-moe")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_moe: Path) -> Path:
    """A random Llama of 3 layers with 6 query and 2 KV heads; its weights are large enough for varied text."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=8192, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_moe).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain() -> Callable[[Path], Any]:
    """The same model untouched by us: the oracle."""
    loaded: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in loaded:
            loaded[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return loaded[folder]

    return load


@pytest.fixture(scope="session")
def generate(plain: Callable[[Path], Any]) -> Callable[[Path, Sequence[int], int], list[int]]:
    """What transformers generates greedily after the prompt, past any end of sequence."""

    def ask(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": -1}
        out = plain(folder).generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [int(token) for token in out[0, len(prompt) :]]

    return ask


class Answer:
    """Collects one request's outputs."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def __call__(self, out: Output) -> None:
        self.outputs.append(out)

    @property
    def text(self) -> str:
        return "".join(out.text for out in self.outputs)

    @property
    def finish(self) -> str | None:
        return self.outputs[-1].finish if self.outputs else None


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(folder: Path, kv_tokens: int = 1024, connect: Any = None, **sizes: int) -> Engine:
        model, tokenizer, digest = models.load(str(folder))
        limits = Limits(kv_tokens, **{"max_batch_tokens": 64, **sizes})
        space = KeySpace(model=digest, dtype="float32", layout="test", block_tokens=limits.block_tokens)
        made.append(build(model, tokenizer, space.chain, limits, connect))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture(scope="session")
def drive() -> Callable[..., None]:
    """Step an engine in this thread until nothing is open, checking its books after each step."""

    def until_done(engine: Engine, each_step: Callable[[], None] = lambda: None) -> None:
        while engine.texts or engine.scheduler.loading or not engine.inbox.empty():
            busy = not engine.inbox.empty() or engine.step()
            engine.blocks.check()
            each_step()
            while not engine.inbox.empty() or not busy:
                engine.inbox.get(timeout=20)()
                busy = True

    return until_done


@pytest.fixture(scope="session")
def ask(drive: Callable[..., None]) -> Callable[..., list[tuple[Request, Answer]]]:
    """Submit prompts together and drive until all are answered."""

    def run(
        engine: Engine, prompts: Sequence[Sequence[int]], count: int, **params: Any
    ) -> list[tuple[Request, Answer]]:
        asked = []
        for i, prompt in enumerate(prompts):
            answer = Answer()
            asked.append((Request(f"r{i}", list(prompt), Params(max_tokens=count, **params), answer), answer))
            engine.submit(asked[-1][0])
        drive(engine)
        return asked

    return run


class DictStore:
    """Memory's Store in a dictionary, shared by all connections; `fault` may raise or change what a call sees."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.pending: set[bytes] = set()
        self.paths: dict[str, list[bytes]] = {}
        self.calls: list[str] = []
        self.fault: Callable[[str], None] = lambda call: None
        self.broken: set[bytes] = set()  # keys whose view is None
        self.gate = threading.Event()  # leases wait for it
        self.gate.set()
        self.leased: list[bytes] = []
        self.up = True

    def connect(self) -> "DictStore":
        if not self.up:
            raise StoreGone("no server")
        self.calls.append("connect")
        return self

    def called(self, call: str) -> None:
        self.calls.append(call)
        if not self.up:
            raise StoreGone("no server")
        self.fault(call)

    def lookup(self, keys: Sequence[bytes]) -> int:
        self.called("lookup")
        return next((i for i, key in enumerate(keys) if key not in self.blocks), len(keys))

    @contextmanager
    def lease(self, keys: Sequence[bytes], timeout_s: float = 2.0) -> Iterator[Any]:
        assert self.gate.wait(20)
        self.called("lease")
        self.leased += keys
        views = [memoryview(self.blocks[k]) if k in self.blocks and k not in self.broken else None for k in keys]
        yield SimpleNamespace(views=views)

    def prepare(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        self.called("prepare")
        slots: list[Any] = []
        for key in keys:
            new = key not in self.blocks and key not in self.pending
            slots.append(SimpleNamespace(key=key, view=memoryview(bytearray(nbytes))) if new else None)
            self.pending.add(key)
        return slots

    def complete(self, slots: Sequence[Any], durable: bool = False) -> None:
        self.called("complete")
        self.blocks.update({slot.key: bytes(slot.view) for slot in slots if slot is not None})

    def remember(self, path: str, keys: Sequence[bytes]) -> None:
        self.called("remember")
        self.paths[path] = list(keys)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def dict_store() -> DictStore:
    return DictStore()
