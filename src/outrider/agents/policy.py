"""Every decision of the gateway: one state, one `handle`. Pure; driven by move.py live, by its twin on a virtual clock.

    Arrived -> line -> Dispatch -> FirstByte -> Finished -> Settle
                ^         |            |
                |         +-- Failed --+-> Break (bytes were sent: no second try)
                +-- again, elsewhere <-+-> Reject, Relay

Order  fcfs: by arrival. srtf: interactive before batch, then least predicted remaining work of the workflow in
       seconds, then arrival; children of one parent share the first one's place.
Law 8  every call that arrived gets exactly one terminal command; what comes later about it is dropped.
Law 9  at least one in `oldest_share_every` starts of every engine goes to the oldest call that may run there. So a call
       with k older ones before it starts within oldest_share_every x (k + 1) starts of any engine that may serve it,
       whatever else arrives. No order can bound waiting in seconds past capacity: for that the line is bounded (429).
"""

from math import ceil
from typing import Any, assert_never

from outrider.agents.engines import Engine, Running
from outrider.agents.events import (
    Abort,
    Arrived,
    Break,
    Call,
    Command,
    Dispatch,
    EngineDown,
    EngineUp,
    Event,
    Failed,
    Finished,
    FirstByte,
    Gone,
    Hold,
    Reject,
    Relay,
    Settle,
    Wake,
    Woke,
)
from outrider.agents.foresee import Key, Lengths
from outrider.agents.line import Line, Waiting
from outrider.agents.plan import Routes, Start, choices, decode_s, plan, scores
from outrider.agents.prefixes import Prefixes
from outrider.agents.rates import Rates
from outrider.agents.settings import GatewaySettings
from outrider.agents.tally import Tally
from outrider.agents.workflows import Workflow, Workflows
from outrider.errors import LawBroken

RETRYABLE = frozenset(
    (500, 502, 503, 504)
)  # an answer with one of these may be tried elsewhere: its bytes are held back


class Policy:
    """State of the gateway. Only `handle` decides the flow; the other methods change one thing each."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        names = [url.rstrip("/") for url in settings.engines]
        self.engines = {name: Engine(name, settings.credit, settings.foresight.kv_tokens) for name in names}
        self.rates = Rates(settings.foresight)
        remembered = Prefixes(settings.foresight.memory_tokens) if settings.memory_attached else None
        everyone = list(self.engines.values())
        self.routes = Routes(everyone, settings.routing, settings.oldest_share_every, self.rates, remembered)
        self.lengths = Lengths(settings.foresight)
        self.workflows = Workflows(settings.foresight, settings.memory_attached)
        self.line = Line()
        self.at: dict[str, str] = {}  # running call -> engine
        self.tally = Tally()
        self.arrivals = 0
        self.silent_since_s: float | None = None  # no engine alive since
        self.wake_at_s: float | None = None

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event at time now [s]; return what the shell must do, in order."""
        commands: list[Command] = []
        match event:
            case EngineUp(name):
                if self.engines[name].up(event.models, event.kv_tokens, event.kv_usage):
                    self.routes.epoch += 1
            case EngineDown(name, _, refused):
                self.lose(name, refused)
            case Arrived(call):
                commands += self.arrive(call, now)
            case FirstByte(call_id, attempt):
                if self.running(call_id, attempt) is not None:
                    self.engines[self.at[call_id]].began(call_id, now)
            case Finished():
                commands += self.finish(event, now)
            case Failed():
                commands += self.fail(event, now)
            case Gone(call_id):
                commands += self.forget(call_id, now)
            case Woke():
                self.wake_at_s = None
            case _:
                assert_never(event)
        commands += self.expire(now)
        commands += self.start(now)
        if isinstance(event, Arrived) and event.call.id in self.line:
            commands.append(self.explain_hold(event.call.id))
        commands += self.arm()
        self.tally.count(commands)
        return commands

    # -- arrivals -------------------------------------------------------------------------------------------------

    def arrive(self, call: Call, now: float) -> list[Command]:
        """Into the line, or 429 when it is full."""
        if call.id in self.line or call.id in self.at:
            raise LawBroken(8, f"call {call.id} arrived twice")
        self.tally.calls += 1
        if len(self.line) >= self.settings.queue_limit:
            why = f"{len(self.line)} calls wait, which is the limit. Try again later, or raise agents.queue_limit."
            return [Reject(call.id, 429, why, self.retry_after_s(now))]
        workflow, commands = self.workflows.enter(call, now)
        key: Key = (call.identity.role, call.identity.stage_name)
        forecast = self.lengths.predict(call, workflow.lengths.get(key))
        waiting = Waiting(
            call=call,
            number=self.arrivals,
            arrived_s=now,
            urgency=(0, 0.0, self.arrivals),
            forecast=forecast,
            remaining_s=0.0,
            prompt_tokens=self.rates.prompt_tokens(call.chars),
            workflow=workflow.name,
        )
        self.arrivals += 1
        self.rank(waiting, workflow, now)
        self.line.add(waiting)
        return commands

    def rank(self, waiting: Waiting, workflow: Workflow, now: float) -> None:
        """Predict what remains of the workflow, and give the call its place."""
        call = waiting.call
        nearest_s = min((s.prefill_s + s.load_s for s in scores(waiting, self.routes, now)), default=None)
        if nearest_s is None:
            nearest_s = waiting.prompt_tokens * self.rates.prefill_s
        waiting.remaining_s = self.workflows.remaining.predict(call, nearest_s + decode_s(waiting, self.rates))
        workflow.klass = call.identity.klass or workflow.klass
        place = (1 if workflow.klass == "batch" else 0, waiting.remaining_s)
        if call.identity.parent:
            place = workflow.groups.ensure(call.identity.parent, lambda: place)
        if self.settings.policy == "srtf":
            waiting.urgency = (*place, waiting.number)

    # -- starts ---------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Command]:
        """Book every call that can start now."""
        commands: list[Command] = []
        while len(self.line) and (begin := plan(self.line, self.routes, now)) is not None:
            commands.append(self.book(begin, now))
        return commands

    def book(self, begin: Start, now: float) -> Dispatch:
        waiting, engine = begin.waiting, begin.engine
        self.line.remove(waiting.call.id)
        waiting.attempts += 1
        best = next(score for score in begin.scores if score.engine == engine.name)
        limits = self.settings.limits
        left_s = max(0.001, waiting.arrived_s + limits.total_s - now)
        dispatch = Dispatch(
            call=waiting.call.id,
            engine=engine.name,
            attempt=waiting.attempts,
            first_byte_s=min(limits.first_byte_s, left_s),
            total_s=left_s,
            queued_s=now - waiting.arrived_s,
            reason=begin.reason,
            scores=begin.scores,
            predicted_tokens=waiting.forecast.tokens,
            bound_tokens=waiting.forecast.bound_tokens,
            predicted_from=waiting.forecast.origin,
            remaining_s=waiting.remaining_s,
            reserved_tokens=waiting.reserve_tokens,
        )
        prefill_s = best.prefill_s + best.load_s
        decode = decode_s(waiting, self.rates)
        engine.take(Running(waiting, dispatch, now, prefill_s, decode, shared=len(engine.running)))
        engine.prefixes.touch(waiting.call.chain, self.rates.tokens_per_char)
        self.at[waiting.call.id] = engine.name
        return dispatch

    def explain_hold(self, call_id: str) -> Hold:
        ahead = self.line.ahead_of(call_id)
        waiting = next(w for w in self.line.by_age() if w.call.id == call_id)
        free = {engine.name: engine.free if engine.alive else 0 for engine in self.routes.engines}
        return Hold(call_id, len(ahead) + 1, tuple(ahead[:8]), waiting.remaining_s, free)

    # -- endings --------------------------------------------------------------------------------------------------

    def running(self, call_id: str, attempt: int) -> Running | None:
        """The attempt under way; None when it is over, so that late news of it is dropped."""
        name = self.at.get(call_id)
        running = self.engines[name].running[call_id] if name is not None else None
        return running if running is not None and running.dispatch.attempt == attempt else None

    def release(self, call_id: str) -> Running:
        """Credit and reservation are free again."""
        return self.engines[self.at.pop(call_id)].release(call_id)

    def finish(self, event: Finished, now: float) -> list[Command]:
        """The engine answered: learn from it, and say what comes next."""
        if self.running(event.call, event.attempt) is None:
            return []
        running = self.release(event.call)
        waiting, dispatch = running.waiting, running.dispatch
        call = waiting.call
        engine = self.engines[dispatch.engine]
        engine.answered += 1
        first_byte_s = running.first_byte_s if running.first_byte_s is not None else now
        settle = Settle(
            call.id, engine.name, event.status, event.usage, first_byte_s - waiting.arrived_s, now - waiting.arrived_s
        )
        learned = event.status == 200 and event.usage is not None
        if event.usage is not None and event.status == 200:
            self.rates.learn(call, event.usage, first_byte_s - running.started_s, now - first_byte_s, running.shared)
            self.lengths.learn(call, waiting.forecast, event.usage.output_tokens)
            self.tally.learn(running, event.usage, self.settings.foresight.prior_max_tokens)
            if self.routes.remembered is not None:
                self.routes.remembered.touch(call.chain, self.rates.tokens_per_char)
        usage = event.usage if learned else None
        return [settle, *self.workflows.leave(call, waiting.workflow, usage, running.prefill_s, self.rates, now)]

    def fail(self, event: Failed, now: float) -> list[Command]:
        """An attempt ended badly: again elsewhere while nothing was sent, else one clear ending."""
        if self.running(event.call, event.attempt) is None:
            return []
        running = self.release(event.call)
        waiting, name = running.waiting, running.dispatch.engine
        self.engines[name].failed += 1
        self.tally.failed_attempts += 1
        if event.kind == "refused":
            self.lose(name, refused=True)
        ending = self.ending(event, waiting, name)
        if ending is None:
            self.line.add(waiting)
            return []
        return [ending, *self.workflows.leave(waiting.call, waiting.workflow, None, 0.0, self.rates, now)]

    def ending(self, event: Failed, waiting: Waiting, name: str) -> Command | None:
        """None: it may be tried again."""
        if event.started:
            return Break(event.call, f"engine {name} broke off its answer ({event.why}).")
        if event.kind == "timeout":
            return Reject(event.call, 504, f"engine {name} gave no answer in time ({event.why}). Raise agents.limits.")
        waiting.tried = (*waiting.tried, name)
        waiting.home_epoch = -1
        waiting.broken += event.kind != "refused"
        others = [engine for engine in choices(waiting, self.routes) if engine.name not in waiting.tried]
        spent = waiting.broken >= self.settings.limits.attempts
        if event.kind == "status" and (spent or not others):
            return Relay(event.call, f"engine {name} says: {event.why}")
        if spent:
            return Reject(
                event.call, 502, f"{waiting.broken} attempts broke, the last on {name}: {event.why}. See /health."
            )
        return None

    def forget(self, call_id: str, now: float) -> list[Command]:
        """The client went away: nothing of its call stays behind."""
        if call_id in self.line:
            waiting, engine = self.line.remove(call_id), ""
        elif call_id in self.at:
            engine = self.at[call_id]
            waiting = self.release(call_id).waiting
        else:
            return []
        told = self.workflows.leave(waiting.call, waiting.workflow, None, 0.0, self.rates, now)
        return [Abort(call_id, engine), *told]

    # -- time -----------------------------------------------------------------------------------------------------

    def lose(self, name: str, refused: bool) -> None:
        """An engine does not answer. Calls in flight there end by themselves, good or bad."""
        if self.engines[name].down(refused):
            self.routes.epoch += 1

    def due_s(self, waiting: Waiting) -> float:
        """When a waiting call is given up."""
        due_s = waiting.arrived_s + self.settings.limits.total_s
        if self.silent_since_s is None:
            return due_s
        return min(due_s, max(self.silent_since_s, waiting.arrived_s) + self.settings.limits.no_engine_s)

    def expire(self, now: float) -> list[Command]:
        """Give up on calls that waited too long: 503 when no engine lives, else 504. Both orders are those of age."""
        if any(engine.alive for engine in self.engines.values()):
            self.silent_since_s = None
        elif self.silent_since_s is None:
            self.silent_since_s = now
        commands: list[Command] = []
        while (oldest := self.line.oldest()) is not None and self.due_s(oldest) <= now:
            call = self.line.remove(oldest.call.id).call
            if self.silent_since_s is None:
                why = f"it waited {self.settings.limits.total_s:g} s. Raise agents.limits.total_s or add engines."
                commands.append(Reject(call.id, 504, why))
            else:
                why = f"none of {', '.join(self.engines)} answers. Start an engine, or name others with --engine."
                commands.append(Reject(call.id, 503, why, ceil(self.settings.limits.probe_every_s)))
            commands += self.workflows.leave(call, oldest.workflow, None, 0.0, self.rates, now)
        return commands

    def arm(self) -> list[Command]:
        """One timer at most is needed: that of the oldest waiting call."""
        oldest = self.line.oldest()
        if oldest is None or (self.wake_at_s is not None and self.wake_at_s <= self.due_s(oldest)):
            return []
        self.wake_at_s = self.due_s(oldest)
        return [Wake(self.wake_at_s)]

    def retry_after_s(self, now: float) -> int:
        """Whole seconds, 1..60: predicted time until the line has moved by one round of credit."""
        busy_s = [engine.outstanding_s(now) for engine in self.engines.values() if engine.alive]
        return min(60, max(1, ceil(min(busy_s, default=self.settings.limits.no_engine_s))))

    # -- what others may look at ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Credits, reservations and bounds; raises LawBroken with the one that does not hold."""
        for engine in self.engines.values():
            if not 0 <= len(engine.running) <= engine.credit:
                raise LawBroken(2, f"{engine.name} runs {len(engine.running)} calls, credit {engine.credit}")
            if engine.reserved_tokens != sum(r.dispatch.reserved_tokens for r in engine.running.values()):
                raise LawBroken(2, f"{engine.name} reserves {engine.reserved_tokens} tokens, its calls others")
        if sorted(self.at) != sorted(call for engine in self.engines.values() for call in engine.running):
            raise LawBroken(8, "a running call is booked at no engine")

    def stats(self) -> dict[str, Any]:
        """Numbers for /v1/outrider/stats and /metrics."""
        return self.tally.report(self.routes.engines, len(self.line), len(self.workflows), self.rates)
