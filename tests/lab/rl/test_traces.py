"""The committed traces: real routes of a model that learned, rewards that the rule confirms, what is said of them."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from outrider.experts.adapters import read
from outrider.experts.study import Study, run
from outrider.lab.rl import trace
from outrider.lab.rl.arithmetic import text
from outrider.lab.rl.learn import Recipe

TRACES = sorted(Path(__file__).with_name("traces").glob("*.npz"))
STEPS = [0, 1, 199, 200, 398, 399]


def test_there_is_one_a_seed_and_they_are_small():
    assert [path.name for path in TRACES] == ["seed0.npz", "seed1.npz", "seed2.npz"]
    assert sum(path.stat().st_size for path in TRACES) < 1_000_000


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_rewards_are_the_rules_and_rise(path):
    steps = trace.read(path)
    assert list(steps) == STEPS
    for rollouts in steps.values():
        assert len(rollouts) == 256
        for r in rollouts:
            assert r.reward == float(text(r.output) == f"{eval(text(r.prompt)[1:-1])}.")
            assert r.prompt == rollouts[8 * r.group].prompt
    begin, end = (np.mean([r.reward for step in some for r in steps[step]]) for some in (STEPS[:2], STEPS[-2:]))
    assert end > 2 * begin


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_it_says_what_made_it(path):
    routing = read(path)
    recipe = msgspec.json.decode(routing.notes[0], type=Recipe)
    assert recipe == Recipe(seed=int(path.stem[-1]))  # the defaults: the script as it stands
    assert (routing.experts, routing.layers, routing.top_k) == (recipe.experts, recipe.layers, recipe.top_k)
    assert routing.known_T is None


def shares(routing, owner_T):
    """[owners, layers, experts] of each owner's token-slots."""
    count = np.zeros((owner_T.max() + 1, routing.layers, routing.experts))
    for layer in range(routing.layers):
        np.add.at(count, (owner_T[:, None], layer, routing.routes_TLK[:, layer]), 1)
    return count / count.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_load_swings_between_micro_steps_of_prompts_and_not_between_rl_steps(path):
    """Total variation: neighbouring RL steps, one prompt's samples against the next prompt's, and tokens dealt out."""
    routing, rng = read(path), np.random.default_rng(0)
    tables = [routing.domain(name) for name in routing.domains]
    owners = [np.repeat(np.arange(256), np.diff(table.offsets_S1)) for table in tables]
    whole = [shares(table, owner * 0)[0] for table, owner in zip(tables, owners, strict=True)]
    steps = [np.abs(whole[i] - whole[i + 1]).sum(-1).mean() / 2 for i in (0, 2, 4)]
    micro, floor = [], []
    for table, owner in zip(tables, owners, strict=True):
        for dealt, values in ((owner // 8, micro), (rng.permutation(owner // 8), floor)):
            share = shares(table, dealt)
            values.append(np.abs(share[1:] - share[:-1]).sum(-1).mean() / 2)
    assert max(steps) < 0.15
    assert min(micro) > 0.3
    assert min(micro) > 1.8 * max(floor)


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_planned_to_the_limit_with_a_quarter_of_the_copies(path, sequences):
    for ranks in (4, 8):
        asked = {"microbatch_seqs": sequences, "domain": "step_0399"}
        _, ours = run(path, Study(ranks, ranks, **asked))
        _, oracle = run(path, Study(ranks, ranks, planner="eplb-oracle", **asked))
        assert ours["over_bound"]["mean"] <= 1.001
        assert ours["over_bound"]["p95"] <= 1.005
        assert ours["copies_moved"] <= oracle["copies_moved"] / 4
