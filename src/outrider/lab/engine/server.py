"""The engine's HTTP door: OpenAI's API over aiohttp, streamed as server-sent events. `outrider engine` calls `serve`.

The event loop runs in the main thread, the engine in its own. A closed connection aborts its request.
"""

import asyncio
import gc
import json
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from aiohttp.typedefs import Handler

from outrider import memory as memory_door
from outrider.errors import CallerError
from outrider.lab.engine import models
from outrider.lab.engine.engine import Engine
from outrider.lab.engine.forward import LAYOUT
from outrider.lab.engine.request import Limits, Output, Request
from outrider.lab.engine.wire import Reply, chat_prompt, failure, params, text_prompt
from outrider.memory import KeySpace, Store

MAX_OPEN = 1024  # requests at one time; more are refused with 429
MAX_BODY_BYTES = 16 << 20
Body = dict[str, Any]
NOTE = "Outrider's embedded engine: small, real, for CPUs; not the product"


def serve(
    model: str,
    port: int,
    kv_tokens: int,
    memory: Path | None = None,
    host: str = "127.0.0.1",
    dtype: str = "float32",
    threads: int = 1,
    max_batch_tokens: int = 512,
    max_num_seqs: int = 8,
    block_tokens: int = 16,
    salt: str = "",
) -> None:
    """Serve until SIGTERM or SIGINT. CallerError for a port in use, an unknown model, sizes that cannot work."""
    limits = Limits(kv_tokens, max_batch_tokens, max_num_seqs, block_tokens)
    sock = bound(host, port)  # before the model is loaded: a port in use shows at once
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # only once in a process, and before any work
        torch.set_num_interop_threads(1)
    door = Door.open(model, limits, dtype, memory, salt)
    gc.freeze()  # the model stays: the collector need not walk it, neither while serving nor at the end
    asyncio.run(door.serve(sock))


def bound(host: str, port: int) -> socket.socket:
    """A socket bound but not listening yet: connections are refused until the engine is ready."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise CallerError(f"--port {port}: cannot listen on {host} ({error.strerror}); choose another port.") from error
    return sock


def build(
    model: Any,
    tokenizer: Any,
    chain: Callable[[Sequence[int]], list[bytes]],
    limits: Limits,
    connect: Callable[[], Store] | None = None,
) -> Engine:
    """An engine that decodes and ends texts as the model and its tokenizer say."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    eos = frozenset(token for token in [*ends, tokenizer.eos_token_id] if token is not None)
    return Engine(model, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), eos, chain, limits, connect)


class Door:
    """One engine behind HTTP."""

    def __init__(self, name: str, engine: Engine, tokenizer: Any) -> None:
        self.name, self.engine, self.tokenizer = name, engine, tokenizer
        self.note = NOTE + ("; its weights are RANDOM, so its text means nothing" if name == "tiny-moe" else "")
        self.started_s = int(time.time())
        self.open_requests = 0

    @classmethod
    def open(cls, name: str, limits: Limits, dtype: str, memory: Path | None = None, salt: str = "") -> "Door":
        """Load the model and build its engine, not yet started."""
        model, tokenizer, digest = models.load(name, dtype)
        space = KeySpace(model=digest, dtype=dtype, layout=LAYOUT, block_tokens=limits.block_tokens, salt=salt)
        connect = None
        if memory is not None:
            if not memory.exists():
                warning = f"--memory {memory}: no server there yet; the engine computes everything until one comes."
                print(warning, file=sys.stderr, flush=True)  # noqa: T201
            connect = partial(memory_door.connect, memory, name=f"engine-{name}")
        return cls(name, build(model, tokenizer, space.chain, limits, connect), tokenizer)

    async def serve(self, sock: socket.socket) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        runner = await self.listen(sock)
        host, port = sock.getsockname()[:2]
        print(f"{self.note}. Model {self.name}.", file=sys.stderr)  # noqa: T201
        print(f"ready on http://{host}:{port}", file=sys.stderr, flush=True)  # noqa: T201
        await ended.wait()
        await self.close(runner)

    async def listen(self, sock: socket.socket) -> web.AppRunner:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.complete),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        self.engine.start()
        return runner

    async def close(self, runner: web.AppRunner) -> None:
        self.engine.stop()
        await runner.cleanup()

    # -- routes

    async def models(self, _: web.Request) -> web.Response:
        about = {"id": self.name, "object": "model", "created": self.started_s, "owned_by": "outrider-lab"}
        card = {**about, "max_model_len": self.engine.context, "description": self.note}
        return web.json_response({"object": "list", "data": [card]})

    async def health(self, _: web.Request) -> web.Response:
        broken = self.engine.failure
        return web.Response(status=503, text=broken) if broken else web.Response(text="ok")

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.engine.metrics.text(), content_type="text/plain", charset="utf-8")

    async def chat(self, http: web.Request) -> web.StreamResponse:
        body = await self.body(http)
        return await self.answer(http, body, chat_prompt(body, self.tokenizer), chat=True)

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await self.body(http)
        return await self.answer(http, body, text_prompt(body, self.tokenizer, self.engine.vocabulary), chat=False)

    async def body(self, http: web.Request) -> Body:
        try:
            body = json.loads(await http.read())
        except ValueError as error:
            raise CallerError(f"The body is no JSON: {error}.") from error
        if not isinstance(body, dict):
            raise CallerError("The body must be a JSON object.")
        if (body.get("model") or self.name) != self.name:
            raise web.HTTPNotFound(text=f"The model {body['model']!r} is not here; this engine serves {self.name!r}.")
        return body

    async def answer(self, http: web.Request, body: Body, prompt: list[int], chat: bool) -> web.StreamResponse:
        if self.engine.failure:
            raise web.HTTPServiceUnavailable(text=self.engine.failure)
        sizes = (len(prompt), self.engine.context, self.engine.vocabulary)
        checked = params(body, *sizes, None if chat else 16)  # 16: OpenAI's default there
        priority = body.get("priority") or 0
        if type(priority) is not int:
            raise CallerError("priority: give an integer; lower goes sooner.")
        if checked.return_routes and not self.engine.forward.gates:
            raise CallerError("return_routed_experts: this model has no experts to route to.")
        if self.open_requests >= MAX_OPEN:
            raise web.HTTPTooManyRequests(text=f"{MAX_OPEN} requests are open here already; come again later.")
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Output]()
        name = http.headers.get("X-Request-Id") or uuid.uuid4().hex
        request = Request(name, prompt, checked, lambda out: post(loop, news, out), priority)
        reply = Reply(request, self.name, chat, int(time.time()), self.engine.limits.block_tokens, wants_ids(body))
        self.open_requests += 1
        self.engine.submit(request)
        try:
            if body.get("stream"):
                options = body.get("stream_options")
                with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
                return await self.stream(http, reply, news, with_usage)
            outputs = [out async for out in until_finished(news)]
            if outputs[-1].finish == "error":
                return web.json_response(failure(outputs[-1].text, 500), status=500)
            text = "".join(out.text for out in outputs)
            return web.json_response(reply.whole(text, outputs[-1].finish or "", outputs[-1].routes))
        finally:
            self.open_requests -= 1
            self.engine.abort(request)  # no effect if it has finished

    async def stream(
        self, http: web.Request, reply: Reply, news: asyncio.Queue[Output], with_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        first = True
        async for out in until_finished(news):
            if first:
                await response.prepare(http)
            if out.finish == "error":
                await response.write(event(failure(out.text, 500)))
            elif first or out.text or out.finish:
                await response.write(event(reply.chunk(out.text, out.finish, first, out.routes)))
            first = False
        if with_usage:
            await response.write(event(reply.usage_chunk()))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def post(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[Output], out: Output) -> None:
    """From the engine's thread to the door's. Nobody reads any more once the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(news.put_nowait, out)


async def until_finished(news: asyncio.Queue[Output]) -> AsyncIterator[Output]:
    while True:
        out = await news.get()
        yield out
        if out.finish:
            return


def event(data: Body) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def wants_ids(body: Body) -> bool:
    return bool(body.get("return_token_ids") or body.get("return_routed_experts"))


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal in OpenAI's shape."""
    try:
        return await handler(request)
    except CallerError as error:
        return web.json_response(failure(str(error), 400), status=400)
    except web.HTTPException as error:
        return web.json_response(failure(error.text or error.reason, error.status), status=error.status)
