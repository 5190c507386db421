"""vLLM's real scheduler, block pool and connector hooks around a model that only remembers: no weights, no waiting.

The pretended model writes into each KV position a number made of all tokens up to it, and before it computes it reads
every position that it is told is there. A block that was loaded wrong, or overwritten while it was copied, is found at
once. Hooks come in the order of vLLM's own model runner.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from outrider.memory.adapters.vllm import OutriderConnector

BLOCK = 16  # tokens
LAYERS = ("layer.0", "layer.1")
NUMBERS = 4  # a position has in each layer
HASH = get_hash_fn_by_name("sha256")
init_none_hash(HASH)
hasher = get_request_block_hasher(BLOCK, HASH)
names = count()


def config(model: Path, socket: Path, **options: Any) -> VllmConfig:
    """What vLLM makes of a command line; `extra` are options of the connector, `transfer` of the KV transfer."""
    extra = {"socket": str(socket), "patience_s": 2.0, "weights": "pretended"} | options.pop("extra", {})
    transfer = {
        "kv_connector": "OutriderConnector",
        "kv_connector_module_path": "outrider.memory.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    } | options.pop("transfer", {})
    settings = {
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK,
        "dtype": "float32",
        "enforce_eager": True,
        "async_scheduling": False,
        "kv_transfer_config": transfer,
    }
    return EngineArgs(model=str(model), **(settings | options)).create_engine_config()


def blocks_config(num_blocks: int) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=NUMBERS, dtype=torch.float32)
    tensors = [KVCacheTensor(num_blocks * BLOCK * NUMBERS * 4, [name], 0, BLOCK * NUMBERS * 4) for name in LAYERS]
    return KVCacheConfig(num_blocks, tensors, [KVCacheGroupSpec(list(LAYERS), spec)], hash_block_size=BLOCK)


class Engine:
    """One engine: `vllm_config` from `config`, `num_blocks` of KV cache, one of which vLLM keeps for itself."""

    def __init__(self, vllm_config: VllmConfig, num_blocks: int = 64) -> None:
        self.config = vllm_config
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        blocks = blocks_config(num_blocks)
        with set_current_vllm_config(vllm_config):
            self.scheduler = Scheduler(
                vllm_config=vllm_config,
                kv_cache_config=blocks,
                structured_output_manager=StructuredOutputManager(vllm_config),
                block_size=BLOCK,
                hash_block_size=BLOCK,
                log_stats=True,
            )
            self.worker = OutriderConnector(vllm_config, KVConnectorRole.WORKER, blocks)
        self.kv = {name: torch.zeros(num_blocks, 1, BLOCK, NUMBERS) for name in LAYERS}
        self.worker.register_kv_caches(self.kv)
        told = self.worker.get_handshake_metadata()
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): told})
        self.outputs: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}  # tokens that the model was run on
        self.reasons: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def add(self, prompt: list[int], name: str = "", max_tokens: int = 4, **more: Any) -> Request:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=more.pop("extra", None)
        )
        request = Request(name or f"r{next(names)}", list(prompt), params, None, block_hasher=hasher, **more)
        self.outputs[request.request_id], self.computed[request.request_id] = [], 0
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """One turn of vLLM's engine loop."""
        planned = self.scheduler.schedule()
        worker, done = self.worker, KVConnectorOutput()
        worker.handle_preemptions(planned.kv_connector_metadata)
        worker.bind_connector_metadata(planned.kv_connector_metadata)
        sampled = self.forward(planned.num_scheduled_tokens)
        worker.start_load_kv(SimpleNamespace(attn_metadata=None))
        worker.wait_for_save()
        results = worker.get_transfer_results(planned.finished_req_ids)
        done.finished_sending, done.finished_recving = results.finished_sending, results.finished_recving
        done.failed_recving = results.failed_recving
        done.invalid_block_ids = worker.get_block_ids_with_load_errors()
        if stats := worker.get_kv_connector_stats():
            self.counts.update(stats.data)
        worker.clear_connector_metadata()
        ids = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(
            ids, {name: i for i, name in enumerate(ids)}, [sampled[name] for name in ids], kv_connector_output=done
        )
        for said in self.scheduler.update_from_output(planned, output).values():
            for each in said.outputs:
                self.outputs[each.request_id] += each.new_token_ids
                if each.finish_reason is not None:
                    self.reasons[each.request_id] = each.finish_reason
        if not ids:
            time.sleep(0.001)

    def forward(self, scheduled: dict[str, int]) -> dict[str, list[int]]:
        """Check what is said to be there, write what is computed, and say the next token where all are known."""
        sampled: dict[str, list[int]] = {}
        for name, tokens in scheduled.items():
            request = self.scheduler.requests[name]
            blocks = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            start, known = request.num_computed_tokens - tokens, list(request.all_token_ids)
            expected = chain(known[: start + tokens])
            for layer, kv in self.kv.items():
                rows = kv[blocks, 0].reshape(-1, NUMBERS)
                there = expected[:start] + LAYERS.index(layer)
                assert torch.equal(rows[:start], there), f"{name}: KV of {layer} is not that of its tokens"
                for position in range(start, start + tokens):
                    kv[blocks[position // BLOCK], 0, position % BLOCK] = expected[position] + LAYERS.index(layer)
            self.computed[name] += tokens
            whole = start + tokens == request.num_tokens
            sampled[name] = [int(expected[start + tokens - 1, 0]) % 1000] if whole else []
        return sampled

    def run(self, within_s: float = 20.0) -> None:
        """Until nothing is left to do."""
        by_s = time.monotonic() + within_s
        while self.scheduler.has_requests():
            assert time.monotonic() < by_s, f"still there: {[str(r.status) for r in self.scheduler.requests.values()]}"
            self.step()

    def until(self, true: Any, within_s: float = 10.0) -> None:
        by_s = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < by_s, [str(r.status) for r in self.scheduler.requests.values()]
            self.step()

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def ask(self, prompt: list[int], **more: Any) -> tuple[list[int], int]:
        """Run one request alone: its tokens, and how many the model was run on."""
        name = self.add(prompt, **more).request_id
        self.run()
        return self.outputs[name], self.computed[name]

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def forget(self) -> None:
        """As /reset_prefix_cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.connector.shutdown()


def chain(tokens: list[int]) -> torch.Tensor:
    """A number for each position that depends on all tokens up to it."""
    digest, numbers = blake2b(digest_size=4), []
    for token in tokens:
        digest.update(token.to_bytes(8, "little", signed=True))
        numbers.append(int.from_bytes(digest.digest()[:3], "little"))
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, NUMBERS)


def answer(prompt: list[int], max_tokens: int = 4) -> list[int]:
    """What any engine must say to `prompt`."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(chain(tokens)[-1, 0]) % 1000)
    return tokens[len(prompt) :]


@contextmanager
def engine(vllm_config: VllmConfig, num_blocks: int = 64) -> Iterator[Engine]:
    made = Engine(vllm_config, num_blocks)
    try:
        yield made
    finally:
        made.close()
