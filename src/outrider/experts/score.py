"""How good a plan is, recounted from its arrays alone, in the figures that the field uses. Pure; called by study.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from outrider.experts.cost import Cost, force_balanced_s, modelled, new_copies
from outrider.experts.events import Array
from outrider.experts.plan import contiguous_homes
from outrider.experts.schedule import TIERS, StepPlan


def summary(values: Any) -> dict[str, float]:
    """mean, p50, p95 and max over layers and micro-steps; an idle one counts as 1."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    at = {"p50": 50, "p95": 95}
    quantiles = {name: float(np.percentile(flat, share)) for name, share in at.items()}
    return {"mean": float(flat.mean()), **quantiles, "max": float(flat.max())}


def score(plan: StepPlan, counts_MLRE: Array, excluded: Sequence[int] = ()) -> dict[str, Any]:
    """Imbalance, distance from the integer limit, copies moved and tiers. excluded: ranks that hold nothing.

    imbalance     largest rank load / mean rank load
    over_bound    largest rank load / ceil(mean rank load): 1 is the least that integers allow
    copies_moved  (expert, rank) pairs absent one micro-step before in that layer; the first is compared with
                  contiguous homes, so that relocation counts. per_layer_microstep: their mean
    """
    load_LMR = plan.load_of_ranks()
    most_LM, total_LM = load_LMR.max(axis=2), load_LMR.sum(axis=2)
    open_ranks = load_LMR.shape[2] - len(set(excluded))
    least_LM = -(-total_LM // open_ranks)
    busy = total_LM > 0
    moved = new_copies(plan).sum(axis=(2, 3))
    at_home = np.where(busy, _at_home(plan, counts_MLRE, excluded).max(axis=2) * open_ranks / total_LM.clip(min=1), 1.0)
    return {
        "imbalance": summary(np.where(busy, most_LM * open_ranks / total_LM.clip(min=1), 1.0)),
        "over_bound": summary(np.where(busy, most_LM / least_LM.clip(min=1), 1.0)),
        "imbalance_at_home": summary(at_home),
        "copies_moved": int(moved.sum()),
        "copies_per_layer_microstep": float(moved.mean()),
        "tiers": {name: int((plan.tiers == i).sum()) for i, name in enumerate(TIERS)},
        "relocated_experts": int(_relocated(plan, excluded).sum()),
        "digest": plan.digest(),
    }


def seconds(plan: StepPlan, counts_MLRE: Array, cost: Cost) -> dict[str, Any]:
    """What the cost model says of the plan: simulated, never measured."""
    found = modelled(plan, cost)
    return {
        "bytes_moved": int(found.moved_bytes.sum()),
        "modelled_s": found.total_s,
        "force_balanced_s": force_balanced_s(counts_MLRE, plan, cost),
        "exposed_s": found.exposed_total_s,
    }


def _at_home(plan: StepPlan, counts_MLRE: Array, excluded: Sequence[int]) -> Array:
    """[L, M, R] token-slots of each rank if every expert were computed at its contiguous home."""
    layers, steps, ranks, experts = plan.shape
    homes_E = contiguous_homes(experts, ranks, excluded)
    load = np.zeros((layers, steps, ranks), dtype=np.int64)
    for expert, home in enumerate(homes_E.tolist()):
        load[:, :, home] += counts_MLRE[:, :, :, expert].sum(axis=2).T
    return load


def _relocated(plan: StepPlan, excluded: Sequence[int]) -> Any:
    return plan.homes != contiguous_homes(plan.shape[3], plan.shape[2], excluded)
