"""Plans and cost models as files: the npz that anyone can recount, links as TOML. Called by study.py and by users."""

import tomllib
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.cost import LINKS, Links
from outrider.experts.schedule import ARRAYS, StepPlan


def save(plan: StepPlan, path: Path) -> None:
    """Write a plan as npz: the arrays of StepPlan under their names; `load` and numpy read it."""
    arrays: dict[str, Any] = {name: getattr(plan, name) for name in ARRAYS}
    arrays |= {"planner": np.array(plan.planner), "ranks_per_node": np.array(plan.ranks_per_node)}
    with path.open("wb") as out:
        np.savez_compressed(out, **arrays)


def load(path: Path) -> StepPlan:
    """Read a plan that `save` wrote. CallerError for a file that is none."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
            return StepPlan(str(file["planner"]), **arrays, ranks_per_node=int(file["ranks_per_node"]))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise CallerError(f"plan {path}: {error}. Give an npz that `outrider experts plan --out` wrote.") from error


def links_of(name: str) -> Links:
    """Named links, or those of a TOML file with near_bytes_s, far_bytes_s, latency_s. CallerError otherwise."""
    if name in LINKS:
        return LINKS[name]
    path = Path(name)
    if not path.is_file():
        raise CallerError(f"links {name}: neither one of {', '.join(LINKS)} nor a file. Name one, or a TOML file.")
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Links)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise CallerError(f"links {name}: {error}. Give near_bytes_s, far_bytes_s and latency_s, numbers.") from error
