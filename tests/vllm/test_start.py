"""What would cost answers is refused at the start, in one sentence; and what makes a key is content, never a name."""

import copy
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from pretended import BLOCK, answer, blocks_config, config, engine
from servers import Memory
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec

from outrider.errors import CallerError
from outrider.memory.adapters import weights
from outrider.memory.adapters.asking import path_of
from outrider.memory.adapters.pages import Pages
from outrider.memory.adapters.vllm import OutriderConnector, check_version, numbers_of, weights_of

NOWHERE = Path("/nowhere/m.sock")


@pytest.fixture(scope="module")
def good(smollm2: Path) -> Any:
    return config(smollm2, NOWHERE)


def start(vllm_config: Any, blocks: Any = None) -> None:
    with set_current_vllm_config(vllm_config):
        OutriderConnector(vllm_config, KVConnectorRole.WORKER, blocks or blocks_config(8)).shutdown()


def changed(good: Any, part: str, **fields: Any) -> Any:
    """A copy of the configuration with some fields of one part changed."""
    other = copy.copy(good)
    setattr(other, part, copy.copy(getattr(good, part)))
    for name, value in fields.items():
        setattr(getattr(other, part), name, value)
    return other


def test_a_good_configuration_starts_without_a_server(good: Any) -> None:
    start(good)


@pytest.mark.parametrize(
    ("part", "fields", "mend"),
    [
        ("kv_transfer_config", {"kv_load_failure_policy": "fail"}, "recompute"),
        ("kv_transfer_config", {"kv_role": "kv_consumer"}, "kv_both"),
        ("kv_transfer_config", {"kv_connector_extra_config": {"sokcet": "/x"}}, "socket"),
        ("kv_transfer_config", {"kv_connector_extra_config": {"socket": "/x", "patience": 1}}, "patience_s"),
        ("cache_config", {"prefix_caching_hash_algo": "xxhash"}, "sha256"),
        ("cache_config", {"cache_dtype": "fp8"}, "auto"),
        ("cache_config", {"cache_dtype": "int8_per_token_head"}, "auto"),
        ("cache_config", {"block_size": 2 * BLOCK}, "--block-size"),
        ("parallel_config", {"world_size": 2}, "one rank an engine"),
    ],
)
def test_refused_in_a_sentence_that_says_how_to_mend_it(good: Any, part: str, fields: Any, mend: str) -> None:
    with pytest.raises(CallerError) as refused:
        start(changed(good, part, **fields))
    assert mend in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_policy_that_loses_answers_is_vllms_own_default(smollm2: Path) -> None:
    """A user who leaves it out is told, not surprised later."""
    left_out = config(smollm2, NOWHERE, transfer={"kv_load_failure_policy": "fail"})
    default = type(left_out.kv_transfer_config)().kv_load_failure_policy
    assert default == "fail"
    with pytest.raises(CallerError, match="recompute"):
        start(left_out)


def test_windows_groups_and_drafts_are_refused(good: Any) -> None:
    window = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32, sliding_window=4 * BLOCK
    )
    alone, both = blocks_config(8), blocks_config(8)
    both.kv_cache_groups.append(KVCacheGroupSpec(["w"], window))
    alone.kv_cache_groups[0] = KVCacheGroupSpec(["w"], window)
    for blocks in (alone, both):
        with pytest.raises(CallerError, match="full attention alone"):
            start(good, blocks)
    draft = copy.copy(good)
    draft.speculative_config = SimpleNamespace()
    with pytest.raises(CallerError, match="speculative"):
        start(draft)


def test_an_unknown_version_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    check_version(vllm.__version__, False)
    for version in ("0.33.0", "0.31.9", "1.0.0", "0.320.0"):
        with pytest.raises(CallerError, match="untested_version") as refused:
            check_version(version, False)
        assert version in str(refused.value) and "0.32" in str(refused.value)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("vllm.outrider").addHandler(handler)
    check_version("0.33.0", True)
    logging.getLogger("vllm.outrider").removeHandler(handler)
    assert "tested with vLLM 0.32, and this is 0.33.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_id", "path"),
    [
        ("chatcmpl-call-0123456789abcdef-1a2b3c4d", "call-0123456789abcdef"),
        ("chatcmpl-call-1234567890123456-12345678", "call-1234567890123456"),
        ("cmpl-call-1234567890123456-0-1a2b3c4d", "call-1234567890123456"),
        ("0_chatcmpl-a-b-c-1a2b3c4d", "a-b-c"),
        ("chatcmpl-call-0123456789abcdef", "call-0123456789abcdef"),
        ("x", "x"),
    ],
)
def test_the_path_is_the_callers_request_id(request_id: str, path: str) -> None:
    assert path_of(request_id) == path


def made(folder: Path, data: bytes = b"weights" * 1000, config: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(config)
    return folder


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    cache, one = tmp_path / "cache", made(tmp_path / "a")
    digest = weights.digest(one, cache)
    assert digest == weights.digest(made(tmp_path / "b"), cache), "a name is no content"
    assert digest != weights.digest(made(tmp_path / "c", b"weights" * 999 + b"weighty"), cache)
    assert digest != weights.digest(made(tmp_path / "d", config='{"a": 1}'), cache)
    state = (one / "model.safetensors").stat()
    (one / "model.safetensors").write_bytes(b"strange" * 1000)  # the same name, size and time: another content
    os.utime(one / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest != weights.digest(one, cache)


def test_weights_that_did_not_change_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, folder = tmp_path / "cache", made(tmp_path / "a")
    digest = weights.digest(folder, cache)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_read", lambda path: pytest.fail(f"{path} is read again"))
        assert weights.digest(folder, cache) == digest
    for note in cache.iterdir():
        note.write_bytes(b"")  # torn by a crash
    assert weights.digest(folder, cache) == digest
    (tmp_path / "file").touch()
    assert weights.digest(folder, tmp_path / "file" / "no-cache") == digest


def test_weights_of_a_hubs_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    snapshot = made(hub / "models--some--model" / "snapshots" / "abc")
    (hub / "models--some--model" / "refs").mkdir()
    (hub / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert weights.folder_of("some/model", None) == snapshot
    with pytest.raises(CallerError, match="weights"):
        weights.folder_of("some/other", None)
    with pytest.raises(CallerError, match="no weights"):
        weights.digest(tmp_path / "hub" / "models--some--model" / "refs", tmp_path)


def test_made_up_weights_are_refused(good: Any) -> None:
    with pytest.raises(CallerError, match="dummy"):
        weights_of(changed(good, "load_config", load_format="dummy"))


def test_a_changed_shape_is_another_model(smollm2: Path, good: Any) -> None:
    """So is another longest context: vLLM chooses rotary factors and temperatures by it."""
    same = config(smollm2, NOWHERE, max_num_seqs=2, max_num_batched_tokens=512)
    assert numbers_of(same.model_config) == numbers_of(good.model_config)
    for other in ({"hf_overrides": {"rope_theta": 5.0}}, {"max_model_len": 256}):
        changed_config = config(smollm2, NOWHERE, **other)
        assert numbers_of(changed_config.model_config) != numbers_of(good.model_config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(5, 3, 8, 4), (2, 5, 8, 4), (10, 3, 8, 4)])
def test_pages_move_whole_blocks_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Blocks first; keys and values apart; a kernel that splits each block in two."""
    bits = {name: torch.randint(0, 256, (*shape[:-1], 4 * dtype.itemsize), dtype=torch.uint8) for name in "ab"}
    tensors = {name: raw.view(dtype) for name, raw in bits.items()}
    pages = Pages(tensors | {"shares a's": tensors["a"]}, 5, "test")
    assert pages.block_bytes == 2 * torch.Size(shape).numel() * dtype.itemsize // 5
    before = {name: raw.clone() for name, raw in bits.items()}
    stored = [memoryview(bytearray(pages.block_bytes)) for _ in range(5)]
    for block, view in enumerate(stored):
        pages.read(block, view, pages.fence())
    for raw in bits.values():
        raw.zero_()
    for block, view in enumerate(stored):
        pages.write(block, view.toreadonly(), pages.fence())
    assert all(torch.equal(bits[name], before[name]) for name in bits)


def test_the_layout_tells_shapes_apart_and_strange_ones_are_refused() -> None:
    layouts = {
        Pages({"a": torch.zeros(4, 2, 8, heads, dtype=dtype)}, 4, about).layout
        for heads, dtype, about in ((3, torch.float32, "v"), (6, torch.bfloat16, "v"), (3, torch.float32, "w"))
    }
    assert len(layouts) == 3
    with pytest.raises(CallerError, match="no axis of 4 blocks"):
        Pages({"a": torch.zeros(3, 3, 8, 8)}, 4, "test")


def test_the_key_space_binds_what_the_bytes_depend_on(smollm2: Path, memory: Memory) -> None:
    with engine(config(smollm2, memory.socket, extra={"weights": ""})) as running:
        assert running.ask(list(range(40)))[0] == answer(list(range(40)))
        space = running.scheduler.connector._asking.space
    assert space.model == weights.digest(smollm2, Path.home() / ".cache" / "outrider" / "weights")
    assert space.block_tokens == BLOCK
    assert "float32" in space.dtype
    assert vllm.__version__ in space.layout
    assert torch.backends.cpu.get_cpu_capability() in space.layout
