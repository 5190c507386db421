"""What goes through the gateway comes out as it went in: bodies, headers, streams. Correctness list 4 and 16, live."""

import json
from typing import Any

import pytest

TOOL_CALLS = (
    b'data: {"id":"c1","choices":[{"index":0,"delta":{"role":"assistant","tool_calls":[{"index":0,"id":"t1","type":'
    b'"function","function":{"name":"read","arguments":""}}]}}]}\n\n'
    b'data: {"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}}]}\n\n'
    b": a comment keeps the line open\n\n"
    b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":5,"total_tokens":14}}\n\n'
    b"data: [DONE]\n\n"
)
CRLF = 'data: {"choices":[{"delta":{"content":"zwölf Boxkämpfer – 拳"}}]}\r\n\r\ndata: [DONE]\r\n\r\n'.encode()
ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":11,'
    b'"cache_read_input_tokens":100,"cache_creation_input_tokens":5,"output_tokens":1}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n'
    b"event: message_delta\n"
    b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":23}}'
    b"\n\n"
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
UNFINISHED = b'data: {"choices":[{"delta":{"content":"no end'  # an engine that ends in mid-event, in good order


@pytest.mark.parametrize("behave", ["well", "one_byte"])
@pytest.mark.parametrize(
    "said", [TOOL_CALLS, CRLF, ANTHROPIC, UNFINISHED, b""], ids=["tools", "crlf", "anthropic", "cut", "empty"]
)
async def test_a_stream_is_relayed_byte_for_byte(farm: Any, door: Any, behave: str, said: bytes) -> None:
    engine, *_ = engines = await farm(1)
    engine.answer, engine.behave = said, behave
    gate = await door(engines)
    async with gate.post({"stream": True}) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert await answer.read() == said


async def test_the_first_bytes_do_not_wait_for_the_last(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.behave = "hang_middle"
    gate = await door(engines)
    async with gate.post({"stream": True}) as answer:
        first = await answer.content.readany()
        assert first.startswith(b"data: ")
        assert first.endswith(b"\n\n"), "whole events only"


async def test_body_and_headers_reach_the_engine_unchanged(farm: Any, door: Any) -> None:
    """Unknown fields, odd spacing, duplicate keys and headers, secrets: all as they came, hop-by-hop ones dropped."""
    engine, *_ = engines = await farm(1)
    gate = await door(engines)
    body = b'{ "model" :"m", "messages":[], "future": {"a": [1, 2.50, 1e400]}, "model": "m","tools":[{"x":"\\u00fc"}]}'
    headers = [
        ("Authorization", "Bearer sk-1"),
        ("x-api-key", "k2"),
        ("anthropic-version", "2023-06-01"),
        ("anthropic-beta", "a"),
        ("anthropic-beta", "b"),
        ("X-Unknown", "ünicode"),
        ("Content-Type", "application/json; charset=utf-8"),
        ("X-Hop", "gone"),
        ("Connection", "keep-alive, X-Hop"),
        ("TE", "trailers"),
        ("Outrider-Role", "coder"),
    ]
    async with gate.post(body, path="/v1/messages?beta=true&x=%2F", headers=headers) as answer:
        call_id = answer.headers["Outrider-Request-Id"]
        assert answer.status == 200
    path, raw, got = engine.seen[0]
    seen = [(name.decode().lower(), value.decode()) for name, value in raw]
    assert (path, got) == ("/v1/messages?beta=true&x=%2F", body)
    for name, value in headers[:7]:
        assert (name.lower(), value) in seen
    assert ("outrider-role", "coder") in seen
    assert dict(seen)["x-request-id"] == call_id
    assert not {"x-hop", "te", "transfer-encoding"} & dict(seen).keys()


async def test_only_our_own_object_is_stripped(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    gate = await door(engines)
    body = b'{"model": "m", "outrider": {"role": "coder", "workflow": "w"}, "n": 1.50, "messages": [ ]}'
    async with gate.post(body, headers={"Outrider-Workflow": "wins"}) as answer:
        story = await gate.get(answer.headers["Outrider-Explain"])
    assert engine.seen[0][2] == b'{"model":"m","n":1.50,"messages":[ ]}'
    assert story["identity"]["workflow"] == "wins"
    assert story["identity"]["role"] == "coder"
    assert story["identity"]["sources"] == {"workflow": "header", "role": "body"}


async def test_replies_keep_the_engines_headers_and_add_only_ours(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.headers = {"X-Engine": "e", "Set-Cookie": "a=1", "Retry-After": "7"}
    engine.status = 418
    gate = await door(engines)
    async with gate.post({}) as answer, gate.session.post(engine.url + "/v1/chat/completions", data=b"{}") as direct:
        assert answer.status == 418
        added = {name for name in answer.headers if name not in direct.headers}
        assert await answer.read() == await direct.read()
    assert added == {"Outrider-Request-Id", "Outrider-Engine", "Outrider-Queued-Ms", "Outrider-Explain"}


async def test_a_body_that_is_no_json_is_the_engines_to_judge(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    gate = await door(engines)
    for body in (b"", b"[1]", b'{"a":', b"\xff\xfe", b'{"model": 5, "messages": "x", "max_tokens": "many"}'):
        async with gate.post(body) as answer:
            assert answer.status == 200
        assert engine.seen[-1][2] == body


@pytest.mark.parametrize(
    ("said", "streamed", "wanted"),
    [
        (TOOL_CALLS, True, (9, 5, 0, False)),
        (CRLF, True, (0, 1, 0, True)),
        (ANTHROPIC, True, (116, 23, 100, False)),
        (b'{"usage": {"input_tokens": 3, "output_tokens": 4}}', False, (3, 4, 0, False)),
        (b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}', False, (3, 4, 0, False)),
    ],
)
async def test_usage_is_read_or_estimated(farm: Any, door: Any, said: bytes, streamed: bool, wanted: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.answer = said
    gate = await door(engines)
    async with gate.post({"stream": streamed}) as answer:
        await answer.read()
        story = await gate.get(answer.headers["Outrider-Explain"])
    actual = story["actual"]
    got = tuple(actual[name] for name in ("prompt_tokens", "output_tokens", "cached_tokens", "estimated"))
    assert got == wanted


async def test_explain_tells_why(farm: Any, door: Any) -> None:
    """Queued behind whom, which engine and its seconds, predicted against actual, identity and timings."""
    engine, *_ = engines = await farm(1)
    engine.delay_s = 0.05
    gate = await door(engines, credit=1)
    import asyncio

    async def ask(role: str) -> Any:
        async with gate.post({"max_tokens": 50}, headers={"Outrider-Workflow": role, "Outrider-Role": role}) as answer:
            await answer.read()
            return answer.headers

    first, second, third = await asyncio.gather(ask("a"), ask("b"), ask("c"))
    story = await gate.get(third["Outrider-Explain"])
    assert story["state"] == "settle"
    assert story["queued"]["waited"]
    assert story["queued"]["position"] == 2
    assert story["queued"]["ahead"] == [second["Outrider-Request-Id"]]
    assert story["queued"]["free_credit"] == {engine.url: 0}
    attempt = story["attempts"][0]
    assert attempt["engine"] == engine.url == third["Outrider-Engine"]
    assert attempt["scores_s"][0]["total_s"] >= attempt["scores_s"][0]["prefill_s"] >= 0
    assert story["predicted"]["bound_tokens"] <= 50
    assert story["actual"]["output_tokens"] == 7
    assert story["timings"]["queued_s"] > 0.04
    assert int(third["Outrider-Queued-Ms"]) == round(1000 * story["timings"]["queued_s"])
    assert first["Outrider-Queued-Ms"] == "0"
    assert (await gate.get("/v1/outrider/requests/call-none"))["error"]["code"] == 404


async def test_the_other_pages(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(2)
    gate = await door(engines)
    async with gate.post({"max_tokens": 9}) as answer:
        await answer.read()
    stats = await gate.get("/v1/outrider/stats")
    assert (stats["calls"], stats["answered"], stats["used_tokens"]) == (1, 1, 47)
    assert stats["reserved_tokens"] <= stats["max_tokens_reserved"]
    assert stats["engines"][engine.url]["kv_tokens"] == 16000
    assert (await gate.get("/v1/models"))["data"][0]["id"] == "m"
    assert (await gate.get("/health"))["status"] == "ok"
    async with gate.session.get(gate.url + "/metrics") as answer:
        text = await answer.text()
    assert 'outrider_calls_total{ending="settle",status="200"} 1.0' in text
    assert "outrider_engine_reserved_tokens" in text
    for path in ("/", "/v1/embeddings", "/v1/messages/count_tokens"):
        async with gate.session.post(gate.url + path, data=b"{}") as answer:
            assert answer.status == 404
            assert path in json.dumps(await answer.json())
    async with gate.session.get(gate.url + "/v1/messages") as answer:
        assert answer.status == 405
        assert (await answer.json())["type"] == "error", "in Anthropic's dialect"
