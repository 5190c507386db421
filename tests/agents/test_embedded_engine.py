"""The gateway before the real embedded engine: the same tokens as without it, prefixes reused, departures heard."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.slow
START_S = 120.0  # the first use builds the model


class Real:
    """A URL, as the door fixture wants it."""

    def __init__(self, url: str) -> None:
        self.url = url


@pytest.fixture(scope="module")
def engine() -> Iterator[Real]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from outrider.lab.engine.server import serve; serve('tiny-moe', {port}, 4096)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    url, by_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert child.poll() is None, "the engine ended"
            assert time.monotonic() < by_s, "the engine does not come up"
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield Real(url)
    finally:
        child.terminate()
        child.wait(timeout=10)


def request(turns: list[dict[str, str]], stream: bool, tokens: int = 12) -> dict[str, Any]:
    body = {"model": "tiny-moe", "messages": turns, "max_tokens": tokens, "temperature": 0, "stream": stream}
    return {**body, "stream_options": {"include_usage": True}} if stream else body


def text_of(events: bytes) -> str:
    data = [line[6:] for line in events.decode().splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for line in data for c in json.loads(line).get("choices", ()))


async def test_a_conversation_through_the_gateway_says_the_same(engine: Real, door: Any) -> None:
    gate = await door([engine], memory_attached=True)
    assert gate.policy.engines[engine.url].kv_tokens == 4096, "read from its /metrics"
    turns = [{"role": "user", "content": "Count the ways in which a queue can starve a caller. " * 8}]
    for turn in range(3):
        headers = {"Outrider-Workflow": "wf", "Outrider-Role": "coder", "Outrider-Stage": f"code/{turn}"}
        async with gate.post(request(turns, stream=True), headers=headers) as answer:
            streamed = await answer.read()
            story = await gate.get(answer.headers["Outrider-Explain"])
        async with gate.post(request(turns, stream=False), headers=headers) as answer:
            whole = await answer.json()
        async with aiohttp.ClientSession() as plain:
            url = engine.url + "/v1/chat/completions"
            async with plain.post(url, json=request(turns, stream=False)) as answer:
                direct = await answer.json()
        said = direct["choices"][0]["message"]["content"]
        assert text_of(streamed) == whole["choices"][0]["message"]["content"] == said
        assert streamed.endswith(b"data: [DONE]\n\n")
        actual = story["actual"]
        assert not actual["estimated"]
        assert actual["prompt_tokens"] == direct["usage"]["prompt_tokens"]
        assert actual["output_tokens"] == direct["usage"]["completion_tokens"]
        if turn:
            assert actual["cached_tokens"] > 0
            assert story["attempts"][0]["scores_s"][0]["resident_tokens"] > 0
            assert story["predicted"]["from"] == "this workflow"
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": f"And then, {turn}?"}]
    stats = await gate.get("/v1/outrider/stats")
    assert stats["answered"] == 6
    assert stats["estimated_usages"] == 0
    assert stats["used_tokens"] <= stats["reserved_tokens"] * 1.5
    assert any(want.saved_s > 0 for want in gate.wants)


async def test_a_client_that_goes_stops_the_engine(engine: Real, door: Any) -> None:
    gate = await door([engine])
    turns = [{"role": "user", "content": "Go on for ever."}]
    asked = asyncio.create_task(gate.session.post(gate.url + "/v1/chat/completions", json=request(turns, True, 3000)))
    answer = await asked
    await answer.content.readany()
    answer.close()

    async def running() -> float:
        async with gate.session.get(engine.url + "/metrics") as page:
            lines = (await page.text()).splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running")))

    async with asyncio.timeout(5):
        while await running():  # noqa: ASYNC110  the engine announces nothing
            await asyncio.sleep(0.02)
