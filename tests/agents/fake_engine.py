"""A small real HTTP engine for the tests: canned answers, every kind of misbehaviour on request. Not a mock: it listens."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

METRICS = """# HELP vllm:num_requests_running Running.
vllm:num_requests_running{{model_name="m"}} {running}
vllm:num_requests_waiting{{model_name="m"}} 0
vllm:kv_cache_usage_perc{{model_name="m"}} 0.25
vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}",cache_dtype="auto"}} 1.0
"""


def sse(text: str, usage: dict[str, Any] | None = None) -> bytes:
    """A chat answer as OpenAI streams it, one event a word, with its usage at the end."""
    words = text.split(" ")
    events = [{"choices": [{"index": 0, "delta": {"content": word}}], "usage": None} for word in words]
    if usage is not None:
        events.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    return (body + "data: [DONE]\n\n").encode()


class FakeEngine:
    """`answer` is what it says; `behave` how: well, slow, hang, die_before, die_middle, 500, 503, one_byte."""

    def __init__(self, name: str = "m", blocks: int = 1000) -> None:
        self.name = name
        self.blocks = blocks
        self.seen: list[tuple[str, list[tuple[bytes, bytes]], bytes]] = []
        self.behave = "well"
        self.delay_s = 0.0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.running = 0
        self.most_running = 0
        self.closed = asyncio.Event()  # a client went away in the middle
        self.arrived = asyncio.Event()
        self.answer: bytes | None = None
        self.runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> "FakeEngine":
        app = web.Application(client_max_size=64 * 1024 * 1024)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            app.router.add_post(path, self.generate)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()
        self.port = self.runner.addresses[0][1]
        return self

    async def kill(self) -> None:
        """Every connection breaks at once, and nothing listens any more."""
        assert self.runner is not None
        for site in list(self.runner.sites):
            await site.stop()
        for connection in list(self.runner.server.connections):  # type: ignore[union-attr]
            if connection.transport is not None:
                connection.transport.abort()
        await self.runner.cleanup()
        self.runner = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.behave == "503" else 200)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=METRICS.format(running=self.running, blocks=self.blocks))

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.path_qs, list(request.raw_headers), body))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.arrived.set()
        try:
            return await self.respond(request, body)
        except asyncio.CancelledError:
            self.closed.set()
            raise
        finally:
            self.running -= 1

    async def respond(self, request: web.Request, body: bytes) -> web.StreamResponse:
        with suppress(ValueError):
            stream = json.loads(body).get("stream", False)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.behave in ("500", "503"):
            return web.json_response({"error": {"message": "CUDA error"}}, status=int(self.behave))
        if self.behave == "hang":
            await asyncio.sleep(60)
        assert request.transport is not None
        if self.behave == "die_before":
            request.transport.abort()
            return web.Response()
        if not stream:
            usage = {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
            data = self.answer or json.dumps({"choices": [], "usage": usage}).encode()
            if self.behave == "die_middle":
                response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
                await response.prepare(request)
                await response.write(data[:10])
                await asyncio.sleep(0.02)
                request.transport.abort()
                return response
            return web.Response(body=data, status=self.status, content_type="application/json", headers=self.headers)
        usage = {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
        data = self.answer if self.answer is not None else sse("the quick brown fox", usage)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **self.headers})
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


@asynccontextmanager
async def engines(count: int = 1, **options: Any):
    """`count` engines that listen."""
    started = [await FakeEngine(**options).start() for _ in range(count)]
    try:
        yield started
    finally:
        for engine in started:
            if engine.runner is not None:
                await engine.kill()
