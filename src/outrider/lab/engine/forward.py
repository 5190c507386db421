"""The model's pass over one batch, and the pool that holds keys, values and expert choices of every token.

The batch is flat: all chunks' tokens in one row [1, T] with their positions. Transformers runs everything but the
attention; `attend` is registered as its attention function, writes K and V into the pool and lets each chunk look at
its own past only.

    pool    (blocks, layers, 2, block_tokens, kv_heads, head_dim)   a block is ONE contiguous piece of bytes
    routes  (blocks, block_tokens, moe_layers, top_k) int16         beside it; memory stores both, one after the other
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as nnf
from transformers import AttentionInterface, PreTrainedModel

from outrider.lab.engine.scheduler import Chunk

LAYOUT = "outrider-lab/1 kv[layer,2,token,kv_head,dim] routes[token,moe_layer,top_k]i16"


class Stopped(Exception):
    """The engine was told to stop in the middle of a pass."""


@dataclass(frozen=True)
class Past:
    """Where one chunk of the flat batch lies: rows [begin, end) attend to `past` earlier tokens and to themselves."""

    begin: int
    end: int
    past: int
    blocks: slice  # of Batch.gather: the blocks that hold tokens [0, past), or [0, past + 1) if it is one token long


@dataclass(frozen=True)
class Batch:
    """What `attend` needs beside q, k, v. The pool is seen as rows, so that each layer is one index addition away."""

    pool: torch.Tensor
    stop: threading.Event
    pasts: list[Past]
    write: torch.Tensor  # [T] row of each token in the pool seen as (blocks * layers * 2 * block_tokens, heads * dim)
    gather: torch.Tensor  # row of each past block in the pool seen as (blocks * layers * 2, block_tokens * heads * dim)
    scratch: torch.Tensor  # [2, past blocks, block_tokens * heads * dim] where K and V of the past are gathered


class Forward:
    """A model with `capacity` pool blocks. `run` is called from one thread; `rows` and `route_rows` by hook threads."""

    def __init__(self, model: PreTrainedModel, capacity: int, block_tokens: int) -> None:
        config = model.config
        self.model, self.block_tokens, self.stop = model, block_tokens, threading.Event()
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pool = torch.zeros(capacity, config.num_hidden_layers, 2, block_tokens, heads, dim, dtype=model.dtype)
        self.scratch = torch.empty(2, 0, 0)
        self.gates = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
        self.top_k: int = config.num_experts_per_tok if self.gates else 0
        self.routes = np.zeros((capacity, block_tokens, len(self.gates), self.top_k), np.int16)
        self.chosen: list[torch.Tensor] = []  # by layer, of the pass that is running
        for gate in self.gates:
            gate.register_forward_hook(lambda _module, _inputs, output: self.chosen.append(output[-1]))
        self.rows = self.pool.view(torch.uint8).view(capacity, -1).numpy()  # a block as bytes
        self.route_rows = self.routes.view(np.uint8).reshape(capacity, -1)
        AttentionInterface.register("outrider", attend)
        model.set_attn_implementation("outrider")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in memory: keys and values, then routes."""
        return int(self.rows.shape[1] + self.route_rows.shape[1])

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks, in place in the pool. Returns float32 logits, one row a chunk with `last`, in order."""
        ids = torch.tensor([t for c in chunks for t in c.request.tokens[c.start : c.start + c.count]])
        positions = torch.cat([torch.arange(c.start, c.start + c.count) for c in chunks])
        batch = self.lay_out(chunks, positions)
        self.chosen.clear()
        hidden = self.model.model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, batch=batch
        ).last_hidden_state[0]
        if self.gates:
            slots = batch.write.numpy() // (self.pool.shape[1] * 2 * self.block_tokens)
            self.routes[slots, positions.numpy() % self.block_tokens] = torch.stack(self.chosen, 1).numpy()
        ends = [past.end - 1 for past, chunk in zip(batch.pasts, chunks, strict=True) if chunk.last]
        return self.model.lm_head(hidden[ends]).float() if ends else torch.empty(0)

    def lay_out(self, chunks: Sequence[Chunk], positions: torch.Tensor) -> Batch:
        pasts, own, seen = [], [], []
        begin = blocks = 0
        for c in chunks:
            table = c.request.blocks
            own.append(torch.tensor(table)[positions[begin : begin + c.count] // self.block_tokens])
            past = c.start + 1 if c.count == 1 else c.start  # one token: it is written first and read with its past
            count = -(-past // self.block_tokens)
            seen += table[:count]
            pasts.append(Past(begin, begin + c.count, past, slice(blocks, blocks + count)))
            begin, blocks = begin + c.count, blocks + count
        stride = self.pool.shape[1] * 2
        write = torch.cat(own) * stride * self.block_tokens + positions % self.block_tokens
        if len(seen) > self.scratch.shape[1]:  # kept between passes: fresh pages cost more than the copy into them
            self.scratch = torch.empty(2, 2 * len(seen), self.pool[0, 0, 0].numel(), dtype=self.pool.dtype)
        gather = torch.tensor(seen, dtype=torch.long) * stride
        return Batch(self.pool, self.stop, pasts, write, gather, self.scratch[:, : len(seen)])

    def routes_of(self, blocks: Sequence[int], tokens: int) -> np.ndarray:
        """Expert ids int16 [tokens, layers, top_k] of a request's computed tokens."""
        return self.routes[list(blocks)].reshape(len(blocks) * self.block_tokens, *self.routes.shape[2:])[:tokens]


def attend(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: None, *,
    scaling: float, batch: Batch, **_unused: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one layer: q [1, H, T, D], k and v [1, G, T, D] -> [1, T, H, D]. Called by transformers."""
    if batch.stop.is_set():
        raise Stopped
    heads, groups, dim = q.shape[1], k.shape[1], q.shape[3]
    block_tokens, layer = batch.pool.shape[3], int(module.layer_idx)  # type: ignore[arg-type]
    tokens, pages = batch.pool.view(-1, groups * dim), batch.pool.view(-1, block_tokens * groups * dim)
    row = batch.write + layer * 2 * block_tokens
    tokens.index_copy_(0, row, k[0].transpose(0, 1).reshape(-1, groups * dim))
    tokens.index_copy_(0, row + block_tokens, v[0].transpose(0, 1).reshape(-1, groups * dim))
    if len(batch.gather):
        page = batch.gather + layer * 2
        past_k = torch.index_select(pages, 0, page, out=batch.scratch[0])
        past_v = torch.index_select(pages, 0, page + 1, out=batch.scratch[1])
    out = torch.empty(q.shape[2], heads, dim, dtype=q.dtype)
    for p in batch.pasts:
        q_own = q[:, :, p.begin : p.end]
        if p.past:
            shape = (-1, groups, dim)
            k_past = past_k[p.blocks].view(shape)[: p.past].transpose(0, 1)[None]
            v_past = past_v[p.blocks].view(shape)[: p.past].transpose(0, 1)[None]
        if p.end - p.begin == 1:  # decoding: query heads that share a KV head become rows of one query
            answer = nnf.scaled_dot_product_attention(q_own.reshape(1, groups, -1, dim), k_past, v_past, scale=scaling)
            out[p.begin] = answer.reshape(heads, dim)
            continue
        k_own, v_own = k[:, :, p.begin : p.end], v[:, :, p.begin : p.end]
        answer, weight = flash(q_own, spread(k_own, heads), spread(v_own, heads), True, scaling)
        if p.past:  # the chunk's own triangle and its past are apart, merged by their softmax weights (log-sum-exp)
            before, weight_before = flash(q_own.reshape(1, groups, -1, dim), k_past, v_past, False, scaling)
            share = torch.sigmoid(weight_before.reshape(weight.shape) - weight)[..., None].to(q.dtype)
            answer = answer + (before.reshape(answer.shape) - answer) * share
        out[p.begin : p.end] = answer[0].transpose(0, 1)
    return out[None], None


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_dot_product_attention` calls on a CPU, with the log-sum-exp [1, H, T] that it keeps to itself."""
    answer, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return answer, weight


def spread(kv: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat each KV head for the query heads that share it: [1, G, T, D] -> [1, H, T, D]."""
    _, groups, tokens, dim = kv.shape
    return kv[:, :, None].expand(1, groups, heads // groups, tokens, dim).reshape(1, heads, tokens, dim)
