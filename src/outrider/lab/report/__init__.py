"""The report of a run: one HTML page that needs nothing else, and a trace for Perfetto. Called by demo and simulate."""

import errno
import os
import tempfile
from pathlib import Path

from outrider.errors import CallerError
from outrider.lab.report import page, trace
from outrider.lab.report.kept import keep, kept
from outrider.lab.report.run import Arm, Run, foretold, read

__all__ = ["Arm", "Run", "check", "foretold", "keep", "kept", "trace_path", "write"]


def trace_path(path: Path) -> Path:
    """Where the trace goes: outrider-trace.json beside outrider-report.html, x-trace.json beside x.html."""
    return path.with_name(path.stem.removesuffix("-report") + "-trace.json")


def check(path: Path) -> None:
    """CallerError where the report could not be written later; leaves nothing behind."""
    try:
        for target in (path, trace_path(path)):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CallerError(
            f"--report {path}: {error.strerror}. Name a file that can be written, or --report none."
        ) from error


def write(path: Path, run: Run) -> None:
    """Write the page to `path` and the trace beside it; what was there is replaced whole, or not at all."""
    journals = read(run)
    replace(path, page.render(run, journals).encode())
    replace(trace_path(path), trace.trace(run, journals))


def replace(path: Path, content: bytes) -> None:
    """No reader ever sees half a file."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
