"""Routes in the answers of engines: vLLM, SGLang and Outrider's own. A door; called by `formats.py`.

vLLM, nested lists or base64 of an npy array, two forms:
    `prompt_routed_experts` (of the answer or the choice) [prompt, layers, top_k] and `routed_experts` of the choice
    [generated, layers, top_k]: rows missing at the end are those of the last tokens;
    `routed_experts` of the choice alone: prompt and generated tokens but the last; where rows are missing they are the
    first (`routed_experts_prompt_start`).
Outrider's engine: the first form, in the choice, with a row for every token.
SGLang: base64 of flat int32 (or `routed_experts_dtype`) in `meta_info` or the choice's `sgl_ext`, rows
    [`routed_experts_start_len`, tokens - 1). The shape is not in the answer: it follows from the token counts and from
    `layers` or `top_k`. Rows before the start come from the earlier answer of the same `session_id`; without one they
    are unknown.

Rows of -1 are missing. Each choice of an answer is a sequence.
"""

import base64
import binascii
import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters.filling import Ask, Extent, Filling, token_rows
from outrider.experts.adapters.lines import records
from outrider.experts.adapters.npz import with_gaps
from outrider.experts.routing import Ids, Routing, smallest

Record = Mapping[str, Any]


@dataclass
class Part:
    """One sequence: rows of the tokens from `start` on; tokens before and after have none."""

    tokens: int
    start: int
    rows: Ids


def is_sglang(record: Record) -> bool:
    if isinstance(record.get("meta_info"), Mapping):
        return "routed_experts" in record["meta_info"]
    return any(_sgl_ext(choice) is not None for choice in choices(record))


def is_vllm(record: Record) -> bool:
    return "prompt_routed_experts" in record or any("routed_experts" in choice for choice in choices(record))


def is_engine(record: Record) -> bool:
    return any("prompt_routed_experts" in choice for choice in choices(record))


def choices(record: Record) -> list[Record]:
    found = record.get("choices")
    return [choice for choice in found if isinstance(choice, Mapping)] if isinstance(found, list) else []


def _sgl_ext(choice: Record) -> Any:
    return next(
        (choice[name] for name in ("sgl_ext", "sglext", "meta_info") if isinstance(choice.get(name), Mapping)), None
    )


def read_vllm(path: Path, ask: Ask) -> Routing:
    """Answers of vLLM, or of Outrider's engine, which has the same names."""
    return _vllm(records(path), ask, str(path))


def from_vllm(answers: Iterable[Record], ask: Ask | None = None) -> Routing:
    """The same from answers in memory. CallerError names an answer by its number, from 1."""
    return _vllm(((f"answer {i}", answer) for i, answer in enumerate(answers, start=1)), ask or Ask(), "answers")


def _vllm(found: Iterable[tuple[str, Record]], ask: Ask, where: str) -> Routing:
    return _joined(deque(part for name, record in found for part in vllm_parts(record, name)), ask, where)


def vllm_parts(record: Record, where: str) -> Iterator[Part]:
    """The sequences of one answer. CallerError where rows cannot be matched with tokens."""
    usage = record.get("usage") or {}
    found = choices(record)
    for i, choice in enumerate(found):
        name = where if len(found) == 1 else f"{where}, choice {i}"
        prompt_ids = choice.get("prompt_token_ids") or record.get("prompt_token_ids")
        prompt = len(prompt_ids) if prompt_ids is not None else usage.get("prompt_tokens")
        output = len(choice["token_ids"]) if choice.get("token_ids") is not None else None
        if output is None and len(found) == 1:
            output = usage.get("completion_tokens")
        before = choice.get("prompt_routed_experts", record.get("prompt_routed_experts"))
        after = choice.get("routed_experts")
        if before is None and after is None:
            raise CallerError(f"{name}: no routed_experts in it. Start vLLM with --enable-return-routed-experts.")
        if before is None and isinstance(after, str):
            yield _one_array(name, _rows(name, after), prompt, output, record.get("routed_experts_prompt_start"))
        else:
            yield _two_arrays(name, _rows(name, before), _rows(name, after), prompt, output)


def _one_array(name: str, rows: Ids, prompt: int | None, output: int | None, start: int | None) -> Part:
    if prompt is None or output is None:
        begin = start or 0
        return Part(begin + len(rows) + 1, begin, rows)  # the last token has no row
    tokens = prompt + output
    begin = max(0, tokens - 1 - len(rows)) if start is None else start
    if begin + len(rows) > tokens:
        raise CallerError(
            f"{name}: {len(rows)} rows from token {begin} for {tokens} tokens. Is it another answer's array?"
        )
    return Part(tokens, begin, rows)


def _two_arrays(name: str, before: Ids, after: Ids, prompt: int | None, output: int | None) -> Part:
    prompt = len(before) if prompt is None else prompt
    output = len(after) if output is None else output
    if len(before) not in (0, prompt) or len(after) > output:
        raise CallerError(
            f"{name}: {len(before)} rows for {prompt} prompt tokens, {len(after)} for {output} generated. Nothing says"
            " which are missing: mark them by rows of -1."
        )
    if not len(before):
        return Part(prompt + output, prompt, after)
    rows = before if not len(after) else np.concatenate([before, after])
    return Part(prompt + output, 0, rows)


def _rows(name: str, value: Any) -> Ids:
    """Rows in the smallest type that holds them; none for None or an empty list."""
    if value is None or (isinstance(value, list) and not value):
        return np.zeros((0, 0, 0), dtype=np.int8)
    try:
        if isinstance(value, str):
            array = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        else:
            array = np.array(value, dtype=np.int32)
    except (ValueError, EOFError, TypeError, binascii.Error) as error:
        raise CallerError(
            f"{name}, routed_experts: {error}. Give nested lists, or base64 of an array that numpy.save wrote."
        ) from error
    return _small(token_rows(f"{name}, routed_experts", array))


def _small(rows: Ids) -> Ids:
    if not rows.size:
        return rows
    return rows.astype(smallest(int(rows.max()), bool(rows.min() < 0)), copy=False)


def read_sglang(path: Path, ask: Ask) -> Routing:
    """Answers of /generate, /v1/completions and /v1/chat/completions."""
    return _sglang(records(path), ask, str(path))


def from_sglang(answers: Iterable[Record], ask: Ask | None = None) -> Routing:
    """The same from answers in memory. CallerError names an answer by its number, from 1."""
    return _sglang(((f"answer {i}", answer) for i, answer in enumerate(answers, start=1)), ask or Ask(), "answers")


def _sglang(found: Iterable[tuple[str, Record]], ask: Ask, name: str) -> Routing:
    parts: list[Part] = []
    at_session: dict[str, int] = {}
    shape = (ask.layers, ask.top_k)
    for where, record in found:
        for i, (info, prompt, output) in enumerate(_infos(record, where)):
            part = _flat(f"{where}, routed_experts", info, prompt, output, shape)
            session = info.get("session_id", record.get("session_id"))
            key = None if session is None else f"{session}/{i}"
            if key is not None and key in at_session:
                parts[at_session[key]] = _stitched(where, parts[at_session[key]], part)
                continue
            if key is not None:
                at_session[key] = len(parts)
            parts.append(part)
    return _joined(deque(parts), ask, name)


def _infos(record: Record, where: str) -> Iterator[tuple[Record, int | None, int | None]]:
    """The mapping that holds the routes, and prompt and generated tokens."""
    if isinstance(record.get("meta_info"), Mapping):
        info = record["meta_info"]
        output = info.get("completion_tokens")
        yield info, info.get("prompt_tokens"), len(record["output_ids"]) if "output_ids" in record else output
        return
    usage = record.get("usage") or {}
    found = choices(record)
    for choice in found:
        info = _sgl_ext(choice)
        if info is None or info.get("routed_experts") is None:
            raise CallerError(f'{where}: no routed_experts in it. Ask SGLang with "return_routed_experts": true.')
        yield info, usage.get("prompt_tokens"), usage.get("completion_tokens") if len(found) == 1 else None


def _flat(name: str, info: Record, prompt: Any, output: Any, shape: tuple[int | None, int | None]) -> Part:
    start = int(info.get("routed_experts_start_len") or 0)
    kind = info.get("routed_experts_dtype") or "int32"
    if info.get("routed_experts") is None:
        raise CallerError(f'{name}: not there. Ask SGLang with "return_routed_experts": true.')
    try:
        flat = np.frombuffer(base64.b64decode(info["routed_experts"], validate=True), dtype=np.dtype(kind))
    except (ValueError, TypeError, binascii.Error) as error:
        raise CallerError(f"{name}: {error}. SGLang sends base64 of {kind}; was the answer cut?") from error
    layers, top_k = info.get("routed_experts_shape", shape)
    tokens = None if prompt is None or output is None else int(prompt) + int(output)
    if tokens is not None and not (layers and top_k):
        rows = tokens - 1 - start
        width = len(flat) // rows if rows > 0 and len(flat) % rows == 0 else 0
        layers = layers or (width // top_k if top_k and width % top_k == 0 else None)
        top_k = top_k or (width // layers if layers and width % layers == 0 else None)
    if not layers or not top_k or len(flat) % (layers * top_k):
        raise CallerError(
            f"{name}: {len(flat)} ids for {tokens} tokens from {start}, layers {layers}, top_k {top_k}. SGLang does not"
            " send the shape: give the model's number of layers (--layers) and experts per token (--top-k)."
        )
    rows_TLK = _small(flat.reshape(-1, layers, top_k))
    tokens = start + len(rows_TLK) + 1 if tokens is None else tokens
    if start + len(rows_TLK) > tokens:
        raise CallerError(
            f"{name}: {len(rows_TLK)} rows from token {start} for {tokens} tokens. Do layers and top_k fit this model?"
        )
    return Part(tokens, start, rows_TLK)


def _stitched(where: str, before: Part, part: Part) -> Part:
    """The next turn of a session: rows before its start from the turns before."""
    if part.start > before.start + len(before.rows):
        raise CallerError(
            f"{where}: rows start at token {part.start}, the session's earlier answers end at"
            f" {before.start + len(before.rows)}. Give the answers of a session in order."
        )
    return Part(part.tokens, before.start, np.concatenate([before.rows[: part.start - before.start], part.rows]))


def _joined(parts: deque[Part], ask: Ask, where: str) -> Routing:
    """One table; each part is let go of as soon as it is in."""
    if not parts:
        raise CallerError(f"{where}: no answer with routes. Name a file of answers.")
    extent, shape = Extent(), next((part.rows.shape[1:] for part in parts if len(part.rows)), (0, 0))
    for i, part in enumerate(parts, start=1):
        if len(part.rows) and part.rows.shape[1:] != shape:
            raise CallerError(
                f"{where}, sequence {i}: rows of {part.rows.shape[1:]} layers and ids, the first has {shape}."
                " Give answers of one model."
            )
        if len(part.rows):
            extent.see(part.rows)
    lengths = [part.tokens for part in parts]
    table, at = Filling(sum(lengths), shape[0], shape[1], extent.dtype), 0
    while parts:
        part = parts.popleft()
        if len(part.rows):
            table.put(at + part.start, part.rows)
        at += part.tokens
    return table.routing(lengths, ask)


def write_vllm(routing: Routing, path: Path) -> None:
    """An answer a line, as two nested lists. All tokens stand as prompt: the table does not tell them apart."""
    _write(routing, path, lambda i, rows: _answer(i, len(rows), {}, {"prompt_routed_experts": rows.tolist()}))


def write_engine(routing: Routing, path: Path) -> None:
    """The same as Outrider's engine answers: both lists in the choice."""
    _write(routing, path, lambda i, rows: _answer(i, len(rows), {"prompt_routed_experts": rows.tolist()}, {}))


def write_sglang(routing: Routing, path: Path) -> None:
    """An answer of /generate a line; `routed_experts_shape` [layers, top_k] is ours: it reads without options."""

    def answer(i: int, rows: Ids) -> Record:
        coded = base64.b64encode(rows.astype(np.int32).tobytes()).decode()
        shape = [routing.layers, routing.top_k]
        info = {"id": str(i), "prompt_tokens": len(rows), "completion_tokens": 0, "routed_experts": coded}
        return {"text": "", "output_ids": [], "meta_info": {**info, "routed_experts_shape": shape}}

    _write(routing, path, answer)


def _answer(i: int, tokens: int, choice: Record, top: Record) -> Record:
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    choice = {"index": 0, "text": "", "finish_reason": "length", **choice, "routed_experts": []}
    return {"id": f"cmpl-{i}", "object": "text_completion", **top, "choices": [choice], "usage": usage}


def _write(routing: Routing, path: Path, answer: Any) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as out:
        for i, (start, stop) in enumerate(zip(routing.offsets_S1[:-1], routing.offsets_S1[1:], strict=True)):
            out.write(encoder.encode(answer(i, with_gaps(routing, int(start), int(stop)))) + b"\n")
