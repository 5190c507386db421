"""The disk tier's index: an append-only file of checksummed records, 64 bytes each. Live; owned by `disk.py`.

    magic 4 | kind 1 | 3 unused | generation 8 | at 8 | size 8 | key 16 | checksum of the data 8 | of this record 8

A record counts only if its own checksum does. A torn tail is cut off at the next start; a damaged record in the middle
is skipped and hides nothing behind it, since every record starts at a multiple of 64. Later records win, by key and by
place: a slot that was used again belongs to the newer block. The same 64 bytes head every slot of the data file, so
that an index record that outlived its slot is found out when it is read (`disk.py`).
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import xxhash

from outrider.errors import CallerError
from outrider.memory.events import Found

RECORD = struct.Struct("<4sB3xQQQ16sQ")
RECORD_BYTES = RECORD.size + 8
MAGIC = b"ORX1"
OPENED, STORED, ERASED = 0, 1, 2
FORMAT = 1
SLACK_RECORDS = 4096  # rewrite when this many more than twice the live ones have gathered


def pack(kind: int, found: Found) -> bytes:
    """One record, with its checksum."""
    key = bytes.fromhex(found.item)
    body = RECORD.pack(MAGIC, kind, found.generation, found.at, found.size_bytes, key, found.checksum)
    return body + xxhash.xxh3_64_digest(body)


def unpack(record: bytes | memoryview) -> tuple[int, Found] | None:
    """Kind and content of one record; None where any bit of it is wrong."""
    body = bytes(record[: RECORD.size])
    if len(record) != RECORD_BYTES or xxhash.xxh3_64_digest(body) != bytes(record[RECORD.size :]):
        return None
    magic, kind, generation, at, size_bytes, key, checksum = RECORD.unpack(body)
    return (kind, Found(key.hex(), at, size_bytes, checksum, generation)) if magic == MAGIC else None


class Index:
    """Which blocks are durable, and where. `damaged` counts records that were skipped when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.live: dict[str, Found] = {}
        self.damaged = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._end = self._read()
        os.ftruncate(self._fd, self._end)
        if self._end == 0:
            self._end = self._write_head(self._fd)
        self._rewrite_if_long()
        os.fsync(self._fd)
        sync_directory(path.parent)

    def store(self, blocks: Iterable[Found]) -> None:
        """Record these blocks, whose data are on disk already; they are durable when this returns. OSError: none is."""
        blocks = list(blocks)
        self._append(b"".join(pack(STORED, found) for found in blocks))
        os.fdatasync(self._fd)
        for found in blocks:
            self.live[found.item] = found
        self._rewrite_if_long()

    def erase(self, items: Iterable[str]) -> None:
        """Forget these blocks. Not synced: one that comes back after a crash is still what was stored, or found out."""
        gone = [self.live.pop(item) for item in items if item in self.live]
        self._append(b"".join(pack(ERASED, found) for found in gone))

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        """Write at the end; on failure the end stays where it was, so the next record covers what was torn."""
        if os.pwrite(self._fd, data, self._end) != len(data):
            raise OSError(28, "no space left for the index")
        self._end += len(data)

    def _read(self) -> int:
        """Replay the file into `live`; where its last valid record ends."""
        data = memoryview(self._path.read_bytes())
        end = damaged = 0
        by_place: dict[int, Found] = {}
        for start in range(0, len(data), RECORD_BYTES):
            record = unpack(data[start : start + RECORD_BYTES])
            if record is None:
                damaged += 1
                continue
            kind, found = record
            end, self.damaged = start + RECORD_BYTES, damaged
            if kind == OPENED and found.generation != FORMAT:
                raise CallerError(
                    f"tiers.disk: {self._path} has format {found.generation}, this Outrider reads {FORMAT}. "
                    "Use the Outrider that wrote it, or another path=DIR."
                )
            if kind == STORED:
                older = by_place.get(found.at)
                if older is not None and self.live.get(older.item) == older:
                    del self.live[older.item]
                by_place[found.at] = found
                self.live.pop(found.item, None)
                self.live[found.item] = found
            elif kind == ERASED and self.live.get(found.item, found).generation <= found.generation:
                self.live.pop(found.item, None)
        return end

    def _rewrite_if_long(self) -> None:
        """Replace the file by one that holds the live records only: written beside it, synced, renamed, synced."""
        if self._end // RECORD_BYTES <= 2 * len(self.live) + SLACK_RECORDS:
            return
        beside = self._path.with_suffix(".new")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            data = b"".join(pack(STORED, found) for found in self.live.values())
            end = self._write_head(fd)
            if os.pwrite(fd, data, end) != len(data):
                raise OSError(28, "no space left for the index")
            os.fsync(fd)
            beside.rename(self._path)
        except OSError:
            os.close(fd)
            beside.unlink(missing_ok=True)
            return  # the long one still serves; the next batch tries again
        sync_directory(self._path.parent)
        os.close(self._fd)
        self._fd, self._end = fd, end + len(data)

    @staticmethod
    def _write_head(fd: int) -> int:
        head = pack(OPENED, Found("00" * 16, 0, 0, 0, FORMAT))
        os.pwrite(fd, head, 0)
        return len(head)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
