"""Routes of a veRL batch: padded or nested `routed_experts`, with the masks that say which rows are real. A door.

    routed_experts   [batch, prompt + response, layers, top_k], uint8, int16 or int32; or nested [rows, layers, top_k]
    attention_mask   [batch, prompt + response]: a row is padding where it is 0. Filler is 0, a valid id: only the mask
                     tells. Nested batches need none
    response_mask    optional, [batch, response]: a sequence without response is not replayed
    input_ids        nested batches only: lengths, as routes may lack the last row
    replay_mask      optional, shaped as attention_mask: rows that are replayed; the rules below otherwise

R3 replays every row but the last of a sequence, which rollout never passed through; R2 replays all. The same batch
reads from a dictionary, an npz or a `.pt` of plain tensors. Source: veRL's router_replay_utils, read and not copied.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters.filling import Ask, Extent, Filling
from outrider.experts.adapters.members import Npz, write
from outrider.experts.routing import Ids, Mask, Routing

Pieces = Callable[[], Iterator[tuple[int, int, Ids]]]  # sequence, first position, rows [n, layers, top_k]
MASKS = ("attention_mask", "response_mask", "replay_mask")


def is_verl(keys: Sequence[str]) -> bool:
    return "routed_experts" in keys and "attention_mask" in keys


def read_verl(path: Path, ask: Ask) -> Routing:
    """A batch in an npz, or in a file of torch.save that holds a dictionary of plain tensors."""
    if not is_npz(path):
        return from_verl(_loaded(path), ask, str(path))
    file = Npz(path)
    masks = {name: file.whole(name) for name in MASKS if name in file.keys}
    shape, dtype = file.shape("routed_experts"), file.dtype("routed_experts")
    return _padded(lambda: file.planes("routed_experts"), shape, dtype, masks, ask, str(path))


def from_verl(batch: Mapping[str, Any], ask: Ask | None = None, where: str = "batch") -> Routing:
    """A batch in memory: numpy arrays or torch tensors. `where` names it in messages."""
    ask = ask or Ask()
    if "routed_experts" not in batch:
        raise CallerError(
            f"{where}: no 'routed_experts' in it, but {', '.join(map(str, batch))}. Set"
            " actor_rollout_ref.rollout.enable_rollout_routing_replay=True."
        )
    if getattr(batch["routed_experts"], "is_nested", False):
        return _nested(batch, ask, where)
    routes = _array(batch["routed_experts"])
    masks = {name: _array(batch[name]) for name in MASKS if batch.get(name) is not None}
    return _padded(
        lambda: ((i, 0, rows) for i, rows in enumerate(routes)), routes.shape, routes.dtype, masks, ask, where
    )


def _padded(
    pieces: Pieces, shape: tuple[int, ...], dtype: np.dtype[Any], masks: Mapping[str, Ids], ask: Ask, where: str
) -> Routing:
    _check(shape, 4, dtype, ask, where)
    if "attention_mask" not in masks:
        raise CallerError(
            f"{where}: routed_experts without attention_mask, and its filler 0 is a valid id. Give the mask."
        )
    for name in ("attention_mask", "replay_mask"):
        if name in masks and masks[name].shape != shape[:2]:
            raise CallerError(
                f"{where}, {name!r}: shape {masks[name].shape} for routes {shape}. Give [batch, prompt + response]."
            )
    real = masks["attention_mask"].astype(np.bool_)
    response = masks.get("response_mask")
    replayed = masks["replay_mask"].astype(np.bool_) if "replay_mask" in masks else _replayed(real, response, ask)
    lengths = real.sum(axis=1)
    starts = np.cumsum([0, *lengths[:-1].tolist()])
    extent = Extent()
    for i, at, rows in pieces():
        extent.see(rows[real[i, at : at + len(rows)]])
    table = Filling(int(lengths.sum()), shape[2], shape[3], extent.dtype)
    for i, at, rows in pieces():
        before = int(real[i, :at].sum())
        table.put(int(starts[i]) + before, rows[real[i, at : at + len(rows)]])
    table.known_T &= replayed[real]
    return table.routing(lengths, ask)


def _replayed(real: Mask, response: Ids | None, ask: Ask) -> Mask:
    """[batch, positions] rows whose route replay takes from the table."""
    if ask.replay == "R2":
        return real
    replayed = real.copy()
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)
    replayed[np.arange(len(real)), last] = False
    if response is not None:
        replayed[response.reshape(len(real), -1).sum(axis=1) == 0] = False
    return replayed


def _nested(batch: Mapping[str, Any], ask: Ask, where: str) -> Routing:
    routes = [_array(part) for part in batch["routed_experts"].unbind()]
    ids = batch.get("input_ids")
    lengths = [len(part) for part in (ids.unbind() if ids is not None else routes)]
    response = batch.get("response_mask")
    silent = [False] * len(routes)
    if response is not None:
        parts = response.unbind() if getattr(response, "is_nested", False) else response
        silent = [int(part.sum()) == 0 for part in parts]
    if not routes or len(lengths) != len(routes):
        raise CallerError(
            f"{where}: {len(routes)} sequences of routes for {len(lengths)} of tokens. Give one for each."
        )
    extent = Extent()
    for i, rows in enumerate(routes):
        _check(rows.shape, 3, rows.dtype, ask, where)
        if rows.shape[1:] != routes[0].shape[1:] or not lengths[i] - 1 <= len(rows) <= lengths[i]:
            raise CallerError(
                f"{where}, sequence {i}: rows {rows.shape} for {lengths[i]} tokens. Only the last row may be missing,"
                " and all sequences are of one model."
            )
        extent.see(rows)
    table = Filling(sum(lengths), routes[0].shape[1], routes[0].shape[2], extent.dtype)
    for i, at in enumerate(np.cumsum([0, *lengths[:-1]]).tolist()):
        table.put(at, routes[i])
        if ask.replay == "R3" and lengths[i]:
            table.known_T[at if silent[i] else at + lengths[i] - 1 : at + lengths[i]] = False
    return table.routing(lengths, ask)


def write_verl(routing: Routing, path: Path) -> None:
    """An npz of a padded batch, padded on the right, with the replay mask spelled out."""
    lengths = np.diff(routing.offsets_S1)
    real = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    shape = (*real.shape, routing.layers, routing.top_k)
    kind = np.int32 if routing.experts > np.iinfo(np.int16).max else np.int16
    padded = np.zeros(shape, dtype=kind)
    padded[real] = routing.routes_TLK
    replayed = np.zeros(real.shape, dtype=np.bool_)
    replayed[real] = routing.known()
    write(path, {"routed_experts": padded, "attention_mask": real.astype(np.int8), "replay_mask": replayed})


def _check(shape: tuple[int, ...], axes: int, dtype: np.dtype[Any], ask: Ask, where: str) -> None:
    if len(shape) != axes or dtype.kind not in "iu":
        form = "[batch, prompt + response, layers, top_k]" if axes == 4 else "[rows, layers, top_k] a sequence"
        raise CallerError(f"{where}, 'routed_experts': {dtype} of shape {shape}. Give integers {form}.")
    if dtype == np.uint8 and (ask.experts or 0) > 256:
        raise CallerError(
            f"{where}, 'routed_experts': uint8 cannot hold ids of {ask.experts} experts, so they wrapped when they were"
            " recorded. Record again with int16."
        )


def is_npz(path: Path) -> bool:
    """By content: numpy's zip holds `.npy` members, torch's does not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith(".npy") for name in file.namelist())


def _loaded(path: Path) -> Mapping[str, Any]:
    import torch  # heavy, and an optional dependency: only for files that torch wrote

    try:
        batch = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CallerError(
            f"{path}: {str(error).splitlines()[0]} Save a dictionary of plain tensors with torch.save."
        ) from error
    if not isinstance(batch, Mapping):
        raise CallerError(f"{path}: holds a {type(batch).__name__}. Save a dictionary of tensors with torch.save.")
    return batch


def _array(tensor: Any) -> Ids:
    """The tensor's memory as numpy; torch tensors are told by their `detach`."""
    array: Ids = np.asarray(tensor.detach().cpu()) if hasattr(tensor, "detach") else np.asarray(tensor)
    return array
