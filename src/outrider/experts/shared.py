"""Experts in host memory that the ranks of a node share: put there once a step, pulled by whoever needs them. Not pure.

A pull needs no sender: that is what makes this path cheap beside compute. Each expert carries a stamp, the step it was
put for, so that a stale one is an error and never a slow path. The file behind the memory loses its name as soon as all
ranks have it open; a killed rank leaves nothing behind. On CUDA each rank pins its mapping, for copies by DMA.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from outrider.errors import LawBroken, WorldError
from outrider.experts.events import Array

STAMP_BYTES = 8
FOLDER = Path("/dev/shm")


class Shared:
    """This node's memory. group: all ranks, for what is said while memory is made; bytes of an expert's numbers."""

    def __init__(
        self, group: dist.ProcessGroup, nodes_R: Array, numel: int, like: Tensor, folder: Path | None = None
    ) -> None:
        self.group, self.rank, self.numel, self.dtype = group, group.rank(), numel, like.dtype
        self.node = int(nodes_R[self.rank])
        self.first = int((nodes_R == self.node).argmax())  # of the ranks in this node: it makes the memory
        self.cuda = like.device.type == "cuda"
        self.folder = folder or (FOLDER if FOLDER.is_dir() else Path(tempfile.gettempdir()))
        self.step = 0
        self._map: Any = None
        self._stamps = torch.empty(0, dtype=torch.int64)
        self._experts = torch.empty((0, numel), dtype=self.dtype)
        self._at: dict[tuple[int, int], int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that this node's ranks share."""
        return 0 if self._map is None else len(self._map)

    def begin(self, rows: Array) -> None:
        """A new step, which with these rows of a Share; all ranks call it. WorldError where there is no room."""
        self.step += 1
        mine = [(layer, expert) for layer, expert, _, node, *_ in rows.tolist() if node == self.node]
        self._at = {key: i for i, key in enumerate(mine)}
        fullest = max((int((rows[:, 3] == node).sum()) for node in set(rows[:, 3].tolist())), default=0)
        if fullest > len(self._experts):  # the same for all ranks, so that all make room together
            self._grow(fullest)

    def put(self, layer: int, expert: int, flat: Tensor) -> None:
        """Write an expert, then its stamp."""
        at = self._at[layer, expert]
        self._experts[at].copy_(flat)
        self._stamps[at] = self.step

    def pull(self, layer: int, expert: int, into: Tensor) -> None:
        """Copy an expert. LawBroken if what is there was put for another step."""
        at = self._at[layer, expert]
        if int(self._stamps[at]) != self.step:
            raise LawBroken(
                6,
                f"layer {layer}, expert {expert} in shared memory is of step {int(self._stamps[at])}, not {self.step}",
            )
        into.copy_(self._experts[at], non_blocking=self.cuda)

    def close(self) -> None:
        """Let the memory go."""
        self._release()

    def _grow(self, experts: int) -> None:
        """New memory for so many experts: one rank of each node makes it, the others open it, then it is nameless."""
        self._release()
        width = torch.empty(0, dtype=self.dtype).element_size()
        size = max(mmap.PAGESIZE, experts * (STAMP_BYTES + self.numel * width))
        mine = self._made(size) if self.rank == self.first else ("", "")
        said = self._told(mine)
        failed = [words for _, words in said if words]
        path = said[self.first][0]
        try:
            if failed:
                raise WorldError(
                    f"experts: {size} bytes of shared memory in {self.folder}: {failed[0]}. Free some,"
                    " or take the direct path."
                )
            failed = [words for _, words in self._told(self._opened(path, size)) if words]
            if failed:
                raise WorldError(
                    f"experts: shared memory in {self.folder} cannot be opened: {failed[0]}. Let all ranks of a machine"
                    " see the same folder, or take the direct path."
                )
        finally:
            if self.rank == self.first and path:
                os.unlink(path)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        stamps = experts * STAMP_BYTES
        self._stamps = whole[:stamps].view(torch.int64)
        self._experts = whole[stamps : stamps + experts * self.numel * width].view(self.dtype).view(experts, self.numel)
        if self.cuda:
            self._pin(whole)

    @staticmethod
    def _pin(whole: Tensor) -> None:
        """For copies by DMA. WorldError where the machine does not let us: without it they would block, and be slow."""
        failed = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))  # type: ignore[no-untyped-call]
        if failed:
            raise WorldError(
                f"experts: {whole.nbytes} bytes of shared memory cannot be pinned (CUDA error {failed}). Raise the"
                " limit of locked memory (ulimit -l), or take the direct path."
            )

    def _opened(self, path: str, size: int) -> tuple[str, str]:
        """Nothing, or what went wrong: said to all, as in `_made`."""
        try:
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            return "", str(error.strerror)
        return "", ""

    def _made(self, size: int) -> tuple[str, str]:
        """The path of a new file with room for `size` bytes, or what went wrong: said to all, so that none waits."""
        try:
            handle, path = tempfile.mkstemp(prefix="outrider-experts-", dir=self.folder)
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                os.unlink(path)
                return "", str(error.strerror)
            finally:
                os.close(handle)
        except OSError as error:
            return "", str(error.strerror)
        return path, ""

    def _told(self, mine: tuple[str, str]) -> Sequence[tuple[str, str]]:
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def _release(self) -> None:
        if self._map is not None and self.cuda:
            torch.cuda.cudart().cudaHostUnregister(self._stamps.data_ptr())  # type: ignore[no-untyped-call]
        self._stamps = torch.empty(0, dtype=torch.int64)
        self._experts = torch.empty((0, self.numel), dtype=self.dtype)
        self._map = None  # unmapped with the last tensor on it
