"""`outrider demo`: the whole loop on real input, in one run. Both arms, then the RL step, then the table.

Everything it starts ends with it, on Ctrl-C too, and what it wrote is deleted unless it was told where to keep it.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import outrider
from outrider.errors import CallerError
from outrider.lab import report, vllm_server
from outrider.lab.demo import arms, table, training, workload

FULL = arms.Fleet(model="smollm2", kv_tokens=1792, tiers="host=512MiB,disk=4GiB")
QUICK = arms.Fleet(model="tiny-moe", kv_tokens=1152, tiers="host=8MiB,disk=512MiB")
ARMS = ("baseline", "outrider")
VLLM_SAYS = (
    "vLLM's usage tells how many of a call's prompt tokens were reused, not how many memory gave: the table has "
    "that sum from vLLM's metrics, and the report, which is made of calls, counts them all as the engine's cache."
)
WEIGHTS = {"smollm2": "real trained weights", "tiny-moe": "random weights: its words mean nothing"}


@dataclass(frozen=True)
class Options:
    """What the command line asked for. `keep` and the parents of `json` and `report` must exist; None: not wanted."""

    repo: Path | None = None
    quick: bool = False
    json: Path | None = None
    keep: Path | None = None
    report: Path | None = None
    engine: str = "embedded"  # or vllm
    vllm_python: Path | None = None  # None: beside the checkout, or on the PATH


def run(options: Options) -> dict[str, Any]:
    """Run the demo and print it; returns what `--json` writes. CallerError for a path that cannot serve."""
    out = Console(stderr=False)
    _check(options)
    shape = workload.QUICK if options.quick else workload.Shape()
    fleet = _fleet(options)
    roots = (options.repo.resolve(),) if options.repo else workload.default_repo()
    workflows = workload.build(roots, shape)
    calls = sum(workflow.calls for workflow in workflows)
    out.print(
        f"Reviewing {', '.join(str(root) for root in roots)}: {len(workflows)} workflows, {calls} calls, "
        f"{fleet.engines} {'vLLM' if fleet.vllm else 'embedded'} engines of {fleet.kv_tokens} KV tokens, "
        f"model {fleet.model}.",
        soft_wrap=True,
    )
    began_s = time.monotonic()
    with run_directory(options.keep) as run_dir:
        with _bars(out) as bars:
            result: dict[str, Any] = {}
            for name in ARMS:
                result[name] = _arm(name, fleet, run_dir, workflows, bars)
            experts = bars.add_task("experts: rollouts", total=training.STEPS)
            result["experts"] = training.run(
                run_dir, roots, options.quick, lambda what: bars.update(experts, advance=1, description=what)
            )
        result["outrider"]["same_answers"] = _same(result)
        result["machine"] = _machine(fleet, shape, roots, time.monotonic() - began_s)
        table.show(out, result, sample=[f"{agent.name}/0" for agent in workflows[0].agents])
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
            out.print(f"Figures: {options.json}", soft_wrap=True)
        told = _told(result, run_dir)
        report.keep(run_dir, told)
        if options.report:
            report.write(options.report, told)
            out.print(f"Report: {options.report}, trace: {report.trace_path(options.report)}", soft_wrap=True)
    return result


def _fleet(options: Options) -> arms.Fleet:
    fleet = QUICK if options.quick else FULL
    if options.engine == "embedded":
        return fleet
    python = vllm_server.find_python(options.vllm_python)
    from outrider.lab.engine import models  # transformers: heavy, and only here needed in this process

    return dataclasses.replace(fleet, vllm=arms.Vllm(python, models.directory(fleet.model)))


def _check(options: Options) -> None:
    """What would fail at the end fails now."""
    if options.keep and not options.keep.is_dir():
        raise CallerError(f"--keep {options.keep}: no such directory. Make it first, or name another.")
    if options.json:
        try:
            options.json.open("a").close()
        except OSError as error:
            raise CallerError(f"--json {options.json}: {error.strerror}. Name a file that can be written.") from error
    if options.report:
        report.check(options.report)


@contextlib.contextmanager
def run_directory(keep: Path | None) -> Iterator[Path]:
    """Where one run's sockets, journals, logs and blocks lie: deleted at the end, or below `keep`."""
    parent = tempfile.mkdtemp(prefix="outrider-", dir=keep)
    try:
        yield Path(parent)
    finally:
        for name in ("blocks", "torch"):
            for scratch in Path(parent).glob(f"*/{name}"):
                shutil.rmtree(scratch, ignore_errors=True)
        if keep is None:
            shutil.rmtree(parent, ignore_errors=True)


def _bars(out: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=out)


def _arm(
    name: str, fleet: arms.Fleet, run_dir: Path, workflows: list[workload.Workflow], bars: Progress
) -> dict[str, Any]:
    total = sum(workflow.calls for workflow in workflows)
    bar = bars.add_task(f"{name}: engines start", total=total)
    with arms.running(name, fleet, run_dir) as arm:
        bars.update(bar, description=f"{name}: calls")
        return arms.play(arm, fleet.model, workflows, lambda answer: bars.update(bar, advance=1))


def _told(result: dict[str, Any], run_dir: Path) -> report.Run:
    """What the report is made of."""
    machine, baseline = result["machine"], result["baseline"]
    return report.Run(
        title=f"A code review by {baseline['workflows']} agent workflows of {baseline['calls']} calls, "
        f"on {machine['engines']} engines with {machine['kv_tokens']:,} KV tokens each ({machine['model']})",
        simulated=False,
        arms=[report.Arm(name, run_dir / name, result[name]) for name in ARMS],
        experts=result["experts"],
        experts_directory=run_dir / "experts",
        plainly=machine["plainly"],
        figures=result,
    )


def _same(result: dict[str, Any]) -> int:
    """Calls in which both arms gave the same words: all of them, where greedy fp32 decoding is exact."""
    before, after = (result[name]["answers"] for name in ARMS)
    return sum(before.get(call) == text for call, text in after.items())


def _machine(fleet: arms.Fleet, shape: workload.Shape, roots: tuple[Path, ...], wall_s: float) -> dict[str, Any]:
    engines = "Outrider's embedded CPU engine, one thread each, not vLLM or SGLang"
    if fleet.vllm:
        engines = "vLLM's CPU build, in float32, one core each; the baseline is vLLM with its own prefix cache"
    low_s, high_s = shape.pause_s
    return {
        "outrider": outrider.__version__,
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "model": fleet.model,
        "engine": "vllm" if fleet.vllm else "embedded",
        "engines": fleet.engines,
        "kv_tokens": fleet.kv_tokens,
        "tiers": fleet.tiers,
        "repo": [str(root) for root in roots],
        "wall_s": wall_s,
        "plainly": [
            f"The engines are {engines}.",
            f"{fleet.model} has {WEIGHTS[fleet.model]}.",
            f"Tools are real, their durations emulated: {low_s:g} to {high_s:g} s, the same in both arms.",
            "The RL step runs tiny-moe (random weights) on 2 gloo processes of this machine.",
            *([VLLM_SAYS] if fleet.vllm else []),
            "Prompt tokens computed are prompts less what engines reported as reused; preempted work is not in it.",
            "All figures were measured in this run, on this machine; nothing in the table is simulated.",
        ],
    }
