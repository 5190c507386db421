"""One quick demo run, shared by all tests that look at it: the real command, in a process of its own."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OUTRIDER = [sys.executable, "-m", "outrider"]


@dataclass(frozen=True)
class DemoRun:
    """What `outrider demo --quick` printed, wrote and left behind."""

    figures: dict[str, Any]
    report: Path
    printed: str
    directory: Path
    wall_s: float


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    keep = tmp_path_factory.mktemp("demo")
    target, report = keep / "demo.json", keep / "demo-report.html"
    began_s = time.monotonic()
    done = subprocess.run(
        [*OUTRIDER, "demo", "--quick", "--json", str(target), "--keep", str(keep), "--report", str(report)],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (directory,) = (path for path in keep.iterdir() if path.is_dir())
    return DemoRun(json.loads(target.read_text()), report, done.stdout, directory, time.monotonic() - began_s)
