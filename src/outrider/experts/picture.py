"""What a picture of a plan tells: loads at home and planned, and the words around them. Pure; called by commands.py."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.events import Array
from outrider.experts.plan import contiguous_homes
from outrider.experts.schedule import StepPlan
from outrider.experts.study import Study


class Loads(msgspec.Struct, frozen=True, eq=False):
    """Rank loads over their mean, [L, M, R], at contiguous homes and as planned; ceil(mean) / mean [L, M], the least
    that whole token-slots allow. An idle micro-step counts as even; an excluded rank is nan."""

    home: Any
    planned: Any
    limit: Any

    def worst_layer(self) -> int:
        """The layer with the largest load at home, mean over micro-steps; of equals the first."""
        return int(np.nanmax(self.home, axis=2).mean(axis=1).argmax())


class Picture(msgspec.Struct, frozen=True):
    """What is to be told. title: the file; subtitle: what was planned; notes: small print; layer: of the heat maps,
    None: the one with the largest load at home."""

    loads: Loads
    title: str
    subtitle: str
    notes: str
    layer: int | None = None


def counts_of(found: StepPlan) -> Array:
    """counts_MLRE that a validated plan was made for: its quotas add up to them."""
    layers, steps, ranks, experts = found.shape
    counts_MLRE: Array = np.zeros((steps, layers, ranks, experts), dtype=np.int64)
    layer, step, source, expert, _, tokens = found.quota.T
    np.add.at(counts_MLRE, (step, layer, source, expert), tokens)
    return counts_MLRE


def loads(found: StepPlan, counts_MLRE: Array, excluded: Sequence[int] = ()) -> Loads:
    """Loads of a plan and of the same counts at home. excluded: ranks that hold nothing, at home neither."""
    _, _, ranks, experts = found.shape
    homes_E = contiguous_homes(experts, ranks, excluded)
    load_MLE = counts_MLRE.sum(axis=2, dtype=np.int64)
    home_LMR = (load_MLE @ np.eye(ranks, dtype=np.int64)[homes_E]).transpose(1, 0, 2)
    total_LM = load_MLE.sum(axis=2).T
    mean_LM = total_LM.clip(min=1) / (ranks - len(excluded))
    limit_LM = np.where(total_LM > 0, np.ceil(mean_LM) / mean_LM, 1.0)
    both = home_LMR, found.load_of_ranks()
    home, planned = (np.where(total_LM[..., None] > 0, load / mean_LM[..., None], 1.0) for load in both)
    home[..., list(excluded)] = planned[..., list(excluded)] = np.nan
    return Loads(home, planned, limit_LM)


def picture(name: str, asked: Study, found: StepPlan, counts_MLRE: Array, layer: int | None = None) -> Picture:
    """The picture of a plan. name: of the file with the routes. CallerError for a layer that is not there."""
    layers, steps, ranks, _ = found.shape
    if layer is not None and not 0 <= layer < layers:
        raise CallerError(f"--plot-layer {layer}: the plan has {layers} layers. Count from 0.")
    nodes = ranks // asked.ranks_per_node
    cut = (
        _many(asked.microbatch_tokens, "token")
        if asked.microbatch_tokens
        else _many(asked.microbatch_seqs or 0, "sequence")
    )
    parts = (
        f"{asked.planner}, objective {asked.objective}, {_many(asked.slots, 'spare slot')} a rank",
        f"EP {ranks}" + (f" in {nodes} nodes" if nodes > 1 else ""),
        *([f"without rank {', '.join(map(str, asked.excluded))}"] if asked.excluded else ()),
        f"{_many(layers, 'layer')}, {_many(steps, 'micro-step')} of {cut}",
    )
    rivals = f"have {_many(asked.slots, 'spare slot')}" if not asked.excluded else "know no excluded ranks: not shown"
    notes = (
        "Bytes are modelled: every copy that is new in a micro-step counts as one expert of"
        f" {asked.model}, {asked.cost.shape.expert_bytes / 1e6:.3g} MB. Rivals {rivals}."
    )
    title = f"{name}, domain {asked.domain}" if asked.domain else name
    return Picture(loads(found, counts_MLRE, asked.excluded), title, "; ".join(parts), notes, layer)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
