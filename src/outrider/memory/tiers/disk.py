"""The disk tier: a data file of slots and its index. Live; carries bytes, verifies every read, decides nothing.

    DIR/blocks.data    slots: a header page (the block's index record), then the block, padded to whole pages
    DIR/blocks.index   `index.py`
    a write is acknowledged after: data and header, fdatasync, index record, fdatasync

What a crash leaves behind is a record without its data, data without a record, or a record whose slot was used again:
`read` tells all three from a good block by the header's key and generation and by the checksum taken when the block was
put (law 1). One process owns a directory at a time.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from outrider.errors import CallerError
from outrider.memory.events import Copy, Found
from outrider.memory.tiers.index import RECORD_BYTES, STORED, Index, pack, sync_directory, unpack
from outrider.memory.tiers.spec import show_bytes
from outrider.memory.tiers.tier import Damaged, verify

HEADER_BYTES = 4096


class Disk:
    """`capacity_bytes` of slots in `directory`. `write` and `commit` belong to one thread, `read` to any."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._lock_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            why = f"{directory}: {error.strerror}"
            raise CallerError(f"tiers.disk: {why}. Name one that can be made or written as path=DIR.") from error
        try:
            self._open(capacity_bytes)
        except OSError as error:
            os.close(self._lock_fd)
            why = f"{directory}: {error.strerror}"
            raise CallerError(f"tiers.disk: {why}. Mend it, or name another path=DIR.") from error
        except CallerError:
            os.close(self._lock_fd)
            raise
        self._pages = threading.local()

    def _open(self, capacity_bytes: int) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = f"{self.directory} belongs to a memory server that runs"
            raise CallerError(f"tiers.disk: {why}. Stop that one, or name another path=DIR.") from error
        data = self.directory / "blocks.data"
        space = os.statvfs(self.directory)
        ours_bytes = data.stat().st_blocks * 512 if data.exists() else 0
        free_bytes = space.f_bavail * space.f_frsize + ours_bytes
        if capacity_bytes > free_bytes:
            asked, free = show_bytes(capacity_bytes), show_bytes(free_bytes)
            raise CallerError(
                f"tiers.disk: {asked} asked for, {self.directory} has {free} free. "
                "Lower disk=SIZE, or name another path=DIR."
            )
        self.index = Index(self.directory / "blocks.index")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._fd = os.open(data, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(data, flags, 0o600)  # a file system without direct I/O
        os.ftruncate(self._fd, capacity_bytes)
        sync_directory(self.directory)

    @property
    def where(self) -> str:
        return str(self.directory)

    def found(self) -> tuple[Found, ...]:
        """Blocks that the index holds, oldest first; their data are verified when they are read."""
        return tuple(self.index.live.values())

    def write(self, copy: Copy, padded: memoryview) -> None:
        """Write one block into its slot; `padded` is its extent in the arena. OSError where the disk refuses."""
        record = pack(STORED, _found(copy))
        page = self._page()
        page[: len(record)] = record
        if os.pwritev(self._fd, [page, padded], copy.dst_at) != HEADER_BYTES + len(padded):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def commit(self, copies: Iterable[Copy]) -> None:
        """Make written blocks durable: barrier, index records, barrier. OSError: none of them is."""
        os.fdatasync(self._fd)
        self.index.store(_found(copy) for copy in copies)

    def read(self, copy: Copy, padded: memoryview) -> None:
        """Read one block into its extent in the arena and verify it. Damaged, or OSError."""
        page = self._page()
        if os.preadv(self._fd, [page, padded], copy.src_at) != HEADER_BYTES + len(padded):
            raise Damaged("short")
        if unpack(page[:RECORD_BYTES]) != (STORED, _found(copy, at=copy.src_at)):
            raise Damaged("stale")
        verify(copy, padded)

    def erase(self, items: Iterable[str]) -> None:
        self.index.erase(items)

    def close(self) -> None:
        self.index.close()
        os.close(self._fd)
        os.close(self._lock_fd)

    def _page(self) -> memoryview:
        """This thread's page for headers, aligned as direct I/O wants it."""
        if not hasattr(self._pages, "view"):
            self._pages.view = memoryview(mmap.mmap(-1, HEADER_BYTES))
        view: memoryview = self._pages.view
        return view


def _found(copy: Copy, at: int | None = None) -> Found:
    return Found(copy.item, copy.dst_at if at is None else at, copy.size_bytes, copy.checksum, copy.generation)
