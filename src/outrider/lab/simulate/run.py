"""`outrider simulate`: read a trace, play it against the real policies on the virtual clock, say what it would cost.

Everything on stdout follows from the trace, the options and the seed; progress and the time that it took go to stderr.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import outrider
from outrider.errors import CallerError
from outrider.lab import report, traces
from outrider.lab.simulate import arm, calibrate, callers, predict, profiles, table
from outrider.lab.traces.workload import Workload
from outrider.lab.twins.agents import TOO_LONG
from outrider.lab.twins.speed import Profile
from outrider.memory.settings import Settings as MemorySettings
from outrider.memory.tiers.disk import HEADER_BYTES
from outrider.memory.tiers.hybrid import modelled
from outrider.memory.tiers.spec import parse_tiers

ENGINES = 2
ASKED, COMPARED = "outrider", "baseline"  # names of the arms, and of their folders below --keep


@dataclass(frozen=True)
class Options:
    """What the command line asked for. None: see `--help` for what is taken instead."""

    trace: Path
    policy: Literal["fcfs", "srtf"] = "srtf"
    routing: Literal["sticky", "residency"] = "residency"
    tiers: str = "none"
    engines: int | None = None
    kv_tokens: int | None = None
    credit: int | None = None
    profile: str | None = None
    calibrate: Path | None = None
    format: str | None = None
    limit: int | None = None
    rate: float | None = None
    seed: int = 0
    compare: bool = False
    json: bool = False
    keep: Path | None = None
    report: Path | None = None


def run(options: Options) -> dict[str, Any]:
    """Simulate and print; returns what `--json` writes. CallerError for a trace or option that cannot serve."""
    if options.keep is not None and not options.keep.is_dir():
        raise CallerError(f"--keep {options.keep}: no such directory. Make it first, or name another.")
    if options.report:
        report.check(options.report)
    began_s = time.monotonic()
    workload = traces.read(options.trace, options.format, options.seed, options.limit, options.rate)
    start = profiles.named(options.profile or (profiles.EMBEDDED if options.calibrate else profiles.DEFAULT))
    fit = calibrate.calibrate(options.calibrate, start) if options.calibrate else None
    live = predict.live(options.trace) if workload.format == "outrider" else None
    fleet = _fleet(options, live, fit.profile if fit else start)
    result = _about(options, workload, fleet, fit)
    baseline = replace(fleet, policy="fcfs", routing="sticky", memory=None)
    arms = {COMPARED: baseline, ASKED: fleet} if options.compare else {ASKED: fleet}
    with _directory(options) as directory:
        found = {name: _arm(name, workload, which, options, directory) for name, which in arms.items()}
        result |= found[ASKED] | ({COMPARED: found[COMPARED]} if options.compare else {})
        result["plainly"] += _given_up(found[ASKED], fleet)
        if live is not None:
            foretold, remark = _foretold(options, live, fleet, found[ASKED])
            result |= foretold
            result["plainly"] += remark
        if options.json:
            sys.stdout.write(json.dumps(result, indent=1) + "\n")
        else:
            table.show(Console(), result)
        news = Console(stderr=True, soft_wrap=True, highlight=False)
        news.print(f"Simulated in {time.monotonic() - began_s:.1f} s.", style="dim")
        if directory is not None:
            told = _told(options, workload, fleet, result, directory)
            report.keep(directory, told)
            if options.keep is not None:
                news.print(f"Kept: {directory}", style="dim")
            if options.report is not None:
                report.write(options.report, told)
                news.print(f"Report: {options.report}, trace: {report.trace_path(options.report)}", style="dim")
    return result


def _given_up(found: dict[str, Any], fleet: arm.Fleet) -> list[str]:
    """Why calls were not answered, and what helps."""
    if not found["refused"]:
        return []
    told = ", ".join(f"{count:,} with status {status}" for status, count in found["refused"].items())
    mend = {
        str(TOO_LONG): f"{TOO_LONG}: prompt and answer never fit a cache of {fleet.kv_tokens:,} tokens, "
        "raise --kv-tokens",
        "429": f"429: the gateway's line was full {callers.ATTEMPTS} times, raise --engines or --credit",
    }
    whys = "; ".join(why for status, why in mend.items() if status in found["refused"])
    return [
        f"Calls were given up: {told}{f' ({whys})' if whys else ''}. {found['workflows_abandoned']:,} workflows did "
        "not come to their end; times are of the others."
    ]


def _foretold(
    options: Options, live: predict.Live, fleet: arm.Fleet, found: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Prediction beside truth, where what was simulated is what ran; else a sentence that says what differs."""
    differs = predict.differs(live, fleet)
    differs += [f"--{name}" for name in ("limit", "rate") if getattr(options, name) is not None]
    if found["refused"]:
        differs.append("calls that were given up")
    if options.profile is None and options.calibrate is None:
        differs.append("engines of a speed that nobody named (--calibrate, --profile)")
    if differs:
        return {}, [f"No prediction of the live run, since this one has {', '.join(differs)}."]
    same = options.calibrate is not None and options.calibrate.samefile(options.trace)
    return predict.against(options.trace, found), (
        ["The engines were fitted to the very run that they foretell: a fit, no prediction."] if same else []
    )


def _fleet(options: Options, live: predict.Live | None, profile: Profile) -> arm.Fleet:
    """Sizes as asked for; of a live run's journal, those of that run; else the profile's."""
    engines, kv_tokens, credit = ENGINES, profile.kv_tokens, profile.max_num_seqs
    if live is not None:
        engines, kv_tokens, credit = live.engines, live.kv_tokens or kv_tokens, live.credit
    return arm.Fleet(
        profile,
        options.engines or engines,
        options.kv_tokens or kv_tokens,
        options.credit or credit,
        options.policy,
        options.routing,
        _memory(options.tiers),
    )


def _memory(tiers: str) -> MemorySettings | None:
    if tiers == "none":
        return None
    found = parse_tiers(tiers, default_path=Path("simulated"))
    device = modelled(found.hybrid) if found.hybrid else None
    return MemorySettings(found.host_bytes, found.disk_bytes, header_bytes=HEADER_BYTES, hybrid=device)


def _about(options: Options, workload: Workload, fleet: arm.Fleet, fit: calibrate.Fit | None) -> dict[str, Any]:
    """What was simulated, and on which assumptions."""
    notes = list(workload.notes)
    if fleet.memory is not None and (blocks := arm.page_blocks(workload, fleet.profile, fleet.memory)) > 1:
        notes.append(
            f"memory's blocks hold {blocks * workload.block_tokens} tokens, {blocks} of the engine's, "
            "so that the run takes minutes"
        )
    profile = fleet.profile
    engine: dict[str, Any] = {
        "profile": profile.name,
        "provenance": profile.provenance,
        "speed": msgspec.to_builtins(profile.speed),
        "max_batch_tokens": profile.max_batch_tokens,
        "max_num_seqs": profile.max_num_seqs,
        "block_tokens": workload.block_tokens,
        "kv_tokens": fleet.kv_tokens,
        "kv_bytes_per_token": profile.kv_bytes_per_token,
    }
    if fit is not None:
        engine["fit"] = {"calls": fit.calls, "error_s": fit.error_s, "typical_s": fit.typical_s}
    return {
        "simulated": True,
        "outrider": outrider.__version__,
        "seed": options.seed,
        "trace": {"source": workload.source, "format": workload.format, "notes": notes},
        "policy": fleet.policy,
        "routing": fleet.routing,
        "tiers": options.tiers,
        "credit": fleet.credit,
        "engine": engine,
        "plainly": [
            f"Simulated: no model ran. Each of {fleet.engines} engines is a model of one, {profile.provenance}.",
            "The policies are the very objects that run live; links are as fast as memory's settings believe.",
            *notes,
        ],
    }


@contextlib.contextmanager
def _directory(options: Options) -> Iterator[Path | None]:
    """A new directory for the journals: below --keep, else until the report is written; None: nobody reads them."""
    if options.keep is not None:
        yield Path(tempfile.mkdtemp(prefix="outrider-", dir=options.keep))
    elif options.report is None:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="outrider-") as name:
            yield Path(name)


def _told(
    options: Options, workload: Workload, fleet: arm.Fleet, result: dict[str, Any], directory: Path
) -> report.Run:
    """What the report is made of."""
    arms = [report.Arm(ASKED, directory / ASKED, result, key="")]
    if options.compare:
        arms.insert(0, report.Arm(COMPARED, directory / COMPARED, result[COMPARED]))
    live = options.trace if "predicted" in result else None
    what = f"{options.trace.name} ({workload.format}), {result['calls']:,} calls"
    return report.Run(
        title=f"{what} on {fleet.engines} modelled engines",
        simulated=True,
        arms=arms,
        predicted=report.foretold(directory / ASKED / "agents.jsonl", live) if live else None,
        plainly=result["plainly"],
        figures=result,
    )


def _arm(name: str, workload: Workload, fleet: arm.Fleet, options: Options, directory: Path | None) -> dict[str, Any]:
    own = directory / name if directory else None
    if own is not None:
        own.mkdir()
    total = sum(len(workflow.calls) for workflow in workload.workflows)
    with _bar(f"{name}: calls", total, options.json) as step:
        return arm.play(workload, fleet, own, step)


@contextlib.contextmanager
def _bar(title: str, total: int, silent: bool) -> Iterator[Callable[[], object]]:
    """A progress bar on a terminal's stderr; nothing anywhere else."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=silent or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
