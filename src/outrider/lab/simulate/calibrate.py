"""Fits a modelled engine's speed to a live run, from nothing but the gateway's journal of it.

Every engine of the run is given its calls again, at the very moments at which the live gateway dispatched them, with
the prompt, reused and output tokens that were reported; the four constants of `Speed` are those with which the modelled
engines' first and last tokens come closest to the live ones, in seconds, least squares over the constants' logarithms.
What is fitted is the engine, not the policy: which arm it served does not enter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outrider import journal
from outrider.agents import events as ev
from outrider.errors import CallerError
from outrider.lab.clock import Clock
from outrider.lab.simulate.callers import ids_of
from outrider.lab.traces.blocks import Ids as Numbers
from outrider.lab.traces.blocks import PrefixTree
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.job import Job
from outrider.lab.twins.pool import Ids, Pool
from outrider.lab.twins.speed import Profile, Speed

Vector = NDArray[np.float64]

BLOCK_TOKENS = 16  # of the cache in which the fit lays its requests; reported reuse is kept as it was
KV_TOKENS = 100_000_000  # of an engine that does not say
LEAST_CALLS = 8
BENT = ((1, 1, 1, 1), (4, 1, 0.25, 1), (0.25, 1, 4, 1), (1, 4, 1, 1), (2, 2, 2, 2))  # starts: times these constants


def no_chain() -> Ids:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Observed:
    """One answered attempt, as the journal has it; moments in seconds. Equal ids mean equal beginnings of prompts."""

    engine: str
    dispatched_s: float
    first_s: float
    ended_s: float
    prompt_tokens: int
    reused_tokens: int
    output_tokens: int
    chain: Ids = field(default_factory=no_chain)  # of the prompt's whole blocks


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
    header, _ = journal.read(path)
    if header.policy != "agents":
        raise CallerError(f"--calibrate {path}: the journal of {header.policy!r}. Name an agents.jsonl.")
    sent: dict[tuple[str, int], tuple[str, float]] = {}
    first: dict[tuple[str, int], float] = {}
    asked: dict[str, ev.Call] = {}
    tree = PrefixTree(BLOCK_TOKENS, Numbers())
    seen: dict[tuple[str, int], Observed] = {}
    kv_tokens = 0
    for now, event, commands in journal.told(path, ev.Event, ev.Command):
        match event:
            case ev.EngineUp(_, _, said):
                kv_tokens = said or kv_tokens
            case ev.Arrived(call):
                asked[call.id] = call
            case ev.FirstByte(call_id, attempt):
                first[call_id, attempt] = now
            case ev.Finished(call_id, attempt, 200, usage) if usage and not usage.estimated and asked[call_id].stream:
                engine, at_s = sent[call_id, attempt]
                begun_s = first.get((call_id, attempt), now)
                tokens = usage.prompt_tokens, usage.cached_tokens, usage.output_tokens
                pieces = [(link.digest, link.chars) for link in asked[call_id].chain]
                chain = ids_of(tree.lay(pieces, usage.prompt_tokens))
                seen[call_id, attempt] = Observed(engine, at_s, begun_s, now, *tokens, chain)
            case _:
                pass
        for command in commands:
            if isinstance(command, ev.Dispatch):
                sent[command.call, command.attempt] = (command.engine, now)
    return [seen[name] for name in sent if name in seen], kv_tokens


class _Recalled:
    """Stands for memory: what a request reused in the live run beyond what its engine has now is there at once."""

    def __init__(self, engine: Engine, reused: dict[Job, int]) -> None:
        self._engine, self._reused = engine, reused

    def look_up(self, job: Job) -> None:
        job.external = self._reused[job] // BLOCK_TOKENS

    def load(self, job: Job) -> None:
        blocks = min(job.external or 0, self._engine.reusable(job))
        self._engine.loaded(job, blocks - job.computed // BLOCK_TOKENS)

    def save(self, job: Job, start: int, stop: int) -> None:
        """Nothing is kept beyond the engine's own cache."""

    def remember(self, job: Job) -> None:
        """Nobody wants it back."""


def rerun(seen: Sequence[Observed], kv_tokens: int, profile: Profile, speed: Speed) -> list[tuple[float, float]]:
    """When each call's first and last token would come, in the order of `seen`; as seen by the gateway."""
    clock, hop_s, begin_s = Clock(), profile.hop_s, seen[0].dispatched_s
    came: list[list[float]] = [[] for _ in seen]
    engines: dict[str, Engine] = {}
    reused: dict[Job, int] = {}
    ids = 1 + max((int(one.chain.max(initial=0)) for one in seen), default=0)
    for number, one in enumerate(seen):
        if one.engine not in engines:
            limits = profile.max_batch_tokens, profile.max_num_seqs
            engine = Engine(clock, speed, Pool(kv_tokens // BLOCK_TOKENS, ids), BLOCK_TOKENS, *limits)
            engine.hook = _Recalled(engine, reused)
            engines[one.engine] = engine

        def note(number: int = number) -> None:
            came[number].append(clock.now + hop_s)

        outputs = max(one.output_tokens, 1)
        job = Job(str(number), one.prompt_tokens, outputs, one.chain, note, note, _cannot_fail)
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
    """Least squares by Nelder and Mead's simplex, since scheduling makes the sum of squares jump.

    Downhill from `start` and from where it is bent in four ways, then once more from the best.
    """
    from scipy.optimize import minimize  # heavy, and needed here alone

    def height(place: Vector) -> float:
        return _rms(errors_of(_speed(place)))

    def descend(begin: Vector, size: float, calls: int, level_s: float) -> tuple[float, Vector]:
        simplex = np.vstack([begin, begin + size * np.eye(len(begin))])
        options = {"initial_simplex": simplex, "maxfev": calls, "xatol": np.inf, "fatol": level_s}
        found = minimize(height, begin, method="Nelder-Mead", options=options)
        return float(found.fun), found.x

    begin = np.log(np.maximum(np.array(msgspec.structs.astuple(start)), 1e-12))
    tried = [descend(begin + np.log(np.array(bent)), 0.7, 120, 1e-3) for bent in BENT]
    _, best = descend(min(tried, key=lambda found: found[0])[1], 0.3, 150, 1e-4)
    return _speed(best), errors_of(_speed(best))


def _speed(place: Vector) -> Speed:
    return Speed(*(float(value) for value in np.exp(place)))
