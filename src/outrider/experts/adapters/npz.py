"""Routes in npz files: Outrider's own, routing by domain, and one request a file. A door; called by `formats.py`.

Outrider's own file (format `outrider`), readable with `numpy.load`:

    outrider_routing   1, the version of this layout
    routes             [tokens, layers, top_k], the least of uint8, int8, int16, int32; rows missing in part are -1
    offsets            [sequences + 1] first token of each, then the number of tokens
    experts            routed experts of a layer
    replay             "R3" or "R2"
    layer_ids          [layers] the model's number of each
    known              absent where all routes are known; else one bit a token, packed big-endian
    source             absent, or [tokens] rank
    domain_names       [n] and domain_ranges [n, 2]: first sequence and end
    notes              [n] what a reader assumed, in words

Routing by domain: `NAME_ids` [layers, tokens, top_k] and `NAME_seq_offsets` [sequences + 1] for each domain.
One request a file: `routed_experts` [rows, layers, top_k], `prompt_token_ids`, `output_token_ids`, `request_id`. A
folder of them is read in the order of the numbers in their names.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters.filling import Ask, Extent, Filling
from outrider.experts.adapters.members import Npz, write
from outrider.experts.routing import Routing, smallest

VERSION = 1
IDS, OFFSETS = "_ids", "_seq_offsets"


def is_outrider(keys: Sequence[str]) -> bool:
    return "outrider_routing" in keys


def read_outrider(path: Path, ask: Ask) -> Routing:
    """The file as it was written; `ask` may name more experts than the file does."""
    file = Npz(path)
    if (version := int(file.whole("outrider_routing"))) != VERSION:
        raise CallerError(
            f"{path}: layout {version} of Outrider's routing file, this reads {VERSION}. Update Outrider."
        )
    shape = file.shape("routes")
    routes = np.empty(shape, dtype=file.dtype("routes"))
    at = 0
    for block in file.blocks("routes"):
        routes[at : at + len(block)] = block
        at += len(block)
    known = None
    if "known" in file.keys:
        known = np.unpackbits(file.whole("known"), count=shape[0]).astype(np.bool_)
    ranges = file.whole("domain_ranges").tolist()
    names = [str(name) for name in file.whole("domain_names")]
    return Routing.of(
        routes,
        file.whole("offsets"),
        experts=ask.experts if ask.experts is not None else int(file.whole("experts")),
        known_T=known,
        replay="R2" if str(file.whole("replay")) == "R2" else "R3",
        source_T=file.whole("source") if "source" in file.keys else None,
        domains={name: (first, end) for name, (first, end) in zip(names, ranges, strict=True)},
        layer_ids=tuple(file.whole("layer_ids").tolist()),
        notes=tuple(str(note) for note in file.whole("notes")),
    )


def write_outrider(routing: Routing, path: Path) -> None:
    arrays = {
        "outrider_routing": VERSION,
        "routes": routing.routes_TLK,
        "offsets": routing.offsets_S1,
        "experts": routing.experts,
        "replay": routing.replay,
        "layer_ids": np.array(routing.layer_ids, dtype=np.int64),
        "domain_names": np.array(list(routing.domains), dtype=np.str_),
        "domain_ranges": np.array(list(routing.domains.values()), dtype=np.int64).reshape(-1, 2),
        "notes": np.array(routing.notes, dtype=np.str_),
    }
    if routing.known_T is not None:
        arrays["known"] = np.packbits(routing.known_T)
    if routing.source_T is not None:
        arrays["source"] = routing.source_T
    write(path, arrays)


def is_domains(keys: Sequence[str]) -> bool:
    return any(key.endswith(IDS) and key.removesuffix(IDS) + OFFSETS in keys for key in keys)


def read_domains(path: Path, ask: Ask) -> Routing:
    """All domains of the file, one after the other, in the file's order."""
    file = Npz(path)
    names = [
        key.removesuffix(IDS) for key in file.keys if key.endswith(IDS) and key.removesuffix(IDS) + OFFSETS in file.keys
    ]
    shapes = {name: file.shape(name + IDS) for name in names}
    layers, _, top_k = next(iter(shapes.values())) if all(len(shape) == 3 for shape in shapes.values()) else (0, 0, 0)
    for name, shape in shapes.items():
        if len(shape) != 3 or (shape[0], shape[2]) != (layers, top_k) or file.dtype(name + IDS).kind not in "iu":
            raise CallerError(
                f"{path}, array {name + IDS!r}: {file.dtype(name + IDS)} of shape {shape}. Every domain is integers"
                " [layers, tokens, top_k] of one model."
            )
    tokens = sum(shape[1] for shape in shapes.values())
    most, gone_any, gone_all, starts = -1, np.zeros(tokens, np.bool_), np.ones(tokens, np.bool_), {}
    at_token = 0
    for name in names:
        starts[name] = at_token
        for _, at, block in file.planes(name + IDS):
            most = max(most, int(block.max()))
            gone = (block < 0).any(axis=1)
            part = slice(at_token + at, at_token + at + len(block))
            gone_any[part] |= gone
            gone_all[part] &= gone
        at_token += shapes[name][1]
    gone_all &= gone_any  # without layers nothing is missing
    partial = bool((gone_any & ~gone_all).any())
    routes = np.empty((tokens, layers, top_k), dtype=smallest(most, partial))
    offsets, domains = [0], {}
    for name in names:
        for layer, at, block in file.planes(name + IDS):
            part = slice(starts[name] + at, starts[name] + at + len(block))
            routes[part, layer] = block.clip(min=-1 if partial else 0)
        own = file.whole(name + OFFSETS).astype(np.int64)
        if own.ndim != 1 or not own.size or own[0] != 0 or own[-1] != shapes[name][1] or (np.diff(own) < 0).any():
            raise CallerError(
                f"{path}, array {name + OFFSETS!r}: does not rise from 0 to the domain's {shapes[name][1]} tokens."
                " Give the first token of each sequence, then the number of tokens."
            )
        domains[name] = (len(offsets) - 1, len(offsets) + len(own) - 2)
        offsets += (own[1:] + starts[name]).tolist()
    return Routing.of(routes, offsets, experts=ask.experts, known_T=~gone_all, replay=ask.replay, domains=domains)


def write_domains(routing: Routing, path: Path) -> None:
    """A table without domains becomes the one domain `all`; tokens of unknown route are rows of -1."""
    arrays = {}
    for name, (first, end) in (routing.domains or {"all": (0, routing.sequences)}).items():
        start, stop = int(routing.offsets_S1[first]), int(routing.offsets_S1[end])
        ids = with_gaps(routing, start, stop)
        arrays[name + IDS] = ids.transpose(1, 0, 2)
        arrays[name + OFFSETS] = routing.offsets_S1[first : end + 1] - start
    write(path, arrays)


def with_gaps(routing: Routing, start: int, stop: int) -> np.ndarray:
    """[stop - start, layers, top_k] rows, those of unknown tokens -1; a view where there are none."""
    ids, known = routing.routes_TLK[start:stop], routing.known()[start:stop]
    if known.all():
        return ids
    return np.where(known[:, None, None], ids.astype(smallest(routing.experts, True), copy=False), -1)


def is_dump(keys: Sequence[str]) -> bool:
    return "routed_experts" in keys and ("prompt_token_ids" in keys or "output_token_ids" in keys)


def read_dump(path: Path, ask: Ask) -> Routing:
    """One request, or a folder of them. Rows at the end may be missing: the last token is never passed through."""
    files = [Npz(each) for each in in_order(path, "*.npz")]
    extent, lengths = Extent(), []
    shape: tuple[int, ...] = ()
    for file in files:
        rows = file.shape("routed_experts")
        shape = shape or rows
        if len(rows) != 3 or rows[1:] != shape[1:] or file.dtype("routed_experts").kind not in "iu":
            raise CallerError(
                f"{file.path}, array 'routed_experts': {file.dtype('routed_experts')} of shape {rows}. Every request"
                " is integers [rows, layers, top_k] of one model."
            )
        tokens = sum(
            int(np.prod(file.shape(key))) for key in ("prompt_token_ids", "output_token_ids") if key in file.keys
        )
        if not tokens - 1 <= rows[0] - ask.warmup_rows <= tokens:
            raise CallerError(
                f"{file.path}: {rows[0]} rows for {tokens} tokens. A request has a row per token, or one less; say"
                " warmup_rows if rows that belong to no token come first."
            )
        lengths.append(tokens)
        for _, block in _rows(file, ask):
            extent.see(block)
    table = Filling(sum(lengths), shape[1], shape[2], extent.dtype)
    for start, file in zip(np.cumsum([0, *lengths[:-1]]).tolist(), files, strict=True):
        for at, block in _rows(file, ask):
            table.put(start + at, block)
    return table.routing(lengths, ask)


def _rows(file: Npz, ask: Ask) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks without the warm-up rows, and the token at which each starts."""
    at = -ask.warmup_rows
    for block in file.blocks("routed_experts"):
        skip = min(len(block), max(0, -at))
        if skip < len(block):
            yield at + skip, block[skip:]
        at += len(block)


def write_dump(routing: Routing, path: Path) -> None:
    """A folder, one file a sequence. The table holds no tokens, so their ids are -1; all of them stand as prompt."""
    path.mkdir(parents=True, exist_ok=True)
    width = len(str(max(0, routing.sequences - 1)))
    for i, (start, stop) in enumerate(zip(routing.offsets_S1[:-1], routing.offsets_S1[1:], strict=True)):
        ids = with_gaps(routing, int(start), int(stop))
        blank = np.full(len(ids), -1, dtype=np.int32)
        arrays = {"request_id": str(i), "prompt_token_ids": blank, "output_token_ids": blank[:0], "routed_experts": ids}
        write(path / f"request_{i:0{width}}.npz", arrays)


def in_order(path: Path, *patterns: str) -> list[Path]:
    """The file, or the folder's files that match, by the numbers in their names. CallerError for a folder of none."""
    if not path.is_dir():
        return [path]
    found = sorted({each for pattern in patterns for each in path.glob(pattern)}, key=_by_number)
    if not found:
        raise CallerError(f"{path}: no {' or '.join(patterns)} in this folder. Name the folder that holds them.")
    return found


def _by_number(path: Path) -> tuple[list[int | str], str]:
    parts: list[int | str] = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    return parts, path.name
