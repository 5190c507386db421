"""What this machine copies and computes: memcpy, an expert into a slot, an expert's products. Called by benchmark.py.

On one thread, as a mover copies beside a rank that computes: more threads measure who else is busy. The device part
(pinned memory) is written and has never run: there was no device.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from outrider.experts.cost import Shape

Timed = Callable[[Callable[[], Any]], float]  # median seconds of a call
BESIDE_BYTES = 1 << 28  # copied from and to: beyond the caches
ROWS = 512  # tokens of an expert in one product


def describe() -> dict[str, Any]:
    """Whose figures these are: name, processor, cores that this process may use, versions; load_average: processes
    that wanted to run in the last minute, before this began."""
    import torch  # heavy, and an optional dependency of the package

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "name": platform.node(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside, as before afterwards."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def copies(shape: Shape, timed_s: Timed) -> dict[str, Any]:
    """Bytes/s, each byte counted once: numpy's copy of a large array; experts that lie staged in host memory, one after
    the other, into slots on the CPU (torch), and on a device if there is one."""
    import torch

    numbers = shape.expert_bytes // shape.width
    many = max(2, BESIDE_BYTES // shape.expert_bytes)
    staged, slots = (torch.full((many, numbers), value, dtype=torch.bfloat16) for value in (1.0, 0.0))

    def into_slots() -> None:
        for slot, expert in zip(slots, staged, strict=True):
            slot.copy_(expert)

    with one_thread():
        slot_s = timed_s(into_slots) / many
    source, target = staged.view(torch.uint8).numpy(), slots.view(torch.uint8).numpy()
    memcpy_s = timed_s(lambda: np.copyto(target, source))
    return {
        "memcpy_bytes_s": source.nbytes / memcpy_s,
        "host_to_slot_bytes_s": shape.expert_bytes / slot_s,
        "host_to_device": _to_device(staged, timed_s) if torch.cuda.is_available() else None,
    }


def _to_device(staged: Any, timed_s: Timed) -> dict[str, Any]:
    """From pinned memory into one slot on the device, back to back on one stream, until the last has arrived."""
    import torch

    pinned = staged.pin_memory()
    slot = torch.zeros(staged.shape[1], dtype=staged.dtype, device="cuda")

    def into_slot() -> None:
        for expert in pinned:
            slot.copy_(expert, non_blocking=True)
        torch.cuda.synchronize()

    return {"pinned_bytes_s": pinned.numel() * pinned.element_size() / timed_s(into_slot)}


def compute(shape: Shape, timed_s: Timed) -> dict[str, Any]:
    """flop/s of down(silu(gate(x)) * up(x)) for ROWS tokens of one expert on the CPU."""
    import torch

    result: dict[str, Any] = {"rows": ROWS, "threads": 1}
    flops = 6 * shape.hidden * shape.inner * ROWS
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones((ROWS, shape.hidden), dtype=dtype) / shape.hidden
        gate_up = torch.ones((2 * shape.inner, shape.hidden), dtype=dtype) / shape.hidden
        down = torch.ones((shape.hidden, shape.inner), dtype=dtype) / shape.inner

        def forward(x: Any = x, gate_up: Any = gate_up, down: Any = down) -> Any:
            gate, up = (x @ gate_up.T).chunk(2, dim=1)
            return (torch.nn.functional.silu(gate) * up) @ down.T

        with torch.inference_mode(), one_thread():
            result[f"{str(dtype).removeprefix('torch.')}_flop_s"] = flops / timed_s(forward)
    return result
