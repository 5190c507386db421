"""Looks at every engine in turn, for ever: /health and /metrics -> EngineUp or EngineDown. Called by the gateway."""

import asyncio
from collections.abc import Callable

import aiohttp

from outrider.agents.adapters.engine import Reading, read_metrics, read_models
from outrider.agents.events import EngineDown, EngineUp, Event

LIMIT_S = 5.0  # an engine busy with a long prefill may answer late


async def watch(engine: str, every_s: float, session: aiohttp.ClientSession, feed: Callable[[Event], None]) -> None:
    """Probe one engine until cancelled. Its models are asked for when it comes up."""
    models: tuple[str, ...] | None = None
    while True:
        event, models = await look(engine, session, models)
        feed(event)
        await asyncio.sleep(every_s)


async def look(
    engine: str, session: aiohttp.ClientSession, models: tuple[str, ...] | None
) -> tuple[Event, tuple[str, ...] | None]:
    """One probe. An engine that answers /health with anything below 500 lives; one without /metrics lives too."""
    try:
        async with asyncio.timeout(LIMIT_S):
            status, _ = await _get(session, f"{engine}/health")
            if status >= 500:
                return EngineDown(engine, f"/health says {status}", refused=False), None
            if models is None:
                status, body = await _get(session, f"{engine}/v1/models")
                models = read_models(body) if status == 200 else ()
            status, body = await _get(session, f"{engine}/metrics")
            reading = read_metrics(body.decode(errors="replace")) if status == 200 else Reading()
    except aiohttp.ClientConnectorError as error:
        return EngineDown(engine, type(error.os_error).__name__, refused=True), None
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return EngineDown(engine, type(error).__name__, refused=False), None
    up = EngineUp(engine, models, reading.kv_tokens, reading.kv_usage, reading.running, reading.waiting)
    return up, models


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with session.get(url, headers={"Accept": "*/*"}) as answer:
        return answer.status, await answer.read()
