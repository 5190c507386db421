"""What a report is made of: the arms of a run, their journals and figures. Called by demo and simulate."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.lab.report import calls, loads, tiers

Figures = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way of serving the workload. `directory` holds its journals, `figures` is its part of the `--json` file.

    key  the path to `figures` in the `--json` file, joined by dots; "" where the file is all about this arm
    """

    name: str
    directory: Path
    figures: Figures
    key: str | None = None

    @property
    def prefix(self) -> str:
        """What the keys of its numbers begin with."""
        key = self.name if self.key is None else self.key
        return f"{key}." if key else ""


@dataclass(frozen=True)
class Run:
    """A whole run. Two arms are compared, the first being the baseline; one stands alone, none is said to be none.

    experts            the RL step's figures, experts_directory its journals; None: there was none
    predicted          workflow -> {"predicted_s", "actual_s"}, where the run was foretold by another; None: it was not
    plainly            sentences that say what was real, emulated, simulated
    figures            all that `--json` writes: it goes into the page as it is
    """

    title: str
    simulated: bool
    arms: list[Arm]
    experts: Figures | None = None
    experts_directory: Path | None = None
    predicted: Figures | None = None
    plainly: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Journals:
    """What was read: by arm its calls and, where it had one, its memory; expert load without and with balancing."""

    calls: dict[str, calls.Calls]
    memory: dict[str, tiers.Memory]
    before: loads.Loads | None
    after: loads.Loads | None


def read(run: Run) -> Journals:
    """Read every journal of a run once. CallerError names the one that cannot be read."""
    experts = run.experts_directory
    return Journals(
        {arm.name: calls.read(arm.directory / "agents.jsonl") for arm in run.arms},
        {arm.name: tiers.read(path) for arm in run.arms if (path := arm.directory / "memory.jsonl").exists()},
        _loads(experts / "static" / "experts.0.jsonl" if experts else None),
        _loads(experts / "experts.0.jsonl" if experts else None),
    )


def foretold(simulated: Path, live: Path) -> dict[str, dict[str, float]]:
    """Workflow by workflow, from the journals of two gateways: how long it took in the simulation, and in truth.

    Workflows that the other journal does not name are left out.
    """
    predicted, actual = (_completions(calls.read(path)) for path in (simulated, live))
    return {
        name: {"predicted_s": took_s, "actual_s": actual[name]} for name, took_s in predicted.items() if name in actual
    }


def _completions(journal: calls.Calls) -> dict[str, float]:
    return {
        name: max(story.until_s(journal.last_s) for story in flow) - flow[0].arrived_s
        for name, flow in journal.by_workflow().items()
    }


def _loads(path: Path | None) -> loads.Loads | None:
    return loads.read(path) if path and path.exists() else None
