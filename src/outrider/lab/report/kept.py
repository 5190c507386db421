"""run.json: what a report is made of, kept beside the journals, so that `outrider report` can draw it again later."""

import json
from pathlib import Path
from typing import Any

from outrider.errors import CallerError
from outrider.lab.report.run import Arm, Run

NAME = "run.json"


def keep(directory: Path, run: Run) -> None:
    """Write run.json into the run's directory; the directories of its parts are named relative to it."""
    experts = run.experts_directory
    (directory / NAME).write_text(
        json.dumps(
            {
                "title": run.title,
                "simulated": run.simulated,
                "arms": [
                    {"name": arm.name, "key": arm.key, "directory": str(arm.directory.relative_to(directory))}
                    for arm in run.arms
                ],
                "experts_directory": str(experts.relative_to(directory)) if experts else None,
                "predicted": run.predicted,
                "plainly": run.plainly,
                "figures": run.figures,
            },
            indent=1,
        )
        + "\n"
    )


def kept(directory: Path) -> Run:
    """The run that was kept in `directory`. CallerError where there is none."""
    path = directory / NAME
    try:
        told = json.loads(path.read_text())
        experts = told["experts_directory"]
        return Run(
            title=told["title"],
            simulated=told["simulated"],
            arms=[
                Arm(arm["name"], directory / arm["directory"], _at(told["figures"], arm), arm["key"])
                for arm in told["arms"]
            ],
            experts=told["figures"].get("experts"),
            experts_directory=directory / experts if experts else None,
            predicted=told["predicted"],
            plainly=told["plainly"],
            figures=told["figures"],
        )
    except OSError as error:
        why = f"report {path}: {error.strerror}. Name the directory that a demo or simulation with --keep left."
        raise CallerError(why) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CallerError(f"report {path}: no kept run ({type(error).__name__}: {error}). Restore the file.") from error


def _at(figures: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """An arm's part of the figures, by its key."""
    found = figures
    for name in (arm["name"] if arm["key"] is None else arm["key"]).split("."):
        found = found[name] if name else found
    return found
