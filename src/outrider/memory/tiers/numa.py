"""NUMA nodes without CPUs, as CXL memory shows itself after `daxctl reconfigure-device --mode=system-ram`. Live.

`mbind` is called through the C library's `syscall`, as the bindings that exist are unmaintained.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
from pathlib import Path

from outrider.errors import CallerError
from outrider.memory.tiers.spec import show_bytes

SYSFS_NODES = Path("/sys/devices/system/node")
MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
MPOL_BIND, MPOL_MF_STRICT, MPOL_MF_MOVE = 2, 1, 2


def nodes(which: str) -> list[int]:
    """Numbers of the nodes that `has_memory` or `has_cpu`, as the kernel lists them; none where it lists nothing."""
    try:
        text = (SYSFS_NODES / which).read_text().strip()
    except OSError:
        return []
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def without_cpus() -> list[int]:
    """Nodes that have memory and no CPU."""
    busy = nodes("has_cpu")
    return [node for node in nodes("has_memory") if node not in busy]


def free_bytes(node: int) -> int:
    """What is free there: 0 where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in (SYSFS_NODES / f"node{node}" / "meminfo").read_text().splitlines():
            if " MemFree:" in line:
                return int(line.split()[-2]) * 1024
    return 0


def check_node(node: int, size_bytes: int) -> None:
    """CallerError, one sentence, where `node` is no memory expander, or has less free: first touch would kill us."""
    fit = without_cpus()
    if node in fit:
        if size_bytes > (here := free_bytes(node)):
            asked, free = show_bytes(size_bytes), show_bytes(here)
            raise CallerError(f"tiers.hybrid: {asked} asked for, NUMA node {node} has {free} free. Ask for less.")
        return
    known = ", ".join(map(str, fit)) or "none"
    what = "has CPUs, so it is ordinary memory" if node in nodes("has_cpu") else "has no memory, or is not there"
    raise CallerError(
        f"tiers.hybrid: NUMA node {node} {what}; CPU-less nodes here: {known}. "
        "Name one of those, or emulate a device with hybrid=SIZE,cache=SIZE."
    )


def bind(memory: mmap.mmap, node: int) -> None:
    """Have all pages of an untouched mapping on `node`. CallerError, one sentence, where the kernel refuses."""
    number = MBIND.get(platform.machine())
    if number is None:
        raise CallerError(f"tiers.hybrid: mbind is not known on {platform.machine()}. Use hybrid=dax:/dev/daxX.Y.")
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    done = call(
        ctypes.c_long(number),
        ctypes.c_void_p(start),
        ctypes.c_ulong(len(memory)),
        ctypes.c_int(MPOL_BIND),
        mask,
        ctypes.c_ulong(len(mask) * 64 + 1),
        ctypes.c_uint(MPOL_MF_STRICT | MPOL_MF_MOVE),
    )
    if done != 0:
        code = ctypes.get_errno()
        hint = "Give the container CAP_SYS_NICE, or a seccomp profile that allows mbind." if code == errno.EPERM else ""
        raise CallerError(f"tiers.hybrid: mbind to NUMA node {node} is refused ({os.strerror(code)}). {hint}".rstrip())
