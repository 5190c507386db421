"""Reads usage out of an engine's answer while it is relayed, and never changes a byte of it. Called by move.py.

    streamed   whole SSE events are let through as they end; the beginning of one is held back until its end is here, so
               that a broken stream can still end with an error event that a client understands
    whole      one JSON document

Where the engine names no usage, events that carry content are counted and the result is marked as an estimate.
"""

from typing import Any

import msgspec

from outrider.agents.events import Usage

ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
HELD_BYTES = 1024 * 1024  # a longer unfinished event is let through as it is
WHOLE_BYTES = 16 * 1024 * 1024  # a longer document is not read


class Details(msgspec.Struct):
    cached_tokens: int | None = None
    external_tokens: int | None = None


class Reported(msgspec.Struct):
    """`usage` of both dialects."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None  # Anthropic: without what the cache held
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class Message(msgspec.Struct):
    usage: Reported | None = None


class Document(msgspec.Struct):
    usage: Reported | None = None
    message: Message | None = None  # Anthropic's message_start


DOCUMENT = msgspec.json.Decoder(Document)


class Answer:
    """One answer under way."""

    def __init__(self, streamed: bool) -> None:
        self.streamed = streamed
        self.ended = False  # [DONE] or message_stop was seen
        self._held = b""
        self._whole: list[bytes] = []
        self._whole_bytes = 0
        self._events = 0
        self._reported: Reported | None = None

    def push(self, chunk: bytes) -> bytes:
        """Take what the engine sent; return what may go to the client now."""
        if not self.streamed:
            self._whole_bytes += len(chunk)
            if self._whole_bytes <= WHOLE_BYTES:
                self._whole.append(chunk)
            return chunk
        data = self._held + chunk if self._held else chunk
        end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in ENDS)
        if not end and len(data) > HELD_BYTES:
            end = len(data)
        self._held = data[end:]
        ready = data[:end] if self._held else data
        self._read(ready)
        return ready

    def rest(self) -> bytes:
        """The answer ended well: what was still held back."""
        held, self._held = self._held, b""
        self._read(held)
        return held

    def complete(self) -> bool:
        """Did it reach its own end? Asked where nothing else tells, when the engine just closes the connection."""
        if self.streamed:
            return self.ended
        try:
            msgspec.json.decode(b"".join(self._whole), type=msgspec.Raw)
        except msgspec.DecodeError:
            return False
        return True

    def usage(self) -> Usage | None:
        """None when nothing could be learned."""
        if not self.streamed:
            self._report(b"".join(self._whole))
        if self._reported is None:
            return Usage(output_tokens=self._events) if self.streamed and self._events else None
        return _usage(self._reported, self._events)

    def _read(self, ready: bytes) -> None:
        for line in ready.splitlines():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.ended = True
                continue
            if b'"usage"' in data:
                self._report(data)
            if b'"message_stop"' in data:
                self.ended = True
            if b'"delta"' in data or b'"text"' in data:
                self._events += 1

    def _report(self, data: bytes) -> None:
        """Merge what one document says; later numbers win, as they are cumulative in both dialects."""
        try:
            document = DOCUMENT.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        said = document.usage or (document.message.usage if document.message else None)
        if said is None:
            return
        if self._reported is None:
            self._reported = said
            return
        for name in said.__struct_fields__:
            value: Any = getattr(said, name)
            if value is not None:
                setattr(self._reported, name, value)


def _usage(said: Reported, events: int) -> Usage:
    """One vocabulary for both dialects. Negative or absent numbers count as nothing."""
    if said.prompt_tokens is None and said.input_tokens is not None:
        read, created = said.cache_read_input_tokens or 0, said.cache_creation_input_tokens or 0
        prompt, cached, external = said.input_tokens + read + created, read, 0
    else:
        details = said.prompt_tokens_details or Details()
        prompt, cached, external = said.prompt_tokens or 0, details.cached_tokens or 0, details.external_tokens or 0
    output = said.completion_tokens if said.completion_tokens is not None else said.output_tokens
    return Usage(
        prompt_tokens=max(0, prompt),
        output_tokens=max(0, events if output is None else output),
        cached_tokens=max(0, min(cached, prompt)),
        external_tokens=max(0, min(external, cached)),
        estimated=output is None,
    )


def error_event(path: str, why: str) -> bytes:
    """The SSE event that ends a broken stream, in the dialect of `path`. Stands after a whole event."""
    body = msgspec.json.encode(error_body(path, 502, why))
    return b"event: error\ndata: " + body + b"\n\n" if path == "/v1/messages" else b"data: " + body + b"\n\n"


def error_body(path: str, status: int, why: str) -> dict[str, Any]:
    """An error document in the dialect of `path`."""
    if path == "/v1/messages":
        kinds = {
            400: "invalid_request_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
        }
        return {"type": "error", "error": {"type": kinds.get(status, "api_error"), "message": why}}
    kind = (
        "invalid_request_error" if status < 500 and status != 429 else "engine_error" if status != 429 else "queue_full"
    )
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}
