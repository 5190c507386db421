"""Outrider's memory under vLLM: the KV connector that `--kv-transfer-config` names. Live; needs vllm.

    {"kv_connector": "OutriderConnector", "kv_connector_module_path": "outrider.memory.adapters.vllm",
     "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
     "kv_connector_extra_config": {"socket": "/run/outrider.sock"}}

vLLM builds two of it, one in the scheduler (`asking.py`) and one in the worker (`copying.py`); here its hooks are
handed on. Blocks travel whole, as opaque bytes. What would give wrong answers, or lose some, is refused at the start.
"""

import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from outrider.errors import CallerError
from outrider.memory import Store, connect
from outrider.memory.adapters import weights
from outrider.memory.adapters.asking import Asking
from outrider.memory.adapters.copying import Copying, Results
from outrider.memory.adapters.counters import OutriderMetrics, OutriderStats
from outrider.memory.adapters.orders import Orders
from outrider.memory.adapters.pages import Pages
from outrider.memory.adapters.reach import Reach
from outrider.memory.keys import KeySpace

SUPPORTED = ("0.32",)  # whose interface was read and run call by call
WHOLE = ("FullAttentionSpec", "MLAAttentionSpec")  # caches that keep every block of a request
PLAIN = ("auto", "float16", "bfloat16")  # vLLM has told by now what `auto` stands for, where it is none of these
CALL_S = 2.0  # one exchange with memory
LOG = logging.getLogger("vllm.outrider")  # under vLLM's name, so that vLLM's handlers show it


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kv_connector_extra_config`.

    socket            of `outrider memory serve`; it may start later, and go and come back
    salt              tenant: engines with another salt share no block
    weights           digest of the weights, where they cannot be read from the model's files
    patience_s        what a load or save may take, besides 50 MB/s, before it is given up
    token_s           seconds that computing one token takes: what a block is worth to memory's planner
    untested_version  go on under a vLLM that this connector was not tested with
    """

    socket: str
    salt: str = ""
    weights: str = ""
    patience_s: float = 5.0
    token_s: float = 0.001
    untested_version: bool = False


@dataclass
class Bound(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not installed where mypy runs
    """One step's orders, on their way to the worker."""

    orders: Orders


@dataclass
class Layout(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """How the worker's blocks are laid out, told once to the scheduler's half, which makes the keys."""

    layout: str


class OutriderConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Either half, by `role`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config, self._blocks = vllm_config, kv_cache_config
        self._settings = read(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_version(vllm.__version__, self._settings.untested_version)
        check(vllm_config, kv_cache_config)
        self._asking: Asking | None = None
        self._copying: Copying | None = None
        self._results = Results()
        self._renewed = 0
        half = "scheduler" if role == KVConnectorRole.SCHEDULER else "worker"
        self._reach = Reach(dial(self._settings.socket, half), self._settings.socket)
        if role == KVConnectorRole.SCHEDULER:
            cache = vllm_config.cache_config
            self._asking = Asking(
                self._reach,
                cache.block_size,
                bool(cache.enable_prefix_caching),
                self._settings.patience_s,
                self._settings.token_s,
            )
            self._weights = self._settings.weights or weights_of(vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is dropped costs a later load, nothing else

    # -- the scheduler's half

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Comes once, when the worker has its KV cache: from here on there are keys."""
        (layout,) = (told.layout for told in metadata.values() if isinstance(told, Layout))
        self._space(layout)

    def _space(self, layout: str) -> None:
        assert self._asking is not None
        model, cache = self._config.model_config, self._config.cache_config
        space = KeySpace(
            model=self._weights,
            dtype=f"{model.dtype} {cache.cache_dtype}",
            layout=layout,
            block_tokens=cache.block_size,
            salt=self._settings.salt,
            adapter=numbers_of(model) + (f" renewed {os.urandom(8).hex()}" if self._renewed else ""),
        )
        self._asking.renew(space)
        LOG.info("Outrider: blocks of %d tokens, key space %s.", cache.block_size, space.root().hex())

    def on_new_request(self, request: Any) -> None:
        if self._asking:
            self._asking.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._asking is not None
        matched = self._asking.matched(request, num_computed_tokens)
        return matched, bool(matched)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._asking is not None
        ids = blocks.get_block_ids()[0] if num_external_tokens else []
        here = len(ids) - len(blocks.get_unhashed_block_ids()) if num_external_tokens else 0
        self._asking.allocated(request, ids, here, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._asking is not None
        state = scheduler_output.kv_connector_block_state

        def blocks_of(request_id: str) -> list[int]:
            ids: list[int] = state.get_block_ids(request_id)[0]
            return ids

        preempted = scheduler_output.preempted_req_ids or ()
        return Bound(self._asking.ordered(scheduler_output.num_scheduled_tokens, blocks_of, preempted))

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._asking is not None
        self._asking.landed(connector_output.finished_recving or (), connector_output.invalid_block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._asking is not None
        return self._asking.finished(request, block_ids), None

    def reset_cache(self) -> bool:
        """Whoever resets external caches has changed the weights, or wants to compute anew: new keys from here on."""
        if self._asking and self._asking.space:
            self._renewed += 1
            self._space(self._asking.space.layout)
        return True

    # -- the worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pages = Pages(kv_caches, self._blocks.num_blocks, about(self._config, self._blocks, kv_caches))
        self._copying = Copying(pages, self._reach, self._settings.patience_s)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return Layout(self._copying.pages.layout) if self._copying else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._copying and isinstance(kv_connector_metadata, Bound):
            self._copying.settle(kv_connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Attention metadata may be None: loads are none of the forward pass's business."""
        if self._copying and isinstance(self._connector_metadata, Bound):
            self._copying.load(self._connector_metadata.orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All loads end between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the pass."""

    def wait_for_save(self) -> None:
        if self._copying and isinstance(self._connector_metadata, Bound):
            self._copying.save(self._connector_metadata.orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._copying:
            self._results = self._copying.results()
        return self._results.sent or None, self._results.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._results.bad_blocks = self._results.bad_blocks, set()
        return bad

    # -- both

    def shutdown(self) -> None:
        for half in (self._asking, self._copying):
            if half is not None:
                half.close()

    def get_kv_connector_stats(self) -> OutriderStats | None:
        counts = self._copying.take_counts() if self._copying else {}
        if unanswered := self._reach.take_gone():
            counts["unanswered_calls"] = unanswered
        return OutriderStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> OutriderStats:
        return OutriderStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> OutriderMetrics:
        return OutriderMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


# -- what must be known, or refused, at the start


def read(extra: dict[str, Any]) -> Settings:
    try:
        return msgspec.convert(extra, Settings)
    except msgspec.ValidationError as error:
        names = ", ".join(Settings.__struct_fields__)
        raise CallerError(f"kv_connector_extra_config: {error}. It takes {names}; socket is needed.") from error


def check_version(version: str, anyway: bool) -> None:
    """CallerError under a vLLM that was not tested; a warning if told to go on."""
    if version.startswith(tuple(f"{known}." for known in SUPPORTED)):
        return
    what = f"Outrider's connector was tested with vLLM {', '.join(SUPPORTED)}, and this is {version}"
    if not anyway:
        raise CallerError(
            f"{what}: its interface may differ. Install a tested one, or, after a trial, set "
            '"untested_version": true in kv_connector_extra_config.'
        )
    LOG.warning("%s. Going on, as untested_version is set; blocks are shared with this version alone.", what)


def check(config: Any, blocks: Any) -> None:
    """CallerError, in one sentence, for whatever would cost answers or give wrong ones."""
    transfer, cache, parallel = config.kv_transfer_config, config.cache_config, config.parallel_config
    kinds = [type(group.kv_cache_spec).__name__ for group in blocks.kv_cache_groups]
    hashed = blocks.hash_block_size or cache.block_size
    for wrong, why in (
        (
            transfer.kv_load_failure_policy != "recompute",
            f'kv_load_failure_policy is "{transfer.kv_load_failure_policy}", which ends a request with an error when '
            'a block cannot be loaded; set "recompute"',
        ),
        (transfer.kv_role != "kv_both", f'kv_role is "{transfer.kv_role}"; set "kv_both"'),
        (
            cache.prefix_caching_hash_algo not in ("sha256", "sha256_cbor"),
            f"block hashes by {cache.prefix_caching_hash_algo} differ between processes and can be made to collide; "
            "set --prefix-caching-hash-algo sha256",
        ),
        (
            parallel.world_size > 1 or parallel.decode_context_parallel_size > 1,
            f"{parallel.world_size} ranks hold parts of each block, and a hit would have to be one on all of them, "
            "which it does not ask yet; run one rank an engine",
        ),
        (
            len(kinds) != 1 or kinds[0] not in WHOLE,
            f"the model's KV cache has {len(kinds)} groups ({', '.join(kinds)}): windows and states need other rules "
            "than whole prefixes; it serves models with full attention alone",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding has a draft whose blocks lag behind; leave --speculative-config out",
        ),
        (
            str(cache.cache_dtype) not in PLAIN,
            f"a KV cache of {cache.cache_dtype} may have scales that are not in its blocks; set --kv-cache-dtype auto",
        ),
        (
            hashed != cache.block_size,
            f"blocks of {cache.block_size} tokens are hashed in pieces of {hashed}; set --block-size {hashed}",
        ),
    ):
        if wrong:
            raise CallerError(f"Outrider's connector: {why}.")


def dial(socket: str, half: str) -> Callable[[], Store]:
    return lambda: connect(socket, timeout_s=CALL_S, name=f"vllm-{half}-{os.getpid()}")


def weights_of(config: Any) -> str:
    """Digest of what the engine loaded. CallerError where that is not the content of files."""
    model = config.model_config
    if config.load_config.load_format == "dummy":
        raise CallerError(
            "Outrider's connector: --load-format dummy makes weights up, which no digest of files tells apart; "
            'load real ones, or give "weights" in kv_connector_extra_config.'
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider" / "weights"
    return weights.digest(weights.folder_of(model.model, model.revision), cache)


def numbers_of(model: Any) -> str:
    """Digest of what else decides the numbers: the configuration as overridden, and how weights are quantised.

    The longest context too: with it vLLM chooses among rotary factors (Phi-3) and temperatures (Llama 4).
    """
    shape = json.loads(model.hf_config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        shape.pop(name, None)
    said = json.dumps([shape, str(model.quantization), model.max_model_len], sort_keys=True)
    return blake2b(said.encode(), digest_size=16).hexdigest()


def about(config: Any, blocks: Any, kv_caches: dict[str, torch.Tensor]) -> str:
    """What decides the order of a block's bytes, besides its shape: version, layout, device, kernels, instructions."""
    layers = [config.compilation_config.static_forward_context.get(name) for name in kv_caches]
    kernels = sorted({f"{type(getattr(layer, 'impl', None)).__name__} {getattr(layer, 'isa', '')}" for layer in layers})
    device = next(iter(kv_caches.values())).device.type
    chip = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device
    return f"vllm {vllm.__version__} {blocks.kv_cache_layout} {chip} {', '.join(kernels)}"
