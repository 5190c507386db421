"""The host tier's memory: one memfd that the server and all clients map. Live; holds bytes, decides nothing.

The memfd has no name in any file system: it vanishes with the last process that maps it, however that one ends. It is
sealed against resizing, so that no client can take a page from under another.
"""

import fcntl
import mmap
import os
from pathlib import Path

from outrider.errors import CallerError
from outrider.memory.tiers.spec import show_bytes

PREFAULT_BYTES = 256 << 20  # larger arenas get their pages at first touch: start-up stays quick


class Arena:
    """`size_bytes` of shared memory; `fd` is what clients are sent."""

    def __init__(self, size_bytes: int, besides_bytes: int = 0) -> None:
        """`besides_bytes` of memory will be taken by others: pages of a large arena are taken later than theirs."""
        free_bytes = available_bytes()
        if size_bytes + besides_bytes > free_bytes:
            asked, lower, free = show_bytes(size_bytes), "host=SIZE", show_bytes(free_bytes)
            if besides_bytes:
                asked, lower = f"{asked} beside cache={show_bytes(besides_bytes)}", "host=SIZE or cache=SIZE"
            raise CallerError(f"tiers.host: {asked} asked for, this machine has {free} free. Lower {lower}.")
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("outrider-host", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        if size_bytes <= PREFAULT_BYTES:
            os.posix_fallocate(self.fd, 0, size_bytes)
        self._map = mmap.mmap(self.fd, size_bytes)
        self._view = memoryview(self._map)

    def view(self, start: int, size_bytes: int) -> memoryview:
        """Writable bytes [start, start + size_bytes)."""
        return self._view[start : start + size_bytes]

    def close(self) -> None:
        """Give the mapping back; the pages live on while a client maps them."""
        self._view.release()
        self._map.close()
        os.close(self.fd)


def available_bytes() -> int:
    """What the kernel says can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
