"""The copies that a rank holds, of all layers: their weights in frames, their gradients, their lives. Not pure.

Compute reads copies and adds gradients; the lane fills frames and takes gradients away, in another thread. Each turn of
a copy is checked against frames.TABLE, so that nothing is read that has not arrived, nothing overwritten that is in use
or owes a gradient.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.errors import LawBroken
from outrider.experts.canonical import wide
from outrider.experts.frames import Copy

Weights = tuple[Tensor, Tensor]  # gate_up [2 * inner, hidden], down [hidden, inner]


class Copies:
    """`frames` places for an expert whose two matrices have these shapes, in the type and on the device of `like`."""

    def __init__(self, frames: int, shapes: Sequence[torch.Size], like: Tensor) -> None:
        self._shapes = shapes
        self.numel = sum(shape.numel() for shape in shapes)
        self.frames = like.new_empty((frames, self.numel))
        self._in: list[Copy | None] = [None] * frames
        self._newest: dict[tuple[int, int], Copy] = {}  # (layer, expert): planned last
        self._held: dict[tuple[int, int], Copy] = {}  # what lies in a frame, or is on its way there
        self._gradients: dict[int, Tensor] = {}  # frame: flat, wide
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all frames, and of the gradients that are there now."""
        return self.frames.nbytes + sum(gradient.nbytes for gradient in self._gradients.values())

    def plan(self, layer: int, expert: int, frame: int) -> Copy:
        """A copy will be carried into a frame."""
        copy = self._newest[layer, expert] = Copy(layer, expert, frame)
        return copy

    def turn(self, layer: int, expert: int, what: str) -> None:
        """Cancel, or want again, the copy that was planned last."""
        with self._lock:
            self._newest[layer, expert].turn(what)

    def start(self, copy: Copy) -> Tensor:
        """Its transfer starts: the frame to fill. What lay there before is gone."""
        with self._lock:
            self._evict(copy.frame)
            copy.turn("start")
            self._in[copy.frame] = self._held[copy.layer, copy.expert] = copy
        return self.frames[copy.frame]

    def end(self, copy: Copy) -> None:
        """It has arrived."""
        with self._lock:
            copy.turn("end")

    def enter(self, layer: int, expert: int) -> Weights:
        """Weights of a copy that a visit uses now. LawBroken if it is not there."""
        with self._lock:
            copy = self._held.get((layer, expert))
            if copy is None:
                raise LawBroken(6, f"tokens of layer {layer}, expert {expert} came to a rank that does not hold it")
            copy.turn("enter")
        return self._views(self.frames[copy.frame])

    def add_gradient(self, layer: int, expert: int, *parts: Tensor) -> None:
        """The copy in use gathers the gradients of its two matrices, in fp32 at least."""
        copy = self._held[layer, expert]
        copy.owes = True
        if copy.frame not in self._gradients:
            self._gradients[copy.frame] = torch.zeros_like(wide(self.frames[copy.frame]))
        for whole, part in zip(self._views(self._gradients[copy.frame]), parts, strict=True):
            whole.add_(part)

    def leave(self, layer: int) -> None:
        """The visit of this layer is over."""
        with self._lock:
            for copy in self._held.values():
                if copy.layer == layer and copy.state == "in use":
                    copy.turn("leave")

    def take_gradient(self, layer: int, expert: int) -> Tensor:
        """A copy's gradient, flat, to be sent home; zeros if it computed nothing. `returned` ends it."""
        with self._lock:
            copy = self._held.pop((layer, expert))
            copy.turn("return")
            gradient = self._gradients.pop(copy.frame, None)
        if gradient is not None and gradient.is_cuda:  # compute made it, the lane's stream reads it
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
        return torch.zeros_like(wide(self.frames[copy.frame])) if gradient is None else gradient

    def returned(self) -> None:
        """All gradients that were taken are home: their frames are free."""
        with self._lock:
            for copy in self._in:
                if copy is not None and copy.state == "gradient return":
                    copy.turn("end")
                    self._in[copy.frame] = None

    def clear(self) -> None:
        """All copies are void. LawBroken if one owes a gradient."""
        with self._lock:
            for frame in range(len(self._in)):
                self._evict(frame)
            self._newest.clear()

    def _evict(self, frame: int) -> None:
        copy = self._in[frame]
        if copy is not None:
            copy.turn("evict")
            self._in[frame] = None
            if self._held.get((copy.layer, copy.expert)) is copy:
                del self._held[copy.layer, copy.expert]

    def _views(self, flat: Tensor) -> Weights:
        first, second = self._shapes
        return flat[: first.numel()].view(first), flat[first.numel() :].view(second)
