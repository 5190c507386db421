"""A simulated run of both arms, with memory and an RL step: every journal that a report reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import BLOCK, simulate, train, workload

from outrider.lab import report
from outrider.lab.simulate import profiles
from outrider.memory.settings import Hybrid
from outrider.memory.settings import Settings as MemorySettings


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> report.Run:
    """Two arms, memory with a hybrid tier and a disk, three micro-steps of two layers on two ranks."""
    root = tmp_path_factory.mktemp("simulated")
    page = BLOCK * profiles.named(profiles.EMBEDDED).kv_bytes_per_token
    figures: dict[str, Any] = {
        "baseline": simulate(root / "baseline", workload(), None),
        "outrider": simulate(
            root / "outrider", workload(), MemorySettings(60 * page, 400 * page, hybrid=Hybrid(80 * page, 20 * page))
        ),
        "experts": {
            "max_over_mean_static": 1.5,
            "max_over_mean_balanced": 1.0,
            "loss_difference": 0.0,
            "gradient_difference": 1e-7,
        },
    }
    train(root / "experts" / "static", 0, np.array([[[90, 30], [60, 60]]] * 3))
    train(root / "experts", 2, np.array([[[60, 60], [60, 60]]] * 3))
    return report.Run(
        "A made-up run",
        True,
        [report.Arm(name, root / name, figures[name]) for name in ("baseline", "outrider")],
        experts=figures["experts"],
        experts_directory=root / "experts",
        plainly=["Nothing of it is real."],
        figures=figures,
    )


@pytest.fixture
def written(tmp_path: Path) -> Callable[[report.Run], str]:
    """Write a run's report and read its page."""

    def write(run: report.Run) -> str:
        report.write(tmp_path / "r.html", run)
        return (tmp_path / "r.html").read_text()

    return write
