"""What clients and server say over the Unix socket: a 4-byte length, then one msgpack message. Pure.

A client opens with Hello and is answered by Welcome, with the arena's file descriptor, or by Refusal. Requests carry
the client's own number and are answered under it, in any order; Release, Remember, Ask and Withdraw are not answered.
Keys travel joined, 16 bytes each. Refusal with request 0 ends the connection.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from outrider.errors import CallerError
from outrider.memory.events import Span
from outrider.memory.keys import KEY_BYTES
from outrider.wants import Want

VERSION = 1
FRAME_MAX_BYTES = 16 << 20


class Hello(msgspec.Struct, frozen=True, tag=True):
    version: int
    name: str


class Lookup(msgspec.Struct, frozen=True, tag=True):
    request: int
    keys: bytes


class Lease(msgspec.Struct, frozen=True, tag=True):
    request: int
    keys: bytes
    timeout_s: float


class Release(msgspec.Struct, frozen=True, tag=True):
    lease: int


class Prepare(msgspec.Struct, frozen=True, tag=True):
    request: int
    keys: bytes
    size_bytes: int


class Complete(msgspec.Struct, frozen=True, tag=True):
    request: int
    keys: bytes
    checksums: tuple[int, ...]
    durable: bool


class Abandon(msgspec.Struct, frozen=True, tag=True):
    request: int
    keys: bytes


class Remember(msgspec.Struct, frozen=True, tag=True):
    path: str
    keys: bytes


class Ask(msgspec.Struct, frozen=True, tag=True):
    want: Want


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    item: str


class Flush(msgspec.Struct, frozen=True, tag=True):
    request: int


class Stats(msgspec.Struct, frozen=True, tag=True):
    request: int


Request = Hello | Lookup | Lease | Release | Prepare | Complete | Abandon | Remember | Ask | Withdraw | Flush | Stats


class Welcome(msgspec.Struct, frozen=True, tag=True):
    version: int
    arena_bytes: int


class Count(msgspec.Struct, frozen=True, tag=True):
    request: int
    count: int


class Spans(msgspec.Struct, frozen=True, tag=True):
    request: int
    spans: tuple[Span | None, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    request: int
    failed: tuple[str, ...]


class Numbers(msgspec.Struct, frozen=True, tag=True):
    request: int
    numbers: dict[str, Any]


class Refusal(msgspec.Struct, frozen=True, tag=True):
    request: int
    why: str


Reply = Welcome | Count | Spans | Done | Numbers | Refusal


def frame(message: Request | Reply) -> bytes:
    """A message as it goes over the socket."""
    body = msgspec.msgpack.encode(message)
    if len(body) > FRAME_MAX_BYTES:
        raise CallerError(f"a {type(message).__name__} of {len(body)} bytes is too long for one request. Ask in parts.")
    return len(body).to_bytes(4, "little") + body


def take_frame(buffer: bytearray) -> bytes | None:
    """Cut the first whole message off `buffer`; None where it is not whole yet. ValueError: no such length."""
    if len(buffer) < 4:
        return None
    size = int.from_bytes(buffer[:4], "little")
    if size > FRAME_MAX_BYTES:
        raise ValueError(f"a message of {size} bytes; at most {FRAME_MAX_BYTES} are allowed")
    if len(buffer) < 4 + size:
        return None
    body = bytes(buffer[4 : 4 + size])
    del buffer[: 4 + size]
    return body


def join(keys: Sequence[bytes]) -> bytes:
    """Keys for the wire; CallerError for anything that is no key."""
    for key in keys:
        if len(key) != KEY_BYTES:
            raise CallerError(f"key {key.hex()!r} has {len(key)} bytes, not {KEY_BYTES}. Use those of KeySpace.chain.")
    return b"".join(keys)


def split(keys: bytes) -> tuple[str, ...]:
    """Keys off the wire, in hex; ValueError where a part of one is left over."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes of keys are no multiple of {KEY_BYTES}")
    digits = keys.hex()
    return tuple(digits[start : start + 2 * KEY_BYTES] for start in range(0, len(digits), 2 * KEY_BYTES))
