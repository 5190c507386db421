"""Who speaks and what is asked: headers and body -> Call. Pure; called by the gateway for every request.

Precedence, first match wins field by field, all sources kept for explain:
    Outrider-* headers > body "outrider" > agentic_context, Dynamo, SMG > Claude Code, Codex, OpenCode, LiteLLM, AIPerf
    > body metadata > baggage > prompt_cache_key > inferred from the prompt (policy) > unknown
Ids are claims by the client, never authorisation. Malformed ones are ignored and said so; nothing here ever raises.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec

from outrider.agents.events import Call, Identity
from outrider.agents.prompt import digest, read_chain

LIMIT_CHARS = 128  # a longer id is replaced by its digest: it still groups, and cannot fill a log
OWN = ("workflow", "role", "stage", "parent", "class", "deadline", "next", "final")
HEADERS: tuple[tuple[str, str, str], ...] = (  # field, header, contract; in order of precedence
    *((name, f"outrider-{name}", "header") for name in OWN),
    ("workflow", "x-dynamo-session-id", "dynamo"),
    ("parent", "x-dynamo-parent-session-id", "dynamo"),
    ("final", "x-dynamo-session-final", "dynamo"),
    ("workflow", "x-smg-routing-key", "smg"),
    ("class", "x-smg-priority", "smg"),
    ("workflow", "x-claude-code-session-id", "claude-code"),
    ("role", "x-claude-code-agent-type", "claude-code"),
    ("role", "x-claude-code-request-class", "claude-code"),
    ("parent", "x-claude-code-parent-agent-id", "claude-code"),
    ("workflow", "session-id", "codex"),
    ("role", "x-openai-subagent", "codex"),
    ("parent", "x-codex-parent-thread-id", "codex"),
    ("workflow", "x-session-id", "opencode"),
    ("workflow", "x-session-affinity", "opencode"),
    ("parent", "x-parent-session-id", "opencode"),
    ("workflow", "x-litellm-session-id", "litellm"),
    ("workflow", "x-correlation-id", "aiperf"),
)
CLASSES = {
    "interactive": "interactive",
    "system": "interactive",
    "default": "interactive",
    "batch": "batch",
    "bulk": "batch",
    "flex": "batch",
}
RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
CLAUDE_SESSION = re.compile(r"session_([0-9a-fA-F-]{36})")
Claim = tuple[str, str, str]  # field, value, source


def read_call(
    call_id: str,
    path: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    *,
    tenant: str = "",
    wall_s: float = 0.0,
) -> tuple[Call, bytes]:
    """The call, and the body to forward: the same bytes, or without its "outrider" key.

    path    /v1/chat/completions, /v1/completions or /v1/messages
    tenant  a digest that keeps equal ids of different clients apart; "" where there is one client
    wall_s  seconds since the epoch, to read an absolute deadline
    A body that is no JSON object is forwarded as it is: the engine will say what is wrong with it.
    """
    fields = _object(body)
    own = fields.pop("outrider", None)
    if own is not None:
        members = (msgspec.json.encode(key) + b":" + bytes(raw) for key, raw in fields.items())
        body = b"{" + b",".join(members) + b"}"
    identity = identify(headers, fields, own, wall_s)
    model = _text(fields, "model")
    chain, chars = read_chain(path, model, fields)
    limits = (_number(fields, name) for name in ("max_completion_tokens", "max_tokens"))
    max_tokens = next((int(limit) for limit in limits if limit is not None and limit >= 1), None)
    stream = bytes(fields.get("stream", b"")).strip() == b"true"
    call = Call(call_id, identity, path, tenant, model[:LIMIT_CHARS], stream, chars, max_tokens, chain)
    return call, body


def identify(
    headers: Sequence[tuple[str, str]],
    fields: Mapping[str, msgspec.Raw],
    own: msgspec.Raw | None = None,
    wall_s: float = 0.0,
) -> Identity:
    """Merge all claims by precedence. `fields` are the body's members, `own` its "outrider" member."""
    seen: dict[str, str] = {}
    ignored: list[str] = []
    for name, value in headers:
        key = name.lower()
        if key in seen and seen[key] != value and key.startswith(("outrider-", "x-claude-code-", "x-session")):
            ignored.append(f"a second {key}")
        seen.setdefault(key, value)

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field, value, source in _claims(seen, fields, own, ignored):
        cleaned = _clean(field, value, wall_s)
        if cleaned is None:
            ignored.append(f"{field} from {source}")
        elif field not in values:
            values[field] = cleaned
            sources[field] = source
    return Identity(
        workflow=values.get("workflow", ""),
        role=values.get("role", ""),
        stage=values.get("stage", ""),
        parent=values.get("parent", ""),
        klass=values.get("class", ""),
        next_role=values.get("next", ""),
        deadline_s=values.get("deadline"),
        final=values.get("final", False),
        sources=sources,
        ignored=tuple(ignored[:8]),
    )


def _claims(
    headers: Mapping[str, str], fields: Mapping[str, msgspec.Raw], own: msgspec.Raw | None, ignored: list[str]
) -> Iterable[Claim]:
    """Every claim that the request makes, best source first."""
    split = len(OWN)
    yield from ((field, headers[name], source) for field, name, source in HEADERS[:split] if name in headers)
    if own is not None:
        members = _plain(own)
        if not isinstance(members, dict):
            ignored.append("outrider from body")
        else:
            yield from ((name, _string(members[name]), "body") for name in OWN if name in members)
    yield from _agentic_context(fields)
    yield from ((field, headers[name], source) for field, name, source in HEADERS[split:] if name in headers)
    if "x-claude-code-session-id" in headers:
        yield "role", "subagent" if "x-claude-code-agent-id" in headers else "main", "claude-code"
        if "x-claude-code-compaction" in headers:
            yield "stage", "compaction", "claude-code"
    metadata = _plain(fields.get("metadata"))
    if isinstance(metadata, dict):
        if isinstance(metadata.get("session_id"), str):
            yield "workflow", metadata["session_id"], "metadata"
        match = CLAUDE_SESSION.search(_string(metadata.get("user_id", "")))
        if match:
            yield "workflow", match[1], "metadata"
    baggage = dict(pair.strip().partition("=")[::2] for pair in headers.get("baggage", "").split(",")[:64])
    for field, name in (("workflow", "gen_ai.conversation.id"), ("role", "gen_ai.agent.name")):
        if name in baggage:
            yield field, unquote(baggage[name].partition(";")[0]), "baggage"
    if "prompt_cache_key" in fields:
        yield "workflow", _text(fields, "prompt_cache_key"), "prompt_cache_key"
    if _text(fields, "service_tier") == "flex":
        yield "class", "flex", "service_tier"


def _agentic_context(fields: Mapping[str, msgspec.Raw]) -> Iterable[Claim]:
    """vllm_xargs.agentic_context: an object, or a JSON string of at most 16 KiB."""
    xargs = _plain(fields.get("vllm_xargs"))
    context = xargs.get("agentic_context") if isinstance(xargs, dict) else None
    if isinstance(context, str) and len(context) <= 16384:
        context = _plain(msgspec.Raw(context.encode(errors="replace")))
    if isinstance(context, dict):
        for field, name in (
            ("workflow", "program_id"),
            ("workflow", "session_id"),
            ("role", "agent_role"),
            ("parent", "parent_program_id"),
        ):
            if isinstance(context.get(name), str):
                yield field, context[name], "agentic_context"


def _clean(field: str, value: str, wall_s: float) -> Any:
    """A claim's value in our terms; None when it is malformed."""
    value = value.strip()
    if not value or not value.isprintable():
        return None
    match field:
        case "final":
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
        case "class":
            return CLASSES.get(value.lower())
        case "deadline":
            return _deadline_s(value, wall_s)
        case _:
            return value if len(value) <= LIMIT_CHARS else f"digest:{digest(value.encode(errors='replace'))}"


def _deadline_s(value: str, wall_s: float) -> float | None:
    """`30s`, `30` or RFC 3339 -> seconds from now, within a year; None when malformed."""
    moment = RFC3339.fullmatch(value)
    try:
        seconds = float(value.removesuffix("s")) if moment is None else _epoch_s(moment) - wall_s
    except ValueError:
        return None
    return seconds if 0 < seconds < 31_536_000 else None


def _epoch_s(moment: re.Match[str]) -> float:
    """Seconds since 1970 of an RFC 3339 moment; leap seconds do not count. Days by the civil calendar from 1 March."""
    year, month, day, hour, minute, second = (int(part) for part in moment.groups()[:6])
    fraction, zone = float(moment[7] or 0), moment[8]
    year -= month <= 2
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * ((month - 3) % 12) + 2) // 5 + day - 719_469
    offset_s = 0 if zone in "Zz" else (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[4:6]) * 60)
    return days * 86_400 + hour * 3600 + minute * 60 + second + fraction - offset_s


def _object(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _plain(raw: msgspec.Raw | None) -> Any:
    """A member's value; None when absent or malformed."""
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _string(value: Any) -> str:
    """true -> "true", 30 -> "30"; anything but a string, number or boolean -> ""."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else ""


def _text(fields: Mapping[str, msgspec.Raw], name: str) -> str:
    value = _plain(fields.get(name))
    return value if isinstance(value, str) else ""


def _number(fields: Mapping[str, msgspec.Raw], name: str) -> float | None:
    value = _plain(fields.get(name))
    return min(float(value), 1e9) if isinstance(value, int | float) and not isinstance(value, bool) else None
