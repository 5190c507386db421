"""Traces: a file of calls as it was published, or a journal of ours -> the Workload that it asks of a cluster."""

from pathlib import Path

from outrider.errors import CallerError
from outrider.lab.traces.draft import started
from outrider.lab.traces.formats import FORMATS, named, recognise
from outrider.lab.traces.source import Progress, Source, silent
from outrider.lab.traces.workload import Call, Workflow, Workload

__all__ = ["FORMATS", "Call", "Workflow", "Workload", "read"]


def read(
    path: Path,
    format: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    rate: float | None = None,
    progress: Progress = silent,
) -> Workload:
    """Read a trace, plain or xz.

    format    a name of FORMATS; None recognises it by the content of the first line, never by the file's name
    seed      draws the arrivals of a trace that has none; not used otherwise
    limit     only the first so many workflows
    rate      workflows per second: stretches a trace's own arrivals to it, or draws them at it
    progress  called with bytes read and bytes in all as the file is read
    The same file and arguments give the same workload. CallerError says what is wrong with a file, and in which line.
    """
    if limit is not None and limit < 1:
        raise CallerError(f"limit {limit}: at least one workflow is needed. Raise it, or leave it out.")
    if rate is not None and not 0 < rate < float("inf"):
        raise CallerError(f"rate {rate}: not a number of workflows per second. Give one above 0, or leave it out.")
    name = format if format is not None else recognise(Source(path))
    draft = named(name).read(Source(path, progress), limit)
    if not draft.workflows:
        raise CallerError(f"{path}: no call in this {name} trace could be used. {' '.join(draft.notes[:3])}".strip())
    workflows, note = started(draft, seed, rate, limit)
    cut = () if limit is None else (f"only the first {len(workflows)} workflows are used",)
    return Workload(name, str(path), draft.block_tokens, workflows, (note, *cut, *draft.notes)).check()
