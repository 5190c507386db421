"""A real CXL-hybrid device: mapped memory, from /dev/dax* or from a CPU-less NUMA node. Live; implements `device.py`.

The device caches by itself, unseen: hits and misses are not counted, and nothing can be pinned, as no public interface
for that exists. A prefetch reads one byte a page, which makes the device fetch it. Untested on real hardware; a
memory-backed file stands in for the character device in the tests, and `kind` says so.
"""

import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from outrider.errors import CallerError
from outrider.memory.tiers import numa
from outrider.memory.tiers.device import Range, Ticket, check_range

LINE_BYTES = 4096
MEMORY_RATE = 8e9  # bytes/s, until it is measured
DAX_ALIGN = 2 << 20
SYSFS_DAX = Path("/sys/bus/dax/devices")


class Mapped:
    """Memory that is mapped already. `cache_bytes`: what its owner says of the device's cache; `fd` is closed last."""

    def __init__(self, memory: mmap.mmap, kind: str, cache_bytes: int = 0, fd: int | None = None) -> None:
        self.kind, self.size_bytes, self.cache_bytes = kind, len(memory) // LINE_BYTES * LINE_BYTES, cache_bytes
        self.line_bytes, self.pin_bytes = LINE_BYTES, 0
        self.hit_rate = self.miss_rate = self.write_rate = MEMORY_RATE  # its misses are its own affair
        self._map, self._bytes, self._fd = memory, np.frombuffer(memory, np.uint8), fd
        self._lock = threading.Lock()
        self._counts = {"read_bytes": 0, "written_bytes": 0, "prefetched": 0, "prefetched_bytes": 0}
        self._closed = False
        self._orders: SimpleQueue[tuple[Ticket, Sequence[Range]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._prefetch_all, name="outrider-device", daemon=True)
        self._thread.start()

    def read(self, at: int, into: memoryview) -> None:
        check_range(at, len(into), self.size_bytes)
        np.copyto(np.frombuffer(into, np.uint8), self._bytes[at : at + len(into)])
        self._count(read_bytes=len(into))

    def write(self, at: int, data: memoryview) -> None:
        check_range(at, len(data), self.size_bytes)
        np.copyto(self._bytes[at : at + len(data)], np.frombuffer(data, np.uint8))
        self._count(written_bytes=len(data))

    def prefetch(
        self, ranges: Sequence[Range], pin: bool = False, done: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        for at, size_bytes in ranges:
            check_range(at, size_bytes, self.size_bytes)
        ticket = Ticket(done)
        if pin:
            ticket.end("this device cannot pin. Prefetch without.", errno.EDQUOT)
        elif self._closed:
            ticket.end("the device was closed", errno.ESHUTDOWN)
        else:
            self._orders.put((ticket, ranges))
        return ticket

    def unpin(self, ranges: Sequence[Range]) -> None:
        """Nothing is pinned here."""

    def flush(self) -> None:
        """Stores are in the device's memory, or in CPU caches that are coherent with it. A file that stands in: synced.

        Whether they outlive a power cut is the device's affair; `hybrid` is a volatile tier.
        """
        if "stands in" in self.kind:
            self._map.flush()

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                "kind": self.kind,
                "size_bytes": self.size_bytes,
                "cache_bytes": self.cache_bytes,
                "line_bytes": self.line_bytes,
                "pin_budget_bytes": 0,
                **self._counts,
            }

    def close(self) -> None:
        self._closed = True
        self._orders.put(None)
        self._thread.join()
        del self._bytes
        self._map.close()
        if self._fd is not None:
            os.close(self._fd)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                self._counts[name] += count

    def _prefetch_all(self) -> None:
        while (order := self._orders.get()) is not None:
            ticket, ranges = order
            for at, size_bytes in ranges:
                int(self._bytes[at : at + size_bytes : LINE_BYTES].sum())  # a load a page: the device brings it near
                lines = -(-(at + size_bytes) // LINE_BYTES) - at // LINE_BYTES
                self._count(prefetched=lines, prefetched_bytes=size_bytes)
            ticket.end()


def open_dax(path: Path, cache_bytes: int) -> Mapped:
    """Map a /dev/daxX.Y, whole, for this server alone; a plain file stands in for one. CallerError where that fails."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two servers would write over each other's blocks
        status = os.fstat(fd)
        real = stat.S_ISCHR(status.st_mode)
        size_bytes = int((SYSFS_DAX / path.resolve().name / "size").read_text()) if real else status.st_size
        size_bytes -= size_bytes % (DAX_ALIGN if real else LINE_BYTES)
        memory = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
    except (OSError, ValueError) as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, BlockingIOError):
            why = f"{path} belongs to a memory server that runs"
            raise CallerError(f"tiers.hybrid: {why}. Stop that one, or name another device.") from error
        why = f"{path}: {getattr(error, 'strerror', None) or error}"
        raise CallerError(f"tiers.hybrid: {why}. Name a /dev/daxX.Y that this user may read and write.") from error
    kind = f"devdax {path}" if real else f"a file that stands in for a dax device: {path}"
    return Mapped(memory, kind, cache_bytes, fd)


def open_node(node: int, size_bytes: int, cache_bytes: int) -> Mapped:
    """`size_bytes` of memory of a CPU-less NUMA node. CallerError, one sentence, where there is none or may be none."""
    numa.check_node(node, size_bytes)
    memory = mmap.mmap(-1, size_bytes)
    try:
        numa.bind(memory, node)
    except CallerError:
        memory.close()
        raise
    return Mapped(memory, f"NUMA node {node}", cache_bytes)
