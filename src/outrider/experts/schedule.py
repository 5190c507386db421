"""The plan of a whole RL step as data: every layer and micro-step, checked and explained. Pure.

`search.py` makes such plans, `score.py` measures them, `cost.py` models their time, `adapters/plans.py` keeps them.
Rival planners are brought into the same form, so that all are recounted in one way. Legend: L layers, M micro-steps,
R ranks, X slots of a rank (homes first, then copies), E experts.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import msgspec
import numpy as np

from outrider.errors import CallerError, LawBroken
from outrider.experts.events import Array

Small: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

TIERS = ("nothing", "split", "replicas", "relocation")
ARRAYS = ("homes", "hosts", "quota", "most", "tiers", "proof_experts", "proof_ranks")


class StepPlan(msgspec.Struct, frozen=True, eq=False):
    """One RL step.

    homes [L, E]           home rank of each expert during the step
    hosts [L, M, R, X]     expert in each slot, homes included, -1 for none
    quota [n, 6]           layer, micro-step, source, expert, rank, tokens; sorted by the first five, tokens positive
    most [L, M]            largest rank load
    tiers [L, M]           index into TIERS: the cheapest that reached `most`
    proof_experts [L, M, E], proof_ranks [L, M, R]
                           certificate: experts X (1) live on ranks U (1) alone, and C(X) > (most - 1) * |U|;
                           all zero where the planner gives none
    """

    planner: str
    homes: Small
    hosts: Small
    quota: Small
    most: Array
    tiers: Small
    proof_experts: Small
    proof_ranks: Small
    ranks_per_node: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """layers, micro-steps, ranks, experts."""
        return (*self.hosts.shape[:3], self.homes.shape[1])

    def digest(self) -> str:
        """32 hex digits over every array and its shape: equal plans, equal digests (law 7)."""
        total = blake2b(f"{self.planner} {self.ranks_per_node}".encode(), digest_size=16)
        for name in ARRAYS:
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            total.update(f"{name}{array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()

    def load_of_ranks(self) -> Array:
        """[L, M, R] token-slots that each rank computes, counted from the quotas."""
        layers, steps, ranks, _ = self.shape
        key = (self.quota[:, 0].astype(np.int64) * steps + self.quota[:, 1]) * ranks + self.quota[:, 4]
        load = np.bincount(key, weights=self.quota[:, 5], minlength=layers * steps * ranks)
        counted: Array = load.astype(np.int64).reshape(layers, steps, ranks)
        return counted

    def validate(self, counts_MLRE: Array | None = None) -> None:
        """Check every law of a plan, against the counts too where they are given. LawBroken at the first one broken.

        Quotas positive, sorted, on hosts only; they add up to the counts; `most` is the largest load; every expert has
        its home among the hosts; a certificate that is there proves what it claims.
        """
        self._check_ranges()
        layers, steps, ranks, experts = self.shape
        present = hosted(self.hosts, experts)
        layer, step, source, expert, rank, tokens = self.quota.astype(np.int64).T
        _law(bool((tokens > 0).all()), "a quota of no tokens")
        key = (((layer * steps + step) * ranks + source) * experts + expert) * ranks + rank
        _law(bool((np.diff(key) > 0).all()), "quota rows out of order")
        _law(bool(present[layer, step, rank, expert].all()), "tokens for a rank that does not hold the expert")
        _law(bool((self.load_of_ranks().max(axis=2, initial=0) == self.most).all()), "`most` is not the largest load")
        if self.planner == "foresight":
            at = np.arange(layers)[:, None, None], np.arange(steps)[None, :, None]
            home = self.homes[:, None, :], np.arange(experts)[None, None, :]
            _law(bool(present[at[0], at[1], home[0], home[1]].all()), "an expert is not at its home")
        total = np.bincount(
            (layer * steps + step) * experts + expert, weights=tokens, minlength=layers * steps * experts
        ).reshape(layers, steps, experts)
        self._check_proof(present, total)
        if counts_MLRE is not None:
            cell = ((layer * steps + step) * ranks + source) * experts + expert
            sums = np.bincount(cell, weights=tokens, minlength=layers * steps * ranks * experts)
            counts = counts_MLRE.transpose(1, 0, 2, 3)
            _law(counts.shape == (layers, steps, ranks, experts), f"counts {counts.shape} are of another step")
            _law(bool((sums.reshape(counts.shape) == counts).all()), "quotas do not add up to the counts")

    def _check_ranges(self) -> None:
        """Shapes that belong together, and numbers that name what is there."""
        layers, steps, ranks, experts = self.shape
        shapes = {
            "homes": (layers, experts),
            "hosts": (layers, steps, ranks, self.hosts.shape[-1]),
            "quota": (len(self.quota), 6),
            "most": (layers, steps),
            "tiers": (layers, steps),
            "proof_experts": (layers, steps, experts),
            "proof_ranks": (layers, steps, ranks),
        }
        limits = {
            "homes": (0, ranks),
            "hosts": (-1, experts),
            "tiers": (0, len(TIERS)),
            "proof_experts": (0, 2),
            "proof_ranks": (0, 2),
        }
        for name, shape in shapes.items():
            _law(getattr(self, name).shape == shape, f"{name} of shape {getattr(self, name).shape}, not {shape}")
        for name, (least, limit) in limits.items():
            array = getattr(self, name)
            _law(
                not array.size or (array.min() >= least and array.max() < limit), f"{name} beyond {least}..{limit - 1}"
            )
        if len(self.quota):
            low, high = self.quota.min(axis=0), self.quota.max(axis=0)
            inside = (low[:5] >= 0).all() and (high[:5] < (layers, steps, ranks, experts, ranks)).all()
            _law(bool(inside), "a quota of a layer, micro-step, rank or expert that is not there")

    def _check_proof(self, present: Any, total: Any) -> None:
        given = self.proof_ranks.any(axis=2)
        inside = (total * self.proof_experts).sum(axis=2)
        union = self.proof_ranks.sum(axis=2)
        proves = inside > (self.most - 1) * union
        _law(bool((proves | ~given | (self.most == 0)).all()), "a certificate that proves nothing")
        outside = present & (self.proof_ranks == 0)[..., None] & (self.proof_experts == 1)[:, :, None, :]
        bearing = outside & (total > 0)[:, :, None, :]
        _law(not bool((bearing.any(axis=(2, 3)) & given).any()), "a certificate with a holder outside its ranks")

    def explain(self, layer: int, step: int) -> str:
        """A few lines in plain words: the load, why it cannot be lower, and what was copied for it."""
        layers, steps, ranks, experts = self.shape
        if not (0 <= layer < layers and 0 <= step < steps):
            raise CallerError(f"layer {layer}, micro-step {step}: the plan has {layers} and {steps}. Count from 0.")
        rows = self.quota[(self.quota[:, 0] == layer) & (self.quota[:, 1] == step)]
        load = np.bincount(rows[:, 4], weights=rows[:, 5], minlength=ranks).astype(int)
        total = np.bincount(rows[:, 3], weights=rows[:, 5], minlength=experts).astype(int)
        home = np.bincount(self.homes[layer], weights=total, minlength=ranks).astype(int)
        holding = int((self.hosts >= 0).any(axis=(0, 1, 3)).sum())  # excluded ranks hold nothing
        least = -(-int(load.sum()) // holding)
        lines = [
            f"Layer {layer}, micro-step {step}: {int(load.sum())} token-slots on {holding} ranks, tier"
            f" {TIERS[self.tiers[layer, step]]!r}.",
            f"Largest rank load {int(load.max(initial=0))}; at home it would be {int(home.max(initial=0))},"
            f" even shares would be {least}.",
        ]
        some = np.flatnonzero(self.proof_experts[layer, step])
        union = np.flatnonzero(self.proof_ranks[layer, step])
        if 0 < len(union) < ranks:
            lines.append(
                f"It cannot be lower: experts {_list(some)} live on ranks {_list(union)} alone, and have"
                f" {int(total[some].sum())} token-slots, {total[some].sum() / len(union):.1f} a rank."
            )
        before = self.hosts[layer, step - 1] if step else None
        for rank in range(ranks):
            was = set() if before is None else set(before[rank].tolist())
            copies = [e for e in self.hosts[layer, step, rank].tolist() if e >= 0 and self.homes[layer, e] != rank]
            if copies:
                words = [f"{e} ({'new' if e not in was else 'kept'})" for e in copies]
                lines.append(f"Rank {rank} holds copies of experts {', '.join(words)} and computes {int(load[rank])}.")
        return "\n".join(lines)

    def difference(self, other: "StepPlan") -> dict[str, int]:
        """How far two plans of the same step lie apart: relocated experts, (expert, rank) pairs, quota rows, most."""
        if self.shape != other.shape:
            raise CallerError(f"plans of shapes {self.shape} and {other.shape}: give two of one step and model.")
        mine, theirs = (hosted(plan.hosts, self.shape[3]) for plan in (self, other))
        rows = {tuple(row) for row in self.quota.tolist()} ^ {tuple(row) for row in other.quota.tolist()}
        return {
            "homes": int((self.homes != other.homes).sum()),
            "hosts": int((mine != theirs).sum()),
            "quota_rows": len(rows),
            "most": int((self.most != other.most).sum()),
        }


def assemble(
    planner: str,
    homes_LE: Array,
    hosts_MLRX: Sequence[Array],
    rows_M: Sequence[Array],
    *,
    ranks_per_node: int,
    tiers_ML: Array | None = None,
    proof_MLE: Array | None = None,
    proof_MLR: Array | None = None,
) -> StepPlan:
    """A StepPlan from its micro-steps. rows_M: quota rows [n, 5] layer, expert, source, rank, tokens of each."""
    hosts = np.stack(hosts_MLRX, axis=1).astype(np.int32)
    layers, steps, ranks, _ = hosts.shape
    experts = homes_LE.shape[1]
    quota = np.concatenate([np.insert(rows[:, [0, 2, 1, 3, 4]], 1, m, axis=1) for m, rows in enumerate(rows_M)])
    order = np.lexsort(quota[:, 4::-1].T)
    plan = StepPlan(
        planner,
        homes_LE.astype(np.int32),
        hosts,
        quota[order].astype(np.int32),
        np.zeros((layers, steps), dtype=np.int64),
        np.zeros((layers, steps), dtype=np.int32) if tiers_ML is None else tiers_ML.T.astype(np.int32),
        _or_zeros(proof_MLE, (layers, steps, experts)),
        _or_zeros(proof_MLR, (layers, steps, ranks)),
        ranks_per_node,
    )
    return msgspec.structs.replace(plan, most=plan.load_of_ranks().max(axis=2, initial=0))


def choose(plans: Sequence[StepPlan], which_L: Array) -> StepPlan:
    """One plan out of several of the same step: layer by layer, the one whose index `which_L` names."""
    first = plans[0]
    width = max(plan.hosts.shape[3] for plan in plans)
    hosts = np.full((*first.hosts.shape[:3], width), -1, dtype=np.int32)
    chosen: dict[str, Any] = {name: getattr(first, name).copy() for name in ARRAYS if name not in ("hosts", "quota")}
    quota = []
    for i, plan in enumerate(plans):
        mine = which_L == i
        hosts[mine, :, :, : plan.hosts.shape[3]] = plan.hosts[mine]
        for name, array in chosen.items():
            array[mine] = getattr(plan, name)[mine]
        quota.append(plan.quota[mine[plan.quota[:, 0]]])
    rows = np.concatenate(quota)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]  # each plan's rows of a layer are in order already
    return msgspec.structs.replace(first, hosts=hosts, quota=rows, **chosen)


def hosted(hosts: Small, experts: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[L, M, R, E] whether the rank holds the expert."""
    layers, steps, ranks, _ = hosts.shape
    present = np.zeros((layers, steps, ranks, experts + 1), dtype=np.bool_)
    np.put_along_axis(present, np.where(hosts < 0, experts, hosts).astype(np.int64), True, axis=3)
    return present[..., :experts]


def with_homes(homes_LE: Array, replicas_LRS: Array) -> Array:
    """hosts_LRX: each rank's home experts by id, then its copies; -1 fills up."""
    layers, ranks, slots = replicas_LRS.shape
    width = max((int(np.bincount(homes, minlength=ranks).max()) for homes in homes_LE), default=0)
    hosts = np.full((layers, ranks, width + slots), -1, dtype=np.int64)
    for layer, homes in enumerate(homes_LE):
        by_rank = np.argsort(homes, kind="stable")
        place = np.arange(len(homes)) - np.searchsorted(homes[by_rank], homes[by_rank])
        hosts[layer, homes[by_rank], place] = by_rank
    hosts[:, :, width:] = replicas_LRS
    return hosts


def _or_zeros(proof: Array | None, shape: tuple[int, int, int]) -> Small:
    return np.zeros(shape, dtype=np.int32) if proof is None else proof.transpose(1, 0, 2).astype(np.int32)


def _law(holds: bool, broken: str) -> None:
    if not holds:
        raise LawBroken(6, f"plan: {broken}")


def _list(numbers: Any) -> str:
    shown = ", ".join(str(number) for number in numbers[:8].tolist())
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
