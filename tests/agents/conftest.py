"""A small real HTTP engine with canned answers and all kinds of misbehaviour, and a gateway before it. No mocks."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from outrider.agents.gateway import Gateway
from outrider.agents.settings import GatewaySettings, Limits
from outrider.wants import Want

METRICS = """# HELP vllm:num_requests_running Running.
vllm:num_requests_running{{model_name="m"}} {running}
vllm:num_requests_waiting{{model_name="m"}} 0
vllm:kv_cache_usage_perc{{model_name="m"}} 0.25
vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}",cache_dtype="auto"}} 1.0
"""
USAGE = {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}


def sse(text: str, usage: dict[str, Any] | None = None) -> bytes:
    """A chat answer as OpenAI streams it, one event a word, with its usage at the end."""
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": word}}], "usage": None} for word in text.split(" ")
    ]
    if usage is not None:
        events.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    return (body + "data: [DONE]\n\n").encode()


class FakeEngine:
    """`behave`: well, one_byte, hang, hang_middle, die_before, die_middle, 500, 503. `answer` is what it says."""

    def __init__(self, models: tuple[str, ...] = ("m",), blocks: int = 1000) -> None:
        self.models = models
        self.blocks = blocks
        self.behave = "well"
        self.delay_s = 0.0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.answer: bytes | None = None
        self.seen: list[tuple[str, list[tuple[bytes, bytes]], bytes]] = []
        self.running = 0
        self.most_running = 0
        self.arrived = asyncio.Event()
        self.closed = asyncio.Event()  # the gateway closed a connection before its answer was whole
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            app.router.add_post(path, self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._list_models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Every connection breaks at once, and nothing listens any more."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        for site in list(runner.sites):
            await site.stop()
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.behave == "503" else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=METRICS.format(running=self.running, blocks=self.blocks))

    async def _list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.path_qs, list(request.raw_headers), body))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.arrived.set()
        try:
            return await self._answer(request, b'"stream": true' in body or b'"stream":true' in body)
        except asyncio.CancelledError:
            self.closed.set()
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, streamed: bool) -> web.StreamResponse:
        await asyncio.sleep(self.delay_s)
        assert request.transport is not None
        if self.behave in ("500", "503"):
            return web.json_response({"error": {"message": "CUDA error"}}, status=int(self.behave))
        if self.behave == "hang":
            await asyncio.sleep(60)
        if self.behave == "die_before":
            request.transport.abort()
            return web.Response()
        whole = json.dumps({"choices": [], "usage": USAGE}).encode()
        data = self.answer if self.answer is not None else sse("the quick brown fox", USAGE) if streamed else whole
        if not streamed and self.behave == "well":
            return web.Response(body=data, status=self.status, content_type="application/json", headers=self.headers)
        kind = {"Content-Type": "text/event-stream"} if streamed else {"Content-Length": str(len(data))}
        response = web.StreamResponse(headers={**kind, **self.headers})
        await response.prepare(request)
        if self.behave == "one_byte":
            for at in range(len(data)):
                await response.write(data[at : at + 1])
        elif self.behave in ("die_middle", "hang_middle"):
            await response.write(data[: len(data) // 2])
            await asyncio.sleep(0.02 if self.behave == "die_middle" else 60)
            request.transport.abort()
        else:
            await response.write(data)
        await response.write_eof()
        return response


class Door:
    """A gateway that runs, a client of it, and what it told memory."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, wants: list[Want], journal: Path) -> None:
        self.gateway = gateway
        self.session = session
        self.wants = wants
        self.journal = journal / "agents.jsonl"
        self.url = f"http://127.0.0.1:{gateway.port}"

    @property
    def policy(self) -> Any:
        return self.gateway.mover.policy

    def post(self, body: Any = None, path: str = "/v1/chat/completions", **options: Any) -> Any:
        """`body`: bytes as they are, or fields added to a small chat request."""
        if not isinstance(body, bytes):
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **(body or {})}
            body = json.dumps(body).encode()
        return self.session.post(URL(self.url + path, encoded=True), data=body, **options)

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            return await answer.json()

    async def until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """TimeoutError unless it comes true in time."""
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110  any condition, not one that somebody announces
                await asyncio.sleep(0.001)

    async def calm(self) -> None:
        """Wait until nothing is in flight; fails when something never is released."""
        await self.until(lambda: not (self.policy.at or len(self.policy.line) or self.gateway.mover.flights))
        assert all(engine.reserved_tokens == 0 for engine in self.policy.engines.values())
        self.policy.check()


@pytest.fixture
async def farm() -> AsyncIterator[Callable[..., Awaitable[list[FakeEngine]]]]:
    """farm(2): that many engines that listen; they are gone after the test."""
    started: list[FakeEngine] = []

    async def start(count: int = 1, **options: Any) -> list[FakeEngine]:
        fresh = [FakeEngine(**options) for _ in range(count)]
        for engine in fresh:
            await engine.start()
        started.extend(fresh)
        return fresh

    yield start
    for engine in started:
        await engine.kill()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Door]]]:
    """door(engines, credit=1, limits={...}): a gateway before them, all engines up. Nothing may be left in it."""
    opened: list[Door] = []

    async def start(engines: list[FakeEngine], limits: dict[str, Any] | None = None, **options: Any) -> Door:
        bounds = Limits(**{"probe_every_s": 0.05, **(limits or {})})
        settings = GatewaySettings(engines=tuple(e.url for e in engines), port=0, limits=bounds, **options)
        wants: list[Want] = []
        gateway = Gateway(settings, wants.append, tmp_path)
        await gateway.start()
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        opened.append(Door(gateway, session, wants, tmp_path))
        known = gateway.mover.policy.engines.values()
        await opened[-1].until(lambda: all(engine.alive for engine in known))
        return opened[-1]

    yield start
    for each in opened:
        await each.calm()
        await each.session.close()
        await each.gateway.stop()
