"""Arrays inside an npz, read and written in blocks. A door: reads and writes files; used by the npz readers beside it.

`np.load(path)[key]` makes the whole array at once; routes recorded as int32 would cost four times their table. Here
a member is gone through block by block along its first axis, and only the narrow table is whole.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from outrider.errors import CallerError
from outrider.experts.routing import BLOCK, Ids


class Npz:
    """One npz file. CallerError names the file and the key for whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                self.keys = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]
        except OSError as error:
            raise CallerError(f"{path}: {error.strerror}. Name a file that can be read.") from error
        except zipfile.BadZipFile as error:
            raise CallerError(f"{path}: {error}. Give an npz that was written to its end.") from error

    def whole(self, key: str) -> Ids:
        """A small member as an array."""
        blocks = list(self.blocks(key))
        joined = np.concatenate(blocks) if blocks else np.zeros(0, dtype=self.dtype(key))
        return joined.reshape(self.shape(key))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._header(key)[0]

    def dtype(self, key: str) -> np.dtype[Any]:
        return self._header(key)[1]

    def blocks(self, key: str) -> Iterator[Ids]:
        """The member along its first axis, about 1 MiB at a time. A scalar comes as one block."""
        shape = self.shape(key)
        if not shape:
            yield next(block for _, _, block in self._pieces(key, (1, 1), ()))
            return
        for _, _, block in self._pieces(key, (1, shape[0]), shape[1:]):
            yield block

    def planes(self, key: str) -> Iterator[tuple[int, int, Ids]]:
        """The member along its first two axes: index on the first, start on the second, block [n, ...]."""
        shape = self.shape(key)
        return self._pieces(key, (shape[0], shape[1]), shape[2:])

    def _pieces(self, key: str, lead: tuple[int, int], row: tuple[int, ...]) -> Iterator[tuple[int, int, Ids]]:
        """Rows of shape `row`, never across two indices of the first leading axis."""
        with self._member(key) as (raw, shape, dtype, fortran):
            row_bytes = int(np.prod(row, dtype=np.int64)) * dtype.itemsize
            whole = None
            if fortran and len(shape) > 1:  # the one order that cannot be streamed
                data = bytearray(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
                self._fill(key, raw, data)
                whole = np.frombuffer(data, dtype=dtype).reshape(shape, order="F").reshape(*lead, *row)
            step = max(1, BLOCK // max(1, row_bytes))
            for index in range(lead[0]):
                for at in range(0, lead[1], step):
                    n = min(step, lead[1] - at)
                    if whole is not None:
                        yield index, at, np.ascontiguousarray(whole[index, at : at + n])
                        continue
                    data = bytearray(n * row_bytes)
                    self._fill(key, raw, data)
                    yield index, at, np.frombuffer(data, dtype=dtype).reshape(n, *row)

    def _header(self, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self._member(key) as (_, shape, dtype, _):
            return shape, dtype

    def _member(self, key: str) -> "Member":
        if key not in self.keys:
            raise CallerError(
                f"{self.path}: no array {key!r} in it, but {', '.join(self.keys[:8])}. Give another file."
            )
        return Member(self.path, key)

    def _fill(self, key: str, raw: IO[bytes], data: bytearray) -> None:
        view, at = memoryview(data), 0
        try:
            while at < len(view):
                got = raw.readinto(view[at : at + BLOCK])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError("it ends too soon")
                at += got
        except (EOFError, zipfile.BadZipFile, OSError) as error:
            raise CallerError(f"{self.path}, array {key!r}: {error}. Write the file again.") from error


class Member:
    """An open member behind its header; closes file and member."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]:
        self.file = zipfile.ZipFile(self.path)
        self.raw = self.file.open(f"{self.key}.npy")
        try:
            version = np.lib.format.read_magic(self.raw)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self.raw)
        except (ValueError, zipfile.BadZipFile) as error:
            self.__exit__()
            raise CallerError(f"{self.path}, array {self.key!r}: {error}. Write it with numpy.savez.") from error
        if dtype.hasobject:
            self.__exit__()
            raise CallerError(
                f"{self.path}, array {self.key!r}: holds pickled objects, which are not read. Save plain arrays."
            )
        return self.raw, shape, dtype, fortran

    def __exit__(self, *exception: object) -> None:
        self.raw.close()
        self.file.close()


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz that numpy reads. Lightly compressed, block by block, so that nothing is held twice."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for key, value in arrays.items():
            array = np.asarray(value)
            with file.open(f"{key}.npy", "w", force_zip64=True) as out:
                head = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": array.shape,
                }
                np.lib.format.write_array_header_1_0(out, head)
                for block in sliced(array):
                    out.write(block.tobytes())


def sliced(array: Ids) -> Iterator[Ids]:
    """The array along its first axis in pieces of about 1 MiB; a scalar or an empty array as it is."""
    if array.ndim == 0:
        yield array.reshape(1)
        return
    step = max(1, BLOCK // max(1, array[:1].nbytes))
    for at in range(0, len(array), step):
        if array[at : at + step].size:
            yield array[at : at + step]
