"""What balance costs in bytes: planners at several numbers of slots, on the same counts. A door; called by commands.py.

Each planner is run and recounted as `outrider experts plan` would; bytes follow from the copies and the model's shape.
"""

from collections.abc import Callable

import msgspec

from outrider.errors import CallerError
from outrider.experts import study
from outrider.experts.cost import new_copies
from outrider.experts.events import Array
from outrider.experts.schedule import StepPlan
from outrider.experts.score import score

SLOTS = (0, 1, 2, 4)
RIVALS = ("static", "split", "eplb", "eplb-oracle", "lplb-like", "flexmoe-like", "llep-like")


class Point(msgspec.Struct, frozen=True):
    """One planner on these counts.

    imbalance, over_bound  means of largest rank load / mean, and / the integer limit, over layers and micro-steps
    bytes_moved            copies that are new in a micro-step, times an expert's bytes: modelled
    asked                  it is the plan that was asked for
    """

    planner: str
    slots: int
    objective: str
    imbalance: float
    over_bound: float
    copies_moved: int
    bytes_moved: int
    asked: bool = False


class Front(msgspec.Struct, frozen=True):
    """Points in the order in which they were planned; the rivals that have no plan here, and why."""

    points: tuple[Point, ...]
    missing: tuple[tuple[str, str], ...]

    def best(self) -> tuple[Point, ...]:
        """Those that no other beats in both, by bytes; of equals the first."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.bytes_moved, p.imbalance)):
            if not found or point.imbalance < found[-1].imbalance:
                found.append(point)
        return tuple(found)


def settings(asked: study.Study) -> tuple[study.Study, ...]:
    """What is compared: ours with 0, 1, 2, 4 and the asked number of slots, and rivals with the asked number.

    Rivals know no excluded ranks, and are left out where there are some.
    """
    ours = msgspec.structs.replace(asked, planner=study.OURS, objective="balance")
    mine = [msgspec.structs.replace(ours, slots=slots) for slots in sorted({*SLOTS, asked.slots})]
    rivals = () if asked.excluded else RIVALS
    return (*mine, *(msgspec.structs.replace(ours, planner=name) for name in rivals))


def front(
    counts_MLRE: Array, asked: study.Study, found: StepPlan, progress: Callable[[], None] = lambda: None
) -> Front:
    """Plan the counts in every setting. found: the plan of `asked`, not made again. progress: once a setting."""
    some = settings(asked)
    points, missing = [_point(found, counts_MLRE, asked, asked=True)], []
    for setting in some:
        progress()
        if setting == asked:
            continue
        try:
            plan, _ = study.plan(study.Counted(counts_MLRE, 0.0, ()), setting)
        except CallerError as error:  # a rival's layout may not exist for these numbers
            missing.append((setting.planner, str(error)))
            continue
        points.append(_point(plan, counts_MLRE, setting))
    return Front(tuple(points), tuple(missing))


def _point(plan: StepPlan, counts_MLRE: Array, setting: study.Study, asked: bool = False) -> Point:
    figures = score(plan, counts_MLRE, setting.excluded)
    copies = int(new_copies(plan).sum())
    return Point(
        setting.planner,
        setting.slots,
        setting.objective,
        figures["imbalance"]["mean"],
        figures["over_bound"]["mean"],
        copies,
        copies * setting.cost.shape.expert_bytes,
        asked,
    )
