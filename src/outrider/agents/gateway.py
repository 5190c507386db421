"""The door: an OpenAI- and Anthropic-shaped HTTP server before the engines. Called by stack.py and the command line.

    POST /v1/chat/completions /v1/completions /v1/messages      GET /v1/models /health /metrics
    GET  /v1/outrider/requests/ID  why a call went as it went    GET /v1/outrider/stats  totals, engines, rates

Reads a request whole, names it, and hands it to the mover; what is decided is decided by the policy.
"""

import asyncio
import errno
import hashlib
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import web

from outrider.agents.adapters.answers import error_body
from outrider.agents.adapters.probe import watch
from outrider.agents.identity import read_call
from outrider.agents.move import ClientGone, Flight, Mover, forwarded
from outrider.agents.settings import GatewaySettings
from outrider.errors import CallerError
from outrider.journal import Journal
from outrider.wants import Want

LOG = logging.getLogger("outrider.agents")
SECRETS = ("authorization", "x-api-key")
STOP_S = 0.1  # open calls get this long to end on their own when we stop


class Gateway:
    """One running gateway: `start`, `port`, `stop`. Tests embed it; `serve` runs it as a process.

    on_want  hears every want; must not block
    journal  an existing directory for agents.jsonl
    """

    def __init__(
        self, settings: GatewaySettings, on_want: Callable[[Want], None] | None = None, journal: Path | None = None
    ) -> None:
        self.settings = settings
        written = Journal(journal / "agents.jsonl", "agents", settings) if journal is not None else None
        self.mover = Mover(settings, on_want, written)
        self.port = settings.port
        self._salt = secrets.token_bytes(16)
        self._runner: web.AppRunner | None = None
        self._probes: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen and probe. CallerError when the port is taken."""
        app = web.Application(client_max_size=self.settings.limits.body_bytes, middlewares=[spoken_errors])
        app.add_routes(
            [web.post(path, self.call) for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages")]
            + [
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/outrider/requests/{id}", self.explain),
                web.get("/v1/outrider/stats", self.stats),
            ]
        )
        self._runner = web.AppRunner(
            app, handler_cancellation=True, auto_decompress=False, access_log=None, shutdown_timeout=STOP_S
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.settings.host, self.settings.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            await self.mover.stop()
            where = f"{self.settings.host}:{self.settings.port}"
            if error.errno == errno.EADDRINUSE:
                raise CallerError(
                    f"port {where} is in use. Stop what listens there, or choose another --port."
                ) from error
            raise CallerError(
                f"cannot listen on {where}: {error.strerror}. Choose another --host or --port."
            ) from error
        self.port = self._runner.addresses[0][1]
        await self.mover.start()
        assert self.mover.session is not None
        every_s = self.settings.limits.probe_every_s
        for engine in self.mover.policy.engines:
            self._probes.append(asyncio.create_task(watch(engine, every_s, self.mover.session, self.mover.feed)))

    async def stop(self) -> None:
        """Open calls end or are cancelled; then everything is closed. Takes less than a second."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.mover.stop()

    # -- handlers -------------------------------------------------------------------------------------------------

    async def call(self, request: web.Request) -> web.StreamResponse:
        """One LLM call, from its first byte to its last."""
        try:
            async with asyncio.timeout(self.settings.limits.total_s):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="the request's body did not arrive in time. Send it again.") from None
        try:
            headers = [(name.decode(), value.decode()) for name, value in request.raw_headers]
        except UnicodeDecodeError:
            raise web.HTTPBadRequest(text="a header is not valid UTF-8. Send it percent-encoded.") from None
        call_id = f"call-{secrets.token_hex(8)}"
        call, body = read_call(call_id, request.path, headers, body, tenant=self._tenant(headers), wall_s=time.time())
        try:
            return await self.mover.fly(Flight(call, request, body, forwarded(headers, call_id)))
        except ClientGone:
            raise asyncio.CancelledError from None  # nobody is left to answer

    async def models(self, request: web.Request) -> web.Response:
        """From the first live engine, as it says it."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() in SECRETS]
        assert self.mover.session is not None
        for engine in self.mover.policy.routes.engines:
            if not engine.alive:
                continue
            try:
                async with (
                    asyncio.timeout(10.0),
                    self.mover.session.get(f"{engine.name}/v1/models", headers=headers) as up,
                ):
                    return web.Response(status=up.status, body=await up.read(), content_type=up.content_type)
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                LOG.warning("models: %s: %s", engine.name, type(error).__name__)
        why = "no engine answers. Start one, or look at /health."
        return web.json_response(error_body(request.path, 503, why), status=503, headers={"Retry-After": "1"})

    async def health(self, _: web.Request) -> web.Response:
        alive = {engine.name: engine.alive for engine in self.mover.policy.routes.engines}
        state = "ok" if all(alive.values()) else "degraded" if any(alive.values()) else "down"
        engines = {name: "up" if up else "down" for name, up in alive.items()}
        return web.json_response({"status": state, "engines": engines}, status=200 if any(alive.values()) else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self.mover.exposition.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def explain(self, request: web.Request) -> web.Response:
        story = self.mover.stories.explain(request.match_info["id"])
        if story is None:
            raise web.HTTPNotFound(text="this id is unknown, or too old to be remembered.")
        return web.json_response(story)

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(self.mover.policy.stats())

    def _tenant(self, headers: list[tuple[str, str]]) -> str:
        """Keeps equal ids of different API keys apart. Salted per process, so that a journal tells nothing of a key."""
        keys = [value for name, value in headers if name.lower() in SECRETS]
        if not keys:
            return ""
        return hashlib.blake2b("\n".join(keys).encode(), digest_size=4, key=self._salt).hexdigest()


@web.middleware
async def spoken_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors at the door as JSON sentences in the caller's dialect."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        why = "the body is larger than agents.limits.body_bytes allows. Send less, or raise it."
        return web.json_response(error_body(request.path, 413, why), status=413)
    except web.HTTPMethodNotAllowed as error:
        why = f"{request.method} is not answered at {request.path}, only {', '.join(sorted(error.allowed_methods))}."
        return web.json_response(
            error_body(request.path, 405, why), status=405, headers={"Allow": ", ".join(sorted(error.allowed_methods))}
        )
    except web.HTTPNotFound as error:
        why = f"nothing lives at {request.path}. See GET /health and POST /v1/chat/completions."
        if request.path.startswith("/v1/outrider/requests/"):
            why = error.text or why
        return web.json_response(error_body(request.path, 404, why), status=404)
    except web.HTTPException as error:
        return web.json_response(
            error_body(request.path, error.status, error.text or error.reason), status=error.status
        )


def serve(
    settings: GatewaySettings, on_want: Callable[[Want], None] | None = None, journal: Path | None = None
) -> None:
    """Run until SIGTERM or SIGINT. CallerError when the port or the journal cannot be had."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=settings.log_level.upper())
    asyncio.run(_serve(settings, on_want, journal))


async def _serve(settings: GatewaySettings, on_want: Callable[[Want], None] | None, journal: Path | None) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    gateway = Gateway(settings, on_want, journal)
    await gateway.start()
    LOG.info("ready on http://%s:%d before %s", settings.host, gateway.port, ", ".join(settings.engines))
    await stopped.wait()
    await gateway.stop()
