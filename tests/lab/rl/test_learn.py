"""What a run promises: routes recorded are those that the model chose and the update replays, and a seed says all."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from outrider.experts.adapters import read
from outrider.lab.rl import learn, trace
from outrider.lab.rl.arithmetic import text
from outrider.lab.rl.learn import Recipe
from outrider.lab.rl.rollouts import advantages

RECIPE = Recipe(
    seed=1, steps=2, prompts=5, samples=4, micro_batch=6, warm_up=8, layers=2, experts=8, top_k=2, hidden=32
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def engine():
    rng, model = np.random.default_rng(1), learn.model_of(RECIPE)
    learn.warm_up(model, RECIPE, rng)
    return learn.Engine(model, RECIPE, rng)


@pytest.fixture(scope="module")
def rollouts(engine):
    return engine.roll_out()


def told(steps):
    return [[(r.tokens, r.reward, r.group, r.routes.tobytes()) for r in rollouts] for rollouts, _ in steps]


def test_a_seed_says_all():
    first, again = told(learn.learn(RECIPE)), told(learn.learn(RECIPE))
    assert first == again
    assert first[0] != first[1]
    assert told(learn.learn(msgspec.structs.replace(RECIPE, seed=2))) != first


def test_rollouts_lie_by_prompt_and_hold_what_was_asked(rollouts):
    assert [r.group for r in rollouts] == [g for g in range(5) for _ in range(4)]
    for r in rollouts:
        assert r.prompt == rollouts[4 * r.group].prompt
        assert r.reward == float(text(r.output) == f"{eval(text(r.prompt)[1:-1])}.")
        assert "." not in text(r.output[:-1])
        assert text(r.output)[-1] == "." or len(r.output) == learn.OUTPUT_TOKENS


def test_recorded_routes_are_what_the_model_chooses(engine, rollouts):
    """Each sequence alone and whole, without a cache: the experts of highest router logits, in that order."""
    for r in rollouts:
        with torch.no_grad():
            passed = engine.model(torch.tensor([r.tokens[:-1]]), use_cache=False, output_router_logits=True)
        best = torch.stack([logits.topk(RECIPE.top_k).indices for logits in passed.router_logits], dim=1)
        assert (r.routes[:-1] == best.numpy()).all()
        assert (r.routes[-1] == -1).all()


class Fixed(torch.nn.Module):
    """The reference's router, written apart: recorded experts, live probabilities."""

    def __init__(self, weight, routes):
        super().__init__()
        self.weight, self.routes = weight, routes

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        scores = torch.stack([p[ids] / p[ids].sum() for p, ids in zip(logits.softmax(-1), self.routes, strict=True)])
        return logits, scores, self.routes


def test_the_update_replays_what_was_recorded_and_its_gradient_is_right(engine, rollouts):
    """Against one sequence at a time, no padding. Routers are bent first, so that they would choose otherwise."""
    model, gates = learn.model_of(RECIPE), engine.gates
    model.load_state_dict(engine.model.state_dict())
    seen = []
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.1 * torch.randn(layer.mlp.gate.weight.shape, generator=torch.manual_seed(0))
            layer.mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given[1].clone()))
    gates = learn.Gates(model)
    batches = learn.batches_of(rollouts, RECIPE)
    learn.accumulate(batches, lambda _, batch: gates.replaying(batch.routes), lambda batch: batch.loss(model))
    gates.close()
    assert gates.replayed == RECIPE.layers * sum(len(r.tokens) - 1 for r in rollouts)
    assert gates.changed > gates.replayed / 10
    taken = [torch.stack(seen[m : m + RECIPE.layers], dim=1) for m in range(0, len(seen), RECIPE.layers)]
    real = [ids[batch.real.flatten()] for ids, batch in zip(taken, batches, strict=True)]
    assert (torch.cat(real).numpy() == np.concatenate([r.routes[:-1] for r in rollouts])).all()

    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens = sum(len(r.output) for r in rollouts)
    for r, gain in zip(rollouts, advantages(rollouts), strict=True):
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate = Fixed(layer.mlp.gate.weight, torch.from_numpy(r.routes[:-1, index].astype(np.int64)))
        log_p = model(torch.tensor([r.tokens[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        first = len(r.prompt) - 1
        (-gain / tokens * log_p[range(first, len(log_p)), r.output].sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert (p.grad - mine[name]).abs().max() <= 1e-4 * p.grad.abs().max(), name


def test_the_auxiliary_loss_is_the_fields(engine, rollouts):
    """Hugging Face's, which sums over top_k where ours takes the mean, layer by layer; padding counts in neither."""
    gates, (batch, *_) = engine.gates, learn.batches_of(rollouts, RECIPE)
    with torch.no_grad(), gates.replaying(batch.routes):
        logits = engine.model(batch.inputs, use_cache=False, output_router_logits=True).router_logits
    real = [layer[batch.real.flatten()] for layer in logits]
    theirs = [load_balancing_loss_func((layer,), RECIPE.experts, RECIPE.top_k) for layer in real]
    assert torch.allclose(gates.balance_loss(), torch.stack(theirs).mean() / RECIPE.top_k)
    assert not torch.allclose(gates.balance_loss(), torch.ones(()), atol=1e-3)


def test_the_trace_is_what_the_model_chose(rollouts, tmp_path):
    path = tmp_path / "trace.npz"
    steps = {0: rollouts, 7: rollouts[8:]}
    trace.write(path, steps, RECIPE.experts, "made here")
    routing = read(path)
    flat = [*rollouts, *rollouts[8:]]
    assert (routing.routes_TLK == np.concatenate([r.routes[:-1] for r in flat])).all()
    assert np.diff(routing.offsets_S1).tolist() == [len(r.tokens) - 1 for r in flat]
    assert routing.domains == {"step_0000": (0, 20), "step_0007": (20, 32)}
    assert (routing.experts, routing.notes, routing.replay) == (8, ("made here",), "R3")
    again = trace.read(path)
    assert list(again) == [0, 7]
    assert told([(some, 0) for some in again.values()]) == told([(some, 0) for some in steps.values()])


def test_the_command_writes_the_steps_that_were_asked_for(tmp_path, monkeypatch, capsys):
    path = tmp_path / "trace.npz"
    fields = {f.replace("_", "-"): getattr(RECIPE, f) for f in RECIPE.__struct_fields__}
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["learn", *options, "--out", str(path), "--keep", "1"])
    learn.main()
    assert list(trace.read(path)) == [1]
    assert told([(trace.read(path)[1], 0)]) == told(learn.learn(RECIPE))[1:]
    assert msgspec.json.decode(read(path).notes[0], type=Recipe) == RECIPE


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_sequences_are_packed_in_order_and_in_equal_runs(sequences, micro_batch, ranks):
    packed = learn.packed(sequences, Recipe(micro_batch=micro_batch), ranks)
    assert [i for by_rank in packed for run in by_rank for i in run] == list(range(sequences))
    for m, by_rank in enumerate(packed):
        sizes = [len(run) for run in by_rank]
        assert len(sizes) == ranks
        assert sum(sizes) == (micro_batch if m < len(packed) - 1 else sequences - m * micro_batch)
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--keep", "2"], "0 to 1"), (["--out", "/nowhere/x.npz"], "No such file"), (["--keep", "x"], "keep")],
)
def test_what_cannot_work_is_said_before_the_run(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["learn", "--steps", "2", *options])
    with pytest.raises(SystemExit):
        learn.main()
    assert message in capsys.readouterr().err
