"""The HTTP door, over real sockets: shapes, streaming, refusals, aborts, metrics; and ports and signals."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from transformers import AutoTokenizer

from outrider.errors import CallerError
from outrider.lab.engine.forward import Forward
from outrider.lab.engine.request import Limits
from outrider.lab.engine.server import Door, bound
from outrider.lab.processes import free_port


@pytest.fixture
async def client(tiny_moe: Path) -> AsyncIterator[aiohttp.ClientSession]:
    door = Door.open("tiny-moe", Limits(2048, 128, 4), "float32")
    sock = bound("127.0.0.1", 0)
    runner = await door.listen(sock)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}") as session:
        yield session
    await door.close(runner)
    assert not door.engine.thread.is_alive()


async def post(client: aiohttp.ClientSession, path: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    async with client.post(path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def numbers(client: aiohttp.ClientSession) -> dict[str, float]:
    async with client.get("/metrics") as answer:
        lines = [line.rsplit(" ", 1) for line in (await answer.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def until(client: aiohttp.ClientSession, true: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    for _ in range(400):
        if true(seen := await numbers(client)):
            return seen
        await asyncio.sleep(0.02)
    raise AssertionError(seen)


CHAT = {"messages": [{"role": "user", "content": "hello wörld"}]}


async def test_chat_whole_and_streamed_are_the_same(client: aiohttp.ClientSession) -> None:
    asked = {**CHAT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    status, whole = await post(client, "/v1/chat/completions", {"X-Request-Id": "call-7"}, **asked)
    assert status == 200
    assert whole["id"] == "chatcmpl-call-7"
    choice = whole["choices"][0]
    assert (choice["finish_reason"], choice["message"]["role"]) == ("length", "assistant")
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    async with client.post("/v1/chat/completions", json=streamed) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in (await answer.text()).split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-1]) == choice["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    prompt = whole["usage"]["prompt_tokens"]
    details = {"cached_tokens": (prompt - 1) // 16 * 16, "external_tokens": 0}
    assert chunks[-1]["usage"] == {**whole["usage"], "prompt_tokens_details": details}


async def test_completions_take_text_or_tokens_and_return_routes(client: aiohttp.ClientSession, tiny_moe: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(tiny_moe).encode("def main():")
    asked = {"max_tokens": 5, "temperature": 0, "return_routed_experts": True, "ignore_eos": True}
    _, by_text = await post(client, "/v1/completions", prompt="def main():", **asked)
    _, by_ids = await post(client, "/v1/completions", prompt=prompt, **asked)
    (one,), (two,) = by_text["choices"], by_ids["choices"]
    assert one == two
    assert (one["prompt_token_ids"], len(one["token_ids"])) == (prompt, 5)
    for rows, count in (("prompt_routed_experts", len(prompt)), ("routed_experts", 5)):
        assert len(one[rows]) == count
        assert {len(layer) for row in one[rows] for layer in row} == {4}
        assert {len(row) for row in one[rows]} == {4}


async def test_stop_strings(client: aiohttp.ClientSession) -> None:
    asked = {"prompt": "import os", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    _, free = await post(client, "/v1/completions", **asked)
    text = free["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    _, stopped = await post(client, "/v1/completions", **asked, stop=[stop])
    assert stopped["choices"][0] == {**free["choices"][0], "text": text[: text.find(stop)], "finish_reason": "stop"}
    assert stopped["usage"]["completion_tokens"] < 20


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images"),
        ("/v1/chat/completions", {**CHAT, "n": 2}, "n=1"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5000}, "do not fit: this engine holds 2048 tokens"),
        ("/v1/chat/completions", {**CHAT, "temperature": -1}, "temperature"),
        ("/v1/chat/completions", {**CHAT, "priority": "high"}, "priority"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"prompt": [5, 9000]}, "[0, 8192)"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, "stop"),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [9999]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "x", "temperature": float("nan")}, "temperature"),
        ("/v1/completions", {"prompt": "x", "seed": 1 << 64}, "seed"),
        ("/v1/completions", {"prompt": "\ud800"}, "surrogate"),
        ("/v1/completions", {"prompt": "x", "top_p": 0}, "top_p"),
    ],
)
async def test_refusals_name_the_field(client: aiohttp.ClientSession, path: str, body: Any, says: str) -> None:
    status, answer = await post(client, path, **body)
    assert status == 400
    assert says in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


async def test_unknown_model_path_and_broken_json(client: aiohttp.ClientSession) -> None:
    status, answer = await post(client, "/v1/completions", model="gpt", prompt="x")
    assert (status, "tiny-moe" in answer["error"]["message"]) == (404, True)
    assert (await post(client, "/v1/nothing"))[0] == 404
    async with client.post("/v1/completions", data=b"{") as broken:
        assert broken.status == 400


async def test_a_failing_model_answers_everybody(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Forward, "run", fail)
    calls = [post(client, "/v1/completions", prompt="x", stream=False) for _ in range(3)]
    answers = await asyncio.gather(*calls)
    assert {status for status, _ in answers} <= {500, 503}
    assert all("MemoryError: no room" in answer["error"]["message"] for _, answer in answers)
    async with client.get("/health") as answer:
        assert answer.status == 503
    assert (await post(client, "/v1/completions", prompt="x"))[0] == 503
    assert "Traceback" in capfd.readouterr().err


async def test_it_says_what_it_is(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/models") as answer:
        (card,) = (await answer.json())["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny-moe", 2048)
    assert "not the product" in card["description"]
    assert "RANDOM" in card["description"]
    async with client.get("/health") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_closed_connection_aborts(client: aiohttp.ClientSession, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    waiting = [asyncio.ensure_future(post(client, "/v1/completions", **body)) for _ in range(6)]
    seen = await until(client, lambda n: n["vllm:num_requests_running"] == 4 and n["vllm:num_requests_waiting"] == 2)
    assert seen["vllm:kv_cache_usage_perc"] > 0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    gone = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    seen = await until(client, lambda n: all(n[name] == 0 for name in gone))
    assert seen["vllm:generation_tokens_total"] < 6 * 1900


async def test_metrics_count_what_happened(client: aiohttp.ClientSession) -> None:
    for _ in range(2):
        await post(client, "/v1/completions", prompt=list(range(10, 60)), max_tokens=3, temperature=0, ignore_eos=True)
    seen = await numbers(client)
    assert seen['vllm:cache_config_info{block_size="16",num_gpu_blocks="128"}'] == 1
    assert seen["vllm:prompt_tokens_total"] == seen["vllm:prefix_cache_queries_total"] == 100
    assert seen["vllm:prefix_cache_hits_total"] == 48
    assert seen["vllm:generation_tokens_total"] == 6
    assert seen["vllm:time_to_first_token_seconds_count"] == 2
    assert seen["vllm:num_preemptions_total"] == seen["vllm:external_prefix_cache_hits_total"] == 0


async def test_lower_priority_number_goes_sooner(client: aiohttp.ClientSession) -> None:
    done: list[int] = []

    async def call(priority: int) -> None:
        await post(
            client, "/v1/completions", prompt=[9 + priority] * 40, max_tokens=60, ignore_eos=True, priority=priority
        )
        done.append(priority)

    full = [asyncio.ensure_future(call(-9)) for _ in range(4)]
    await until(client, lambda n: n["vllm:num_requests_running"] == 4)
    late = [asyncio.ensure_future(call(9)) for _ in range(4)]
    await until(client, lambda n: n["vllm:num_requests_waiting"] == 4)
    await asyncio.gather(*full, *late, *[asyncio.ensure_future(call(0)) for _ in range(4)])
    assert done == [-9] * 4 + [0] * 4 + [9] * 4


SERVE = "import sys; from outrider.lab.engine.server import serve; serve('tiny-moe', int(sys.argv[1]), 4096)"


def test_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CallerError, match=f"--port {port}: cannot listen on 127.0.0.1 .*choose another port"):
            bound("127.0.0.1", port)


@pytest.mark.slow
def test_a_signal_ends_it_within_a_second_in_the_middle_of_a_step(tiny_moe: Path) -> None:
    body = json.dumps({"prompt": [5] * 4000, "max_tokens": 50, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    numbers = (signal.SIGTERM, signal.SIGINT)
    ports = [free_port() for _ in numbers]
    started = [
        subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stderr=subprocess.PIPE, text=True) for port in ports
    ]
    for process, port, number in zip(started, ports, numbers, strict=True):
        assert process.stderr is not None
        while "ready on" not in (line := process.stderr.readline()):
            assert line, "it ended before it was ready"
        with socket.create_connection(("127.0.0.1", port)) as http:
            http.sendall(head + body)
            time.sleep(0.1)  # the prompt takes a second
            before_s = time.monotonic()
            process.send_signal(number)
            assert process.wait(10) == 0
            assert time.monotonic() - before_s < 1.5  # one second, and a busy machine
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()
