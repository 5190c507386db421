"""The twin of `agents/move.py`: carries out the same policy's commands against modelled engines, on the virtual clock.

    send -> Arrived -> [policy] -> Dispatch -> a Job at an engine -> FirstByte, Finished or Failed -> [policy] -> end

Decides nothing. Every ending, good or bad, becomes an event as in the live mover: limits of an attempt, refusals, an
answer that does not stream, an engine that dies. One terminal command a call is a law (8), checked as they come.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, assert_never

from outrider.agents import events as ev
from outrider.agents.policy import Policy
from outrider.agents.settings import GatewaySettings
from outrider.errors import LawBroken
from outrider.journal import Journal
from outrider.lab.clock import Clock, Timer
from outrider.lab.twins.job import Job
from outrider.lab.twins.pool import Ids
from outrider.wants import Want

TOO_LONG = 400  # status of an engine's answer to what never fits its cache


class Server(Protocol):
    """What stands behind an engine's URL."""

    block_tokens: int

    def fits(self, job: Job) -> bool: ...

    def submit(self, job: Job) -> None: ...

    def abort(self, job: Job) -> None: ...


@dataclass(frozen=True, slots=True)
class Work:
    """What a call will turn out to need. The policy never sees it. `chain` as in `Job`."""

    prompt_tokens: int
    output_tokens: int
    chain: Ids


@dataclass(eq=False, slots=True)
class Flight:
    """One call between its arrival and its end."""

    call: ev.Call
    work: Work
    dispatch: ev.Dispatch | None = None
    deadline_s: float = 0.0
    job: Job | None = None
    started: bool = False  # the client has bytes
    limit: Timer | None = None
    story: list[str] = field(default_factory=list)


class AgentsTwin:
    """One gateway. `on_end` hears each call's ending, with the job of its last attempt."""

    def __init__(
        self,
        settings: GatewaySettings,
        clock: Clock,
        engines: Mapping[str, Server],
        on_end: Callable[[ev.Terminal, Flight], object],
        on_want: Callable[[Want], object] | None = None,
        journal: Journal | None = None,
        hop_s: float = 0.0,
    ) -> None:
        self.policy = Policy(settings)
        self.clock, self.engines, self.hop_s = clock, engines, hop_s
        self.flights: dict[str, Flight] = {}
        self.arrived = self.ended = 0
        self._on_end, self._on_want, self._journal = on_end, on_want, journal
        self._timer: Timer | None = None

    # -- the door

    def send(self, call: ev.Call, work: Work) -> None:
        """A client sends a call."""
        if call.id in self.flights:
            raise LawBroken(8, f"call {call.id} was sent twice", self.flights[call.id].story)
        self.arrived += 1
        self.flights[call.id] = Flight(call, work)
        self.feed(ev.Arrived(call))

    def leave(self, call_id: str) -> None:
        """The client closes its connection."""
        self.feed(ev.Gone(call_id))

    def feed(self, event: ev.Event) -> None:
        """One event through the policy, into the journal, out as commands."""
        now = self.clock.now
        commands = self.policy.handle(event, now)
        if self._journal is not None:
            self._journal.write(now, event, commands)
        for command in commands:
            self._carry_out(command)

    def close(self) -> None:
        """The simulation is over: every call that arrived must have ended."""
        if self.flights or self.arrived != self.ended:
            first = next(iter(self.flights.values()), None)
            which, story = (first.call.id, first.story) if first else ("none of them open", [])
            raise LawBroken(8, f"{self.arrived - self.ended} calls never ended: {which}", story)
        if self._journal is not None:
            self._journal.close()

    # -- commands

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Wake(at_s):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.clock.at(at_s, partial(self.feed, ev.Woke()))
            case ev.Tell(want):
                if self._on_want is not None:
                    self._on_want(want)
            case ev.Hold():
                pass
            case ev.Dispatch(call_id):
                flight = self._flight(call_id, command)
                flight.dispatch = command
                self._attempt(flight, command)
            case ev.Abort(call_id):
                flight = self._flight(call_id, command)
                self._hang_up(flight)
                self._end(flight, command)
            case ev.Settle(call_id) | ev.Reject(call_id) | ev.Relay(call_id) | ev.Break(call_id):
                self._end(self._flight(call_id, command), command)
            case _:
                assert_never(command)

    def _flight(self, call_id: str, command: ev.Command) -> Flight:
        """The call that a command is about; it must be open."""
        flight = self.flights.get(call_id)
        name = type(command).__name__
        if flight is None:
            raise LawBroken(8, f"{name} for call {call_id}, which has ended or never arrived")
        flight.story.append(f"{name} {self.clock.now:.6g}")
        return flight

    def _end(self, flight: Flight, command: ev.Terminal) -> None:
        del self.flights[flight.call.id]
        self.ended += 1
        self._on_end(command, flight)

    # -- one attempt

    def _attempt(self, flight: Flight, dispatch: ev.Dispatch) -> None:
        """Send the call to its engine; ends in exactly one Finished or Failed."""
        work = flight.work
        flight.job = job = Job(
            dispatch.call,
            work.prompt_tokens,
            work.output_tokens,
            work.chain,
            on_first=partial(self._first, flight, dispatch),
            on_finished=partial(self._finished, flight, dispatch),
            on_failed=partial(self._failed, flight, dispatch),
        )
        flight.deadline_s = self.clock.now + dispatch.total_s
        self._limit(flight, dispatch, self.clock.now + dispatch.first_byte_s)
        self._soon(partial(self._reach, flight, dispatch, job))

    def _reach(self, flight: Flight, dispatch: ev.Dispatch, job: Job) -> None:
        if flight.job is not job:
            return  # given up on the way
        engine = self.engines[dispatch.engine]
        if engine.fits(job):
            engine.submit(job)
        else:
            self._begin(flight, dispatch)
            self._answer(flight, dispatch, TOO_LONG, None)

    def _first(self, flight: Flight, dispatch: ev.Dispatch) -> None:
        """A stream begins with its first token, a whole answer when it is whole."""
        if flight.call.stream:
            flight.started = True
            self._begin(flight, dispatch)

    def _begin(self, flight: Flight, dispatch: ev.Dispatch) -> None:
        """The first byte: from now on the limit is that of the whole call."""
        self._limit(flight, dispatch, flight.deadline_s)
        self._soon(partial(self.feed, ev.FirstByte(dispatch.call, dispatch.attempt)))

    def _finished(self, flight: Flight, dispatch: ev.Dispatch) -> None:
        job = flight.job
        assert job is not None
        if not flight.call.stream:
            self._begin(flight, dispatch)
        block_tokens = self.engines[dispatch.engine].block_tokens
        external = job.external_blocks * block_tokens
        cached = job.own_blocks * block_tokens + external
        usage = ev.Usage(job.prompt_tokens, job.output_tokens, cached, external, estimated=False)
        self._answer(flight, dispatch, 200, usage)

    def _answer(self, flight: Flight, dispatch: ev.Dispatch, status: int, usage: ev.Usage | None) -> None:
        self._over(flight)
        self._soon(partial(self.feed, ev.Finished(dispatch.call, dispatch.attempt, status, usage)))

    def _failed(self, flight: Flight, dispatch: ev.Dispatch, kind: str, why: str) -> None:
        self._over(flight)
        failed = ev.Failed(dispatch.call, dispatch.attempt, kind, why, flight.started)
        self._soon(partial(self.feed, failed))

    def _late(self, flight: Flight, dispatch: ev.Dispatch) -> None:
        """A limit has passed: the connection is closed, which stops the engine."""
        limit_s = dispatch.total_s if flight.started else dispatch.first_byte_s
        self._hang_up(flight)
        failed = ev.Failed(dispatch.call, dispatch.attempt, "timeout", f"limit {limit_s:.1f} s", flight.started)
        self.clock.at(self.clock.now, partial(self.feed, failed))

    def _hang_up(self, flight: Flight) -> None:
        job, dispatch = flight.job, flight.dispatch
        self._over(flight)
        flight.job = None
        if job is not None and dispatch is not None:
            self.engines[dispatch.engine].abort(job)

    def _limit(self, flight: Flight, dispatch: ev.Dispatch, at_s: float) -> None:
        if flight.limit is not None:
            flight.limit.cancel()
        flight.limit = self.clock.at(at_s, partial(self._late, flight, dispatch))

    def _over(self, flight: Flight) -> None:
        if flight.limit is not None:
            flight.limit.cancel()

    def _soon(self, do: Callable[[], object]) -> None:
        self.clock.at(self.clock.now + self.hop_s, do)
