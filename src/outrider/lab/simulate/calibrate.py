"""Fits a modelled engine's speed to a live run, from nothing but the gateway's journal of it.

Every engine of the run is given its calls again, at the very moments at which the live gateway dispatched them, with
the prompt, reused and output tokens that were reported; the four constants of `Speed` are those with which the modelled
engines' first and last tokens come closest to the live ones, in seconds, least squares (Levenberg-Marquardt on the
constants' logarithms, so that none can become negative). What is fitted is the engine, not the policy: which arm it
served does not enter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outrider import journal
from outrider.agents import events as ev
from outrider.errors import CallerError
from outrider.lab.clock import Clock
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.job import Job
from outrider.lab.twins.pool import Pool
from outrider.lab.twins.speed import Profile, Speed

BLOCK_TOKENS = 16  # of the cache in which the fit lays its requests; reported reuse is kept as it was
KV_TOKENS = 100_000_000  # of an engine that does not say
LEAST_CALLS = 8
ROUNDS = 60
NUDGE = 0.02  # of a constant's logarithm: below the steps that scheduling makes in the sum of squares
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """One answered attempt, as the journal has it; moments in seconds."""

    engine: str
    dispatched_s: float
    first_s: float
    ended_s: float
    prompt_tokens: int
    reused_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Fit:
    """`error_s`: root mean square over first and last tokens; `typical_s` of what was fitted, for comparison."""

    profile: Profile
    calls: int
    error_s: float
    typical_s: float


def calibrate(path: Path, start: Profile) -> Fit:
    """The engine of the run whose agents.jsonl is `path`. `start` gives what no journal tells: batch and KV bytes.

    Raises CallerError where it is no journal of agents, or has fewer than LEAST_CALLS streamed answers with usage.
    """
    seen, kv_tokens = observe(path)
    if len(seen) < LEAST_CALLS:
        raise CallerError(
            f"--calibrate {path}: {len(seen)} streamed answers with token counts, at least {LEAST_CALLS} are needed. "
            "Name the agents.jsonl of a longer run."
        )
    provenance = f"fitted to the {len(seen)} answered calls of {path}"
    return fit(seen, kv_tokens, msgspec.structs.replace(start, name="calibrated", provenance=provenance))


def fit(seen: Sequence[Observed], kv_tokens: int, start: Profile) -> Fit:
    """The speed with which engines of `kv_tokens` (0: boundless) come closest to what was seen, from `start` on."""
    speed, errors = _fit(partial(_errors, seen, kv_tokens or KV_TOKENS, start), start.speed)
    return Fit(msgspec.structs.replace(start, speed=speed), len(seen), _rms(errors), _rms(_spans(seen)))


def observe(path: Path) -> tuple[list[Observed], int]:
    """Answered attempts in order of dispatch, and the KV tokens that an engine of that run reported, or 0."""
    header, lines = journal.read(path)
    if header.policy != "agents":
        raise CallerError(f"--calibrate {path}: the journal of {header.policy!r}. Name an agents.jsonl.")
    events, commands = msgspec.json.Decoder(ev.Event), msgspec.json.Decoder(list[ev.Command])
    sent: dict[tuple[str, int], tuple[str, float]] = {}
    first: dict[tuple[str, int], float] = {}
    streams: dict[str, bool] = {}
    seen: list[Observed] = []
    kv_tokens = 0
    for line in lines:
        match events.decode(line.event):
            case ev.EngineUp(_, _, said):
                kv_tokens = said or kv_tokens
            case ev.Arrived(call):
                streams[call.id] = call.stream
            case ev.FirstByte(call_id, attempt):
                first[call_id, attempt] = line.now
            case ev.Finished(call_id, attempt, 200, usage) if usage and not usage.estimated and streams.get(call_id):
                engine, at_s = sent[call_id, attempt]
                begun_s = first.get((call_id, attempt), line.now)
                tokens = usage.prompt_tokens, usage.cached_tokens, usage.output_tokens
                seen.append(Observed(engine, at_s, begun_s, line.now, *tokens))
            case _:
                pass
        for command in commands.decode(line.commands):
            if isinstance(command, ev.Dispatch):
                sent[command.call, command.attempt] = (command.engine, line.now)
    return sorted(seen, key=lambda one: (one.dispatched_s, one.engine)), kv_tokens


class _Recalled:
    """Stands for the caches of the live run: what a request reused there is in the engine at once."""

    def __init__(self, engine: Engine, reused: dict[Job, int]) -> None:
        self._engine, self._reused = engine, reused

    def look_up(self, job: Job) -> None:
        job.external = min(self._reused[job] // BLOCK_TOKENS, self._engine.reusable(job))

    def load(self, job: Job) -> None:
        self._engine.clock.at(self._engine.clock.now, lambda: self._engine.loaded(job, job.external or 0))

    def save(self, job: Job, start: int, stop: int) -> None:
        pass

    def remember(self, job: Job) -> None:
        pass


def rerun(seen: Sequence[Observed], kv_tokens: int, profile: Profile, speed: Speed) -> list[tuple[float, float]]:
    """When each call's first and last token would come, in the order of `seen`; as seen by the gateway."""
    clock, hop_s = Clock(), profile.hop_s
    came: list[list[float]] = [[] for _ in seen]
    engines: dict[str, Engine] = {}
    reused: dict[Job, int] = {}
    blocks = sum(one.prompt_tokens // BLOCK_TOKENS for one in seen)
    begin_s = seen[0].dispatched_s
    taken = 0
    for number, one in enumerate(seen):
        if one.engine not in engines:
            pool = Pool(kv_tokens // BLOCK_TOKENS, blocks)
            engine = Engine(clock, speed, pool, BLOCK_TOKENS, profile.max_batch_tokens, profile.max_num_seqs)
            engine.hook = _Recalled(engine, reused)
            engines[one.engine] = engine
        whole = one.prompt_tokens // BLOCK_TOKENS
        chain = np.arange(taken, taken + whole)
        taken += whole

        def note(number: int = number) -> None:
            came[number].append(clock.now + hop_s)

        job = Job(str(number), one.prompt_tokens, max(one.output_tokens, 1), chain, note, note, _cannot_fail)
        reused[job] = one.reused_tokens
        clock.at(one.dispatched_s - begin_s + hop_s, partial(engines[one.engine].submit, job))
    clock.run()
    return [(times[0] + begin_s, times[-1] + begin_s) for times in came]


def _cannot_fail(kind: str, why: str) -> None:
    raise AssertionError(f"a modelled engine that nobody killed failed: {kind}, {why}")


def _errors(seen: Sequence[Observed], kv_tokens: int, profile: Profile, speed: Speed) -> Vector:
    """Seconds by which the model misses: first token after dispatch, then last token after the first."""
    came = rerun(seen, kv_tokens, profile, speed)
    spans = [(first_s - one.dispatched_s, last_s - first_s) for one, (first_s, last_s) in zip(seen, came, strict=True)]
    return np.array(spans).ravel() - _spans(seen)


def _spans(seen: Sequence[Observed]) -> Vector:
    return np.array([(one.first_s - one.dispatched_s, one.ended_s - one.first_s) for one in seen]).ravel()


def _rms(errors: Vector) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def _fit(errors_of: Callable[[Speed], Vector], start: Speed) -> tuple[Speed, Vector]:
    """Least squares from `start`; stops when a round gains less than a part in ten thousand."""
    place = np.log(np.maximum(np.array(msgspec.structs.astuple(start)), 1e-12))
    errors = errors_of(_speed(place))
    damping = 1.0
    for _ in range(ROUNDS):
        slopes = np.stack([(errors_of(_speed(place + nudge)) - errors) / NUDGE for nudge in NUDGE * np.eye(4)], axis=1)
        square: Vector = slopes.T @ slopes
        gain = 0.0
        while damping < 1e8:
            step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-12), -slopes.T @ errors)
            there = place + np.clip(step, -1.0, 1.0)
            then = errors_of(_speed(there))
            if then @ then < errors @ errors:
                gain = 1 - float(then @ then) / float(errors @ errors)
                place, errors, damping = there, then, damping / 5
                break
            damping *= 5
        if gain < 1e-4:
            break
    return _speed(place), errors


def _speed(place: Vector) -> Speed:
    return Speed(*(float(value) for value in np.exp(place)))
