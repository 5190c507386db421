"""The report of a run: one HTML page that needs nothing else, and a trace for Perfetto. Called by demo and simulate."""

import os
import tempfile
from pathlib import Path

from outrider.errors import CallerError
from outrider.lab.report import page
from outrider.lab.report.run import Arm, Run, read

__all__ = ["Arm", "Run", "check", "trace_path", "write"]


def trace_path(path: Path) -> Path:
    """Where the trace goes: outrider-trace.json beside outrider-report.html, x-trace.json beside x.html."""
    return path.with_name(path.stem.removesuffix("-report") + "-trace.json")


def check(path: Path) -> None:
    """CallerError where the report could not be written later; leaves nothing behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, os.strerror(21))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CallerError(
            f"--report {path}: {error.strerror}. Name a file that can be written, or --report none."
        ) from error


def write(path: Path, run: Run) -> None:
    """Write the page to `path` and the trace beside it; what was there is replaced whole, or not at all."""
    journals = read(run)
    replace(path, page.render(run, journals))


def replace(path: Path, text: str) -> None:
    """No reader ever sees half a file."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
