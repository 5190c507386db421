"""A plan as data: it says when a law is broken, which one; it survives the disk; it explains itself; plans mix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outrider.errors import CallerError, LawBroken
from outrider.experts.adapters import plans
from outrider.experts.peers import make
from outrider.experts.schedule import ARRAYS, StepPlan, assemble, choose, with_homes
from outrider.experts.search import search

M, L, R, E = 3, 2, 4, 10


def counts(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.pareto(1.0, (M, L, 1, E)).clip(max=20) * 12, (M, L, R, E)).astype(np.int64)


@pytest.fixture(scope="module")
def step() -> StepPlan:
    return search(counts(), 2, ranks_per_node=2)


def rival(name: str, table: Any) -> StepPlan:
    peer = make(name, table, np.full(R, 2), 2)
    steps = [peer.step(m) for m in range(len(table))]
    return assemble(name, peer.homes_LE, [h for h, _ in steps], [rows for _, rows in steps], ranks_per_node=2)


def changed(step: StepPlan, name: str, change: Callable[[Any], Any]) -> StepPlan:
    array = getattr(step, name).copy()
    replaced = change(array)
    return msgspec.structs.replace(step, **{name: array if replaced is None else replaced})


def test_a_plan_keeps_its_laws(step: StepPlan) -> None:
    step.validate()
    step.validate(counts())
    assert step.shape == (L, M, R, E)
    load = np.zeros((L, M, R), dtype=int)
    for layer, m, _, _, rank, tokens in step.quota.tolist():
        load[layer, m, rank] += tokens
    assert (load == step.load_of_ranks()).all()
    assert (load.max(axis=2) == step.most).all()


def _no_tokens(rows: Any) -> None:
    rows[3, 5] = 0


def _swap(rows: Any) -> None:
    rows[[0, 1]] = rows[[1, 0]]


def _double(rows: Any) -> Any:
    return np.concatenate([rows[:1], rows])


def _no_holder(hosts: Any) -> None:
    hosts[0, 0] = -1


def _more(rows: Any) -> None:
    rows[-1, 5] += 1


def _higher(most: Any) -> None:
    most[1, 2] += 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("quota", _no_tokens, "no tokens"),
        ("quota", _swap, "out of order"),
        ("quota", _double, "out of order"),
        ("hosts", _no_holder, "does not hold"),
        ("most", _higher, "not the largest"),
        ("proof_experts", lambda proof: proof * 1000, "proof_experts beyond 0..1"),
        ("tiers", lambda tiers: tiers + 9, "tiers beyond 0..3"),
        ("homes", lambda homes: homes + 77, "homes beyond"),
        ("hosts", lambda hosts: hosts + 77, "hosts beyond"),
        ("quota", lambda quota: quota[:, :5], "quota of shape"),
        ("quota", lambda quota: np.add(quota, [0, 0, 9, 0, 0, 0]), "that is not there"),
        ("quota", lambda quota: np.add(quota, [7, 0, 0, 0, 0, 0]), "that is not there"),
        ("quota", lambda quota: np.subtract(quota, [0, 0, 0, 0, 9, 0]), "that is not there"),
    ],
)
def test_a_broken_law_is_named(step: StepPlan, name: str, change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(LawBroken, match=words):
        changed(step, name, change).validate()


def test_a_home_that_is_no_host_is_named(step: StepPlan) -> None:
    table = counts()
    table[:, :, :, 0] = 0  # nobody computes expert 0: only its home is missing
    idle = search(table, 2, ranks_per_node=2)

    def leave(hosts: Any) -> None:
        hosts[:, 0][hosts[:, 0] == 0] = -1

    with pytest.raises(LawBroken, match="not at its home"):
        changed(idle, "hosts", leave).validate()


def test_quotas_that_do_not_add_up_are_named(step: StepPlan) -> None:
    table = counts()
    table[0, 0, 0, 0] += 1
    with pytest.raises(LawBroken, match="add up"):
        step.validate(table)
    with pytest.raises(LawBroken, match="another step"):
        step.validate(counts()[:2])


def test_a_false_certificate_is_named(step: StepPlan) -> None:
    def nothing(proof: Any) -> None:
        proof[0, 0] = 0

    with pytest.raises(LawBroken, match="proves nothing"):
        changed(step, "proof_experts", nothing).validate()
    hot = counted_alone()

    def another_rank(proof: Any) -> None:
        proof[0, 0] = np.roll(proof[0, 0], 1)

    with pytest.raises(LawBroken, match="outside its ranks"):
        changed(hot, "proof_ranks", another_rank).validate()
    with pytest.raises(LawBroken, match="not the largest"):
        changed(hot, "most", lambda most: most + 1).validate()


def counted_alone() -> StepPlan:
    """One micro-step, no slots, 8 experts: expert 0 has 40 tokens, every other one 1."""
    table = np.zeros((1, 1, R, 8), dtype=np.int64)
    table[0, 0, 1] = 1
    table[0, 0, 1, 0] = 40
    return search(table, 0)


def test_saved_and_loaded_it_is_the_same(step: StepPlan, tmp_path: Path) -> None:
    for some in (step, rival("eplb-oracle", counts()), rival("llep-like", counts())):
        plans.save(some, tmp_path / "plan.npz")
        again = plans.load(tmp_path / "plan.npz")
        assert again.digest() == some.digest()
        assert (again.planner, again.ranks_per_node) == (some.planner, some.ranks_per_node)
        for name in ARRAYS:
            a, b = getattr(some, name), getattr(again, name)
            assert a.dtype == b.dtype and (a == b).all(), name
        again.validate(counts())
    for wrong in (b"", b"PK\x03\x04 no zip", np.zeros(3).tobytes()):
        (tmp_path / "wrong.npz").write_bytes(wrong)
        with pytest.raises(CallerError, match=r"wrong\.npz"):
            plans.load(tmp_path / "wrong.npz")
    np.savez(tmp_path / "other.npz", homes=np.zeros(3))
    with pytest.raises(CallerError, match=r"other\.npz"):
        plans.load(tmp_path / "other.npz")
    with pytest.raises(CallerError, match=r"missing\.npz"):
        plans.load(tmp_path / "missing.npz")


def test_every_number_is_in_the_digest(step: StepPlan) -> None:
    seen = {step.digest()}
    for name in ARRAYS:
        for at in (0, getattr(step, name).size - 1):
            array = getattr(step, name).copy()
            array.flat[at] += 1
            seen.add(msgspec.structs.replace(step, **{name: array}).digest())
    seen.add(msgspec.structs.replace(step, planner="other").digest())
    seen.add(msgspec.structs.replace(step, ranks_per_node=4).digest())
    seen.add(msgspec.structs.replace(step, hosts=step.hosts[:, :, :, :-1]).digest())
    assert len(seen) == 2 * len(ARRAYS) + 4
    wide = msgspec.structs.replace(step, homes=step.homes.astype(np.int64))
    assert wide.digest() == step.digest(), "the type of the numbers is not the plan"


def test_it_explains_itself() -> None:
    words = counted_alone().explain(0, 0)
    assert "47 token-slots on 4 ranks" in words
    assert "Largest rank load 41; at home it would be 41, even shares would be 12." in words
    assert "It cannot be lower: experts 0, 1 live on ranks 0 alone, and have 41 token-slots, 41.0 a rank." in words
    table = np.concatenate([np.zeros((1, 1, R, E), dtype=np.int64)] * 2)
    table[:, 0, 0] = 1
    table[:, 0, 0, 0] = 19
    both = search(table, 1)
    first, second = both.explain(0, 0), both.explain(0, 1)
    assert "tier 'replicas'" in first and "0 (new)" in first
    assert "tier 'split'" in second and "0 (kept)" in second and "(new)" not in second
    for layer, m in ((1, 0), (0, 2), (-1, 0)):
        with pytest.raises(CallerError, match="Count from 0"):
            both.explain(layer, m)


def test_differences_are_counted(step: StepPlan) -> None:
    assert set(step.difference(step).values()) == {0}
    other = rival("static", counts())
    apart, back = step.difference(other), other.difference(step)
    assert apart == back
    assert apart["hosts"] > 0 and apart["quota_rows"] > 0
    assert apart["most"] == int((step.most != other.most).sum())
    with pytest.raises(CallerError, match="of one step"):
        step.difference(search(counts()[:1], 2))


def test_a_mix_of_plans_is_a_plan(step: StepPlan) -> None:
    """Layer by layer from either, with rows of hosts of different width."""
    other = search(counts(), 0)
    for which in ([0, 1], [1, 0], [1, 1]):
        mixed = choose((step, other), np.array(which))
        mixed.validate(counts())
        for layer, i in enumerate(which):
            source = (step, other)[i]
            assert (mixed.most[layer] == source.most[layer]).all()
            mine, theirs = mixed.quota[mixed.quota[:, 0] == layer], source.quota[source.quota[:, 0] == layer]
            assert (mine == theirs).all()
    assert choose((step, other), np.array([0, 0])).digest() == step.digest()


def test_homes_come_first_in_the_slots() -> None:
    homes, copies = np.array([[1, 0, 1, 1]]), np.array([[[2], [-1]]])
    assert with_homes(homes, copies).tolist() == [[[1, -1, -1, 2], [0, 2, 3, -1]]]
