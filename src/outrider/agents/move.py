"""Carries out the policy's commands: sends calls, relays answers byte for byte, turns every ending into an event.

Decides nothing about what goes where: `feed` hands an event to the policy, writes the journal, and passes each command
to the flight it is about. Everything here runs on one event loop; no await lies between an event and its journal line.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from outrider.agents.adapters.answers import Answer, error_body, error_event
from outrider.agents.adapters.prometheus import Exposition
from outrider.agents.events import (
    Abort,
    Arrived,
    Break,
    Call,
    Command,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstByte,
    Gone,
    Hold,
    Reject,
    Relay,
    Settle,
    Tell,
    Wake,
    Woke,
)
from outrider.agents.policy import RETRYABLE, Policy
from outrider.agents.settings import GatewaySettings
from outrider.agents.story import Stories
from outrider.journal import Journal
from outrider.wants import Want

LOG = logging.getLogger("outrider.agents")
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection")
).union(("te", "trailer", "transfer-encoding", "upgrade"))
NOT_FORWARDED = HOP_BY_HOP | {"host", "content-length", "expect", "x-request-id"}


class ClientGone(Exception):
    """Writing to the client failed."""


class Flight:
    """One call between its arrival and its end: what must be sent, and what came."""

    def __init__(self, call: Call, request: web.Request, body: bytes, headers: CIMultiDict[str]) -> None:
        self.call = call
        self.request = request
        self.body = body
        self.headers = headers
        self.inbox: asyncio.Queue[Command] = asyncio.Queue()
        self.dispatch: Dispatch | None = None
        self.upstream: aiohttp.ClientResponse | None = None
        self.response: web.StreamResponse | None = None  # what the client gets; prepared once bytes are sent
        self.refusal: web.Response | None = None  # the engine's own error, kept for Relay


class Mover:
    """The shell around one policy. `on_want` must not block: whoever hands it in carries wants by itself."""

    def __init__(
        self, settings: GatewaySettings, on_want: Callable[[Want], None] | None = None, journal: Journal | None = None
    ) -> None:
        self.settings = settings
        self.policy = Policy(settings)
        self.stories = Stories()
        self.exposition = Exposition(self.policy.stats)
        self.flights: dict[str, Flight] = {}
        self.session: aiohttp.ClientSession | None = None
        self._journal = journal
        self._on_want = on_want
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.settings.limits.connect_s),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def stop(self) -> None:
        """Flights are over or cancelled by now; close what is left."""
        if self._timer is not None:
            self._timer.cancel()
        if self.session is not None:
            await self.session.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def feed(self, event: Event) -> None:
        """One event through the policy, into the journal, out as commands."""
        now = time.monotonic()
        commands = self.policy.handle(event, now)
        if self._journal is not None:
            self._journal.write(now, event, commands)
        self.stories.note(now, event, commands)
        self.exposition.note(commands)
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Wake(at_s):
                if self._timer is not None:
                    self._timer.cancel()
                delay_s = max(0.0, at_s - time.monotonic())
                self._timer = asyncio.get_running_loop().call_later(delay_s, self.feed, Woke())
            case Tell(want):
                if self._on_want is not None:
                    self._on_want(want)
            case Hold():
                pass
            case Dispatch(call) | Settle(call) | Reject(call) | Relay(call) | Break(call):
                self.flights[call].inbox.put_nowait(command)
            case Abort(call):
                upstream = self.flights[call].upstream
                if upstream is not None:
                    upstream.close()  # closing the connection is what stops the engine

    # -- one call -------------------------------------------------------------------------------------------------

    async def fly(self, flight: Flight) -> web.StreamResponse:
        """Take one call from arrival to its one ending; returns what the client got or must get."""
        call = flight.call
        self.flights[call.id] = flight
        try:
            self.feed(Arrived(call))
            while True:
                command = await flight.inbox.get()
                match command:
                    case Dispatch():
                        flight.dispatch = command
                        await self._attempt(flight, command)
                    case Settle():
                        return await self._close(flight)
                    case Break(_, why):
                        return await self._break(flight, why)
                    case Relay() if flight.refusal is not None:
                        return flight.refusal
                    case Reject(_, status, why, retry_after_s):
                        return self.sentence(flight, status, why, retry_after_s)
                    case _:
                        raise AssertionError(f"{command} is not for a flight")
        except BaseException:  # the client left, or a fault of ours: either way the policy must let go of the call
            self.feed(Gone(call.id))
            raise
        finally:
            del self.flights[call.id]

    async def _attempt(self, flight: Flight, dispatch: Dispatch) -> None:
        """Send the call to its engine and relay the answer; ends in exactly one Finished or Failed."""
        session = self.session
        assert session is not None, "start() comes first"
        target = flight.request.rel_url.raw_path_qs
        kind, why = "reset", ""
        ending: Event
        try:
            async with asyncio.timeout(dispatch.first_byte_s) as limit:
                deadline_s = asyncio.get_running_loop().time() + dispatch.total_s
                async with session.post(
                    URL(dispatch.engine + target, encoded=True),
                    data=flight.body,
                    headers=flight.headers,
                    allow_redirects=False,
                ) as upstream:
                    flight.upstream = upstream
                    try:
                        ending = await self._relay(flight, upstream, dispatch, limit, deadline_s)
                    except BaseException:
                        upstream.close()
                        raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            kind, why = "refused", type(error).__name__
        except TimeoutError:
            kind, why = "timeout", f"limit {dispatch.total_s if flight.response else dispatch.first_byte_s:.1f} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = type(error).__name__
        else:
            flight.upstream = None
            self.feed(ending)
            return
        flight.upstream = None
        LOG.warning("call %s: attempt %d on %s: %s (%s)", dispatch.call, dispatch.attempt, dispatch.engine, kind, why)
        self.feed(Failed(dispatch.call, dispatch.attempt, kind, why, flight.response is not None))

    async def _relay(
        self,
        flight: Flight,
        upstream: aiohttp.ClientResponse,
        dispatch: Dispatch,
        limit: asyncio.Timeout,
        deadline_s: float,
    ) -> Event:
        """Pass the answer on. A stream starts with its first byte; a whole answer is held back until it is whole."""
        plain = not upstream.headers.get("Content-Encoding", "")
        answer = Answer(streamed=plain and upstream.content_type == "text/event-stream")
        held: list[bytes] = []
        held_bytes = 0
        seen = False
        async for chunk in upstream.content.iter_any():
            if not seen:
                seen = True
                limit.reschedule(deadline_s)
                if upstream.status not in RETRYABLE:
                    self.feed(FirstByte(dispatch.call, dispatch.attempt))
            ready = answer.push(chunk)
            if answer.streamed or flight.response is not None:
                await self._write(flight, upstream, ready)
                continue
            held.append(ready)
            held_bytes += len(ready)
            if held_bytes > self.settings.limits.answer_bytes:
                await self._write(flight, upstream, b"".join(held))
                held = []
        closed_early = not answer.complete() and plain and not delimited(upstream)
        if closed_early:
            raise aiohttp.ClientPayloadError("the connection closed before the answer was complete")
        if upstream.status in RETRYABLE and flight.response is None:
            flight.refusal = self._whole(flight, upstream, b"".join(held))
            return Failed(dispatch.call, dispatch.attempt, "status", f"status {upstream.status}", False)
        if answer.streamed:
            await self._write(flight, upstream, answer.rest())
        elif flight.response is None:
            flight.response = self._whole(flight, upstream, b"".join(held))
        return Finished(dispatch.call, dispatch.attempt, upstream.status, answer.usage())

    # -- towards the client -----------------------------------------------------------------------------------------

    async def _write(self, flight: Flight, upstream: aiohttp.ClientResponse, data: bytes) -> None:
        """To the client, headers first. ClientGone when it is not there any more."""
        try:
            if flight.response is None:
                response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
                self._copy_headers(flight, upstream, response)
                if "Content-Length" not in response.headers:
                    response.enable_chunked_encoding()
                await response.prepare(flight.request)
                flight.response = response
            if data:
                await flight.response.write(data)
        except (ConnectionError, aiohttp.ClientConnectionError) as error:
            raise ClientGone from error

    def _whole(self, flight: Flight, upstream: aiohttp.ClientResponse, body: bytes) -> web.Response:
        response = web.Response(status=upstream.status, reason=upstream.reason, body=body)
        response.headers.clear()
        self._copy_headers(flight, upstream, response)
        return response

    def _copy_headers(self, flight: Flight, upstream: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
        for name, value in upstream.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        response.headers.extend(self.reply_headers(flight))

    def reply_headers(self, flight: Flight) -> dict[str, str]:
        """The only headers that we add to an answer."""
        own = {"Outrider-Request-Id": flight.call.id, "Outrider-Explain": f"/v1/outrider/requests/{flight.call.id}"}
        if flight.dispatch is not None:
            own["Outrider-Engine"] = flight.dispatch.engine
            own["Outrider-Queued-Ms"] = str(round(flight.dispatch.queued_s * 1000))
        return own

    async def _close(self, flight: Flight) -> web.StreamResponse:
        response = flight.response
        assert response is not None, "Settle follows an answer"
        if not isinstance(response, web.Response):
            with suppress(ConnectionError):
                await response.write_eof()
        return response

    async def _break(self, flight: Flight, why: str) -> web.StreamResponse:
        """Bytes were sent and the engine is gone: an error event ends a stream, a cut connection anything else."""
        response = flight.response
        assert response is not None, "Break follows a started answer"
        if (
            response.content_type == "text/event-stream"
            and "Content-Encoding" not in response.headers
            and response.chunked
        ):
            with suppress(ConnectionError):
                await response.write(error_event(flight.call.path, why))
                await response.write_eof()
        elif flight.request.transport is not None:
            flight.request.transport.abort()
        return response

    def sentence(self, flight: Flight, status: int, why: str, retry_after_s: int | None) -> web.Response:
        headers = self.reply_headers(flight)
        if retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        return web.json_response(error_body(flight.call.path, status, why), status=status, headers=headers)


def delimited(upstream: aiohttp.ClientResponse) -> bool:
    """Does the answer say itself where it ends, rather than by the connection's close?"""
    return "Content-Length" in upstream.headers or "chunked" in upstream.headers.get("Transfer-Encoding", "").lower()


def forwarded(headers: Sequence[tuple[str, str]], call_id: str) -> CIMultiDict[str]:
    """What goes to the engine: every end-to-end header as it came, and the call's id."""
    named = {
        token.strip().lower() for name, value in headers if name.lower() == "connection" for token in value.split(",")
    }
    kept = CIMultiDict((n, v) for n, v in headers if n.lower() not in NOT_FORWARDED and n.lower() not in named)
    kept["X-Request-Id"] = call_id
    return kept
