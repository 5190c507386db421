"""A prompt as a chain of digests, so that two prompts' common beginning is seen without keeping their text. Pure.

messages      [tools] [system] message message ...        long ones cut in pieces of PIECE characters
canonical     keys sorted, `cache_control` left out: Claude Code moves that mark from turn to turn
chain         digest(n) = blake2b(digest(n-1) + piece n), seeded with path and model
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from outrider.agents.events import Link

PIECE = 1024  # characters
MOST_LINKS = 1024  # of a longer prompt only the beginning is chained; its length still counts


def digest(data: bytes, before: str = "") -> str:
    """16 hex digits."""
    return blake2b(data, digest_size=8, key=before.encode()).hexdigest()


def read_chain(path: str, model: str, fields: Mapping[str, msgspec.Raw]) -> tuple[tuple[Link, ...], int]:
    """The chain of a request body's prompt, and the whole prompt's characters. Malformed parts are left out."""
    links: list[Link] = []
    tip = digest(f"{path} {model}".encode(errors="replace"))
    chars = 0
    for text in _texts(fields):
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            chars += len(piece)
            if len(links) < MOST_LINKS:
                tip = digest(piece, tip)
                links.append(Link(tip, len(piece)))
    return tuple(links), chars


def _texts(fields: Mapping[str, msgspec.Raw]) -> Iterator[bytes]:
    """The prompt's parts in the order in which chat templates lay them out."""
    for name in ("tools", "system", "messages", "prompt"):
        value = _decoded(fields.get(name))
        if name == "messages" and isinstance(value, list):
            yield from (_canonical(message) for message in value)
        elif name == "prompt" and isinstance(value, str):
            yield value.encode(errors="replace")
        elif value:
            yield _canonical(value)


def _decoded(raw: msgspec.Raw | None) -> Any:
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _canonical(value: Any) -> bytes:
    try:
        return msgspec.json.encode(_unmarked(value), order="sorted")
    except (UnicodeEncodeError, RecursionError):
        return b""


def _unmarked(value: Any) -> Any:
    """`value` without any `cache_control`."""
    if isinstance(value, dict):
        return {key: _unmarked(member) for key, member in value.items() if key != "cache_control"}
    if isinstance(value, list):
        return [_unmarked(member) for member in value]
    return value
