"""An engine's KV tensors as whole blocks of opaque bytes, copied in and out. Live: torch, and the device's streams.

A block's bytes are those of every layer, in the order the layers were registered. Nothing in them is understood: the
CPU kernel packs tokens across a block for its instruction set, so that only whole blocks mean anything. `layout` says
how they are ordered, and belongs in the key.

    host tensors     copied straight between the tensor and memory's arena
    device tensors   over pinned staging on a stream of the copying thread, after what was launched before
"""

import threading
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from outrider.errors import CallerError

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16: bits are bits


class Pages:
    """KV tensors by layer name, each with `num_blocks` blocks; `about` is whatever else decides the bytes' order."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], num_blocks: int, about: str) -> None:
        seen: dict[tuple[int, torch.Size], torch.Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.dtype.itemsize not in WORDS:
                raise CallerError(f"Outrider's connector: layer {name} has KV of {tensor.dtype}, which it cannot copy.")
            rows = by_block(name, tensor, num_blocks)
            seen.setdefault((rows.data_ptr(), rows.shape), rows)  # layers that share their KV are copied once
        self._rows = list(seen.values())
        self._sizes = [rows[0].numel() * rows.dtype.itemsize for rows in self._rows]
        self.block_bytes = sum(self._sizes)
        shapes = [(tuple(rows.shape[1:]), str(rows.dtype)) for rows in self._rows]
        self.layout = f"{about} {blake2b(repr(shapes).encode(), digest_size=8).hexdigest()}"
        self._device = self._rows[0].device
        self._on_host = self._device.type == "cpu"
        self._parts: list[tuple[Any, int, int]] = []  # each layer's rows, and where its bytes lie in a block
        for rows, size, stop in zip(self._rows, self._sizes, np.cumsum(self._sizes).tolist(), strict=True):
            bits = rows.view(WORDS[rows.dtype.itemsize])
            self._parts.append((bits.numpy() if self._on_host else bits, stop - size, stop))
        self._lane = threading.local()

    def fence(self) -> Any:
        """A moment of the device's queue: what was launched before it must be over before a block is touched."""
        if self._on_host:
            return None
        moment = torch.Event(self._device)
        moment.record()
        return moment

    def read(self, block: int, into: memoryview, after: Any) -> None:
        """Copy a block's bytes out of the tensors, `after` a fence."""
        data = np.frombuffer(into, np.uint8)
        if self._on_host:
            for rows, start, stop in self._parts:
                data[start:stop] = rows[block].reshape(-1).view(np.uint8)
            return
        staging = self._staging(after)
        with self._lane.stream:
            for rows, start, stop in self._parts:
                staging[start:stop].view(rows.dtype).view(rows.shape[1:]).copy_(rows[block], non_blocking=True)
        self._lane.stream.synchronize()
        data[:] = staging.numpy()

    def write(self, block: int, data: memoryview, after: Any) -> None:
        """Copy a block's bytes into the tensors, `after` a fence; they are there when this returns."""
        source = np.frombuffer(data, np.uint8)
        if self._on_host:
            for rows, start, stop in self._parts:
                rows[block] = source[start:stop].view(rows.dtype).reshape(rows.shape[1:])
            return
        staging = self._staging(after)
        staging.numpy()[:] = source
        with self._lane.stream:
            for rows, start, stop in self._parts:
                rows[block].copy_(staging[start:stop].view(rows.dtype).view(rows.shape[1:]), non_blocking=True)
        self._lane.stream.synchronize()

    def _staging(self, after: Any) -> torch.Tensor:
        """This thread's pinned buffer; its stream waits for `after`."""
        if not hasattr(self._lane, "stream"):
            self._lane.stream = torch.Stream(self._device)
            self._lane.buffer = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True)
        if after is not None:
            self._lane.stream.wait_event(after)
        buffer: torch.Tensor = self._lane.buffer
        return buffer


def by_block(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A view of `tensor` whose first axis is the block. CallerError where it has no such axis."""
    if tensor.dim() > 1 and tensor.shape[0] and tensor.shape[0] % num_blocks == 0:
        return tensor.reshape(num_blocks, -1, *tensor.shape[1:])  # kernels may split the blocks
    if tensor.dim() > 2 and tensor.shape[1] == num_blocks:
        return tensor.movedim(1, 0)  # keys and values apart
    shape = tuple(tensor.shape)
    raise CallerError(
        f"Outrider's connector: layer {name} has KV of shape {shape}, with no axis of {num_blocks} blocks."
    )
