"""What lies behind an emulated device's cache: a file without a name, read and written past the page cache. Live.

The file vanishes with the process, however that ends: the emulated device forgets everything at a restart.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from outrider.errors import CallerError
from outrider.memory.tiers.spec import show_bytes

VECTORS_MAX = 1024  # buffers in one system call


class Medium:
    """`size_bytes` of zeros in `directory` at first. Offsets, sizes and buffers are multiples of 4 KiB."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.where = str(directory)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            space = os.statvfs(directory)
            free_bytes = space.f_bavail * space.f_frsize
            if size_bytes > free_bytes:
                asked, free = show_bytes(size_bytes), show_bytes(free_bytes)
                raise CallerError(
                    f"tiers.hybrid: {asked} asked for, {directory} has {free} free. "
                    "Lower hybrid=SIZE, or name another path=DIR."
                )
            self._fd = _nameless(directory)
        except OSError as error:
            why = f"{directory}: {error.strerror}"
            raise CallerError(f"tiers.hybrid: {why}. Name one that can be made or written as path=DIR.") from error
        os.ftruncate(self._fd, size_bytes)

    def read(self, at: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `at`. OSError, EIO for a short read."""
        for begin in range(0, len(buffers), VECTORS_MAX):
            part = buffers[begin : begin + VECTORS_MAX]
            size_bytes = sum(map(len, part))
            if os.preadv(self._fd, part, at) != size_bytes:
                raise OSError(errno.EIO, f"a short read at {at}")
            at += size_bytes

    def write(self, at: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, to `at`. OSError, ENOSPC for a short write."""
        for begin in range(0, len(buffers), VECTORS_MAX):
            part = buffers[begin : begin + VECTORS_MAX]
            size_bytes = sum(map(len, part))
            if os.pwritev(self._fd, part, at) != size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += size_bytes

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _nameless(directory: Path) -> int:
    """A file in `directory` that has no name, past the page cache where the file system can."""
    flags = os.O_RDWR | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # a file system without nameless files, or without direct I/O
        return os.open(directory, flags | os.O_TMPFILE | os.O_DIRECT, 0o600)
    fd, name = tempfile.mkstemp(prefix="hybrid.", dir=directory)
    try:
        with contextlib.suppress(OSError):
            direct = os.open(name, flags | os.O_DIRECT)
            os.close(fd)
            return direct
        return fd
    finally:
        os.unlink(name)
