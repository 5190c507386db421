"""Run on each of two ranks by test_precision.py: `python precision_ranks.py DIRECTORY RANK RANKS`.

A tiny random Qwen3-MoE model trains with AdamW, balanced in every way there is, beside the stock model that sees all
tokens in one process. Routes are recorded from the stock model before each step and replayed by both, as RL does it;
so a tie at a gate cannot part them, and what is compared is arithmetic alone. TOLERANCE: of a tensor's largest value.
"""

import copy
import io
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bitwise_ranks import random_plan
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from outrider.experts import balance, foresee
from outrider.experts.layer import weights_of
from outrider.experts.search import search

LAYERS, EXPERTS, TOP_K, VOCABULARY, LENGTH = 3, 6, 2, 64, 9
SEQUENCES = [[2, 1], [3, 0], [1, 2]]  # by micro-batch and rank: rank 1 idles once
STEPS, MAX_NORM = 3, 0.5
TOLERANCE = 5e-5  # of losses, norms and the first step's gradients; measured: 4e-6
TRAINED = 1e-3  # AdamW divides by the root of the squares: noise in small gradients grows; measured: 1e-4
LOSS_IN_HALF = 0.005  # of the loss in fp32; measured: 0.0016, the stock model 0.0008
HALF_GRADIENTS = 1.1  # times the stock model's own error in bf16; measured over four seeds: 0.84 to 1.01
HALF_WEIGHTS = 1.5  # the same for weights, as AdamW blows up noise; measured after four steps: 0.81 to 1.24
ONE_LAYER_IN_HALF = 0.0025  # under autocast, of the output's 2-norm; measured over three seeds: 0.0017, in fp32 0.0033
ONE_LAYER_IN_DOUBLE = 1e-6  # the same, float64 experts under autocast: stock layers leave them alone
ONE_LAYERS_GRADIENTS = 0.008  # measured: 0.0052
WORST: dict[str, float] = {}


def build(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=16, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("gate.weight"):
                parameter.mul_(10)  # routers that choose, experts that matter
    return model.to(dtype).train()


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6, weight_decay=0.1)  # 1e-8 would blow up noise


def batches(step: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [[torch.randint(VOCABULARY, (n, LENGTH), generator=generator) for n in row] for row in SEQUENCES]


TARGETS = sum(map(sum, SEQUENCES)) * (LENGTH - 1)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / TARGETS
    return loss


def gates(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


@contextmanager
def replayed(model: Any, routes_TLK: torch.Tensor) -> Iterator[None]:
    """The plain model takes these experts, with its live probabilities."""

    def instead(layer: int, gate: Any, _: Any, said: Any) -> Any:
        logits, weights, _ = said
        return logits, weights_of(gate, logits, routes_TLK[:, layer]).to(weights.dtype), routes_TLK[:, layer]

    hooks = [gate.register_forward_hook(partial(instead, layer)) for layer, gate in enumerate(gates(model))]
    yield
    for hook in hooks:
        hook.remove()


def recorded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, layers, top_k] what the model's gates choose."""
    chosen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda _, __, said: chosen.append(said[2])) for gate in gates(model)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1)


def counted(routes: list[list[torch.Tensor]]) -> Any:
    """counts_MLRE of one step."""
    sizes = np.array([[len(some) for some in row] for row in routes])
    batch = np.repeat(np.arange(len(routes)), sizes.sum(axis=1))
    source = np.repeat(np.tile(np.arange(sizes.shape[1]), len(routes)), sizes.ravel())
    table = torch.cat([some for row in routes for some in row]).numpy()
    return foresee(table, batch, source, EXPERTS, sizes.shape[1], len(routes))


def autocast(yes: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if yes else nullcontext()


class Trace:
    """The stock model's training: of each step routes, loss, norm, gradients; then weights, AdamW's state."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        routes: Any = None,
        frozen: str = "none",
        zero: int = 1,
        cast: bool = False,
    ) -> None:
        self.model = build(dtype)
        if cast:
            self.model.set_experts_implementation("eager")  # the grouped one takes no notice of autocast
        freeze(self.model, frozen)
        optimizer = adamw(self.model)
        self.routes, self.losses, self.norms, self.gradients, self.weights, self.states = [], [], [], [], [], []
        for step in range(STEPS):
            data = batches(step)
            if routes is None:
                self.routes.append([[recorded(self.model, ids) if len(ids) else none() for ids in row] for row in data])
            else:
                self.routes.append(routes[step])
            if step % zero == 0:
                optimizer.zero_grad()
            total = 0.0
            for row, routes_of in zip(data, self.routes[-1], strict=True):
                for ids, chosen in zip(row, routes_of, strict=True):
                    if len(ids):
                        with replayed(self.model, chosen), autocast(cast):
                            loss = loss_of(self.model, ids)
                            loss.backward()
                        total += float(loss.detach())
            self.losses.append(total)
            self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM))
            optimizer.step()
            self.weights.append(copy.deepcopy(self.model.state_dict()))
            self.states.append(copy.deepcopy(optimizer.state_dict()))


def none() -> torch.Tensor:
    return torch.zeros((0, LAYERS, TOP_K), dtype=torch.int64)


def freeze(model: Any, what: str) -> None:
    for name, parameter in model.named_parameters():
        if what != "none" and what in name:
            parameter.requires_grad_(False)


class Way:
    """How a balanced model is trained."""

    def __init__(self, name: str, foreseen: str = "counts", passes: str = "plain", **options: Any) -> None:
        """foreseen: counts; search; plan (any homes, copies and split, new ones each step); none.

        again: activations are computed again; first: a recompute pass before; zero: steps from one zero_grad to the
        next; cast: forward, or the whole step, under autocast; apart: each rank on a machine of its own. Other
        options are for `balance`.
        """
        self.name, self.foreseen, self.passes = name, foreseen, passes
        self.again, self.first = options.pop("again", "no"), options.pop("first", False)
        self.zero, self.cast, self.apart = (
            options.pop("zero", 1),
            options.pop("cast", "no"),
            options.pop("apart", False),
        )
        self.options = {"slots": 2, "timeout_s": 30.0, **options}

    def order(self) -> list[Any]:
        depth = {"plain": 0, "two in flight": 2, "three in flight": 3}[self.passes]
        batches = len(SEQUENCES)
        if not depth:
            return [("recompute", m) for m in range(batches) if self.first] + [("update", m) for m in range(batches)]
        order: list[Any] = [("forward", m) for m in range(depth - 1)]
        for m in range(depth - 1, batches):
            order += [("forward", m), ("backward", m - depth + 1)]
        return order + [("backward", m) for m in range(batches - depth + 1, batches)]


@contextmanager
def apart(yes: bool) -> Iterator[None]:
    """Emulated: each rank's machine has a name of its own."""
    node = platform.node
    if yes:
        platform.node = lambda: f"machine {dist.get_rank()}"
    yield
    platform.node = node


class Training:
    """A balanced model and its optimizer; group: the ranks among which its experts are spread."""

    def __init__(self, way: Way, dtype: torch.dtype = torch.float32, frozen: str = "none", group: Any = None) -> None:
        self.way, self.model = way, build(dtype)
        freeze(self.model, frozen)
        with apart(way.apart):
            self.balanced = balance(self.model, group, **way.options)
        assert self.balanced.mover.policy.settings.ranks_per_node == (1 if way.apart or group else 2)
        if way.again != "no":
            self.model.activation_checkpointing_enable({"use_reentrant": way.again == "reentrant"})
        self.optimizer = adamw(self.model)
        self.rng = np.random.default_rng(5)  # the same on every rank

    def step(
        self, step: int, routes: list[list[torch.Tensor]], rank: int, data: Any = None
    ) -> tuple[float, torch.Tensor]:
        """One optimizer step on this rank's tokens: loss over all ranks, and the norm of all gradients."""
        way, data, counts = self.way, data or batches(step), counted(routes)
        if step % way.zero == 0:
            self.optimizer.zero_grad()
        foreseen: Any = counts
        if way.foreseen == "search":
            foreseen = search(counts, way.options["slots"], homes=self.balanced.homes)
        elif way.foreseen == "plan":
            foreseen = random_plan(self.rng, counts, way.options["slots"])
        elif way.foreseen == "none":
            foreseen = None
        total, losses = torch.zeros(()), {}
        with self.balanced.step(foreseen, way.order(), self.optimizer) as run, autocast(way.cast == "whole"):
            for stage, m in way.order():
                ids, recorded_ids, real = data[m][rank], routes[m][rank], None
                if not len(ids):  # nothing to do: one token of padding
                    ids, recorded_ids = torch.zeros((1, 1), dtype=torch.int64), none().new_zeros((1, LAYERS, TOP_K))
                    real = torch.zeros((1, 1), dtype=torch.int64)
                if stage == "recompute":
                    with run.micro_step(m, stage, recorded_ids, real), torch.no_grad():
                        self.loss(ids)
                elif stage == "update":
                    with run.micro_step(m, stage, recorded_ids, real):
                        losses[m] = self.loss(ids)
                        losses[m].backward()
                elif stage == "forward":
                    with run.forward(m, recorded_ids, real):
                        losses[m] = self.loss(ids)
                else:
                    with run.backward(m):
                        losses[m].backward()
            run.finish_gradients()
        for m, loss in losses.items():
            total += loss.detach() * bool(len(data[m][rank]))
        dist.all_reduce(total, group=self.balanced.blocks[0].group)
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        norm = self.balanced.clip_grad_norm_(MAX_NORM)
        self.optimizer.step()
        return float(total), norm

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        with autocast(self.way.cast != "no"):
            return loss_of(self.model, ids)

    def mine(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Of the plain model's tensor, what this rank should have."""
        if ".experts." not in name:
            return whole
        bank = self.balanced.blocks[int(name.split(".")[2])].experts
        return whole[torch.from_numpy(bank.homes_E == bank.rank)]


def close(a: torch.Tensor, b: torch.Tensor, what: str, kind: str, tolerance: float) -> None:
    assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}"
    if b.numel():
        far = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3)
        WORST[kind] = max(WORST.get(kind, 0.0), far)
        assert far <= tolerance, f"{what}: {far}"


def compare(training: Training, trace: Trace, step: int, loss: float, norm: torch.Tensor) -> None:
    """This step against the stock model's: loss, norm, gradients, weights, AdamW's moments."""
    what = f"{training.way.name}, step {step}"
    close(torch.tensor(loss), torch.tensor(trace.losses[step]), f"{what}: loss", "loss", TOLERANCE)
    close(norm, trace.norms[step], f"{what}: norm", "norm", TOLERANCE)
    assert set(training.gradients) == set(trace.gradients[step]), f"{what}: other parameters have gradients"
    for name, gradient in trace.gradients[step].items():
        kind, tolerance = ("gradient", TRAINED) if step else ("first gradient", TOLERANCE)
        close(training.gradients[name], training.mine(name, gradient), f"{what}: {name}", kind, tolerance)
    whole = training.balanced.state_dict()
    assert list(whole) == list(trace.weights[step])
    for name, weight in trace.weights[step].items():
        close(whole[name], weight, f"{what}: trained {name}", "weight", TRAINED)
    state, expected = training.balanced.optimizer_state_dict(training.optimizer), trace.states[step]
    assert state["param_groups"] == expected["param_groups"]
    assert list(state["state"]) == list(expected["state"])
    for index, parts in expected["state"].items():
        for key, value in parts.items():
            close(state["state"][index][key], value, f"{what}: {key} of parameter {index}", key, TRAINED)


def check_way(way: Way, trace: Trace, rank: int, frozen: str = "none") -> None:
    training = Training(way, frozen=frozen)
    for step in range(STEPS):
        compare(training, trace, step, *training.step(step, trace.routes[step], rank))
    mover = training.balanced.mover
    assert mover.copies_moved > 0, f"{way.name}: nothing was balanced"
    assert (mover.unforeseen, mover.absent) == (0, 0), f"{way.name}: {mover.unforeseen}, {mover.absent}"
    training.balanced.close()


def check_checkpoint(trace: Trace, rank: int) -> None:
    """Saved in mid-run and resumed with other homes and slots, on one rank alone, and without Outrider."""
    half, file = STEPS // 2, io.BytesIO()
    training = Training(Way("before the checkpoint", "plan", slots=3))
    for step in range(half):
        training.step(step, trace.routes[step], rank)
    saved = training.balanced.state_dict(only=1), training.balanced.optimizer_state_dict(training.optimizer, only=1)
    assert all(not some for some in saved) == (rank != 1)
    told = [saved]
    dist.broadcast_object_list(told, src=1)
    torch.save(told[0], file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file)
    plain = build()
    plain.load_state_dict(model_state)
    plain_optimizer = adamw(plain)
    plain_optimizer.load_state_dict(optimizer_state)
    same_state(plain_optimizer.state_dict(), optimizer_state)

    resumed = Training(Way("resumed", "plan", ring=1, slots=1))
    alone = Training(Way("resumed alone", slots=0), group=dist.new_group([rank], use_local_synchronization=True))
    resumed.rng.random(99)  # other homes than before
    for one in (resumed, alone):
        one.balanced.load_state_dict(model_state)
        one.balanced.load_optimizer_state_dict(one.optimizer, optimizer_state)
        same_state(one.balanced.optimizer_state_dict(one.optimizer), optimizer_state)
    for step in range(half, STEPS):
        compare(resumed, trace, step, *resumed.step(step, trace.routes[step], rank))
        ids, routes = ([[torch.cat(row)] for row in rows] for rows in (batches(step), trace.routes[step]))
        compare(alone, trace, step, *alone.step(step, routes, 0, ids))


def same_state(state: Any, expected: Any) -> None:
    """Two optimizer states, to the bit."""
    assert state["param_groups"] == expected["param_groups"]
    assert list(state["state"]) == list(expected["state"])
    for index, parts in expected["state"].items():
        assert all(torch.equal(state["state"][index][key], value) for key, value in parts.items()), index


def check_bits(trace: Trace, rank: int) -> None:
    """In bitwise mode the whole model has the same bits, dense part and optimizer too, however it is trained."""
    expected: Any = None
    for way in (
        Way("live gate", "none", bitwise=True, block_rows=4),
        Way("foreseen", "counts", bitwise=True, block_rows=4, first=True),
        Way("new homes", "plan", passes="two in flight", again="not reentrant", ring=1, bitwise=True, block_rows=4),
        Way("resumed", "plan", slots=1, update="host", bitwise=True, block_rows=4),
    ):
        training = Training(way)
        norms = []
        for step in range(STEPS):
            if way.name == "resumed" and step == 2:
                halves = training.balanced.state_dict(), training.balanced.optimizer_state_dict(training.optimizer)
                training = Training(way)
                training.balanced.load_state_dict(halves[0])
                training.balanced.load_optimizer_state_dict(training.optimizer, halves[1])
            norms.append(training.step(step, trace.routes[step], rank)[1])
        whole = training.balanced.state_dict()
        state = training.balanced.optimizer_state_dict(training.optimizer)
        if expected is None:
            expected = whole, state, norms
        assert norms == expected[2], f"{way.name}: {norms} and {expected[2]}"
        for name, tensor in expected[0].items():
            assert torch.equal(whole[name], tensor), f"{way.name}: other bits in {name}"
        same_state(state, expected[1])
    for name, tensor in trace.weights[-1].items():
        close(expected[0][name], tensor, f"bitwise: {name}", "weight", TRAINED)


def check_half_precision(trace: Trace, rank: int) -> None:
    """In bf16, and under autocast: how far from fp32 the stock model comes, and how far the balanced one."""
    stock, cast = Trace(torch.bfloat16, trace.routes), Trace(routes=trace.routes, cast=True)
    for way, dtype, beside in (
        (Way("plan", "plan", "two in flight", again="not reentrant", ring=1), torch.bfloat16, stock),
        (Way("live gate", "none"), torch.bfloat16, stock),
        (Way("autocast", "plan", again="not reentrant", cast="whole"), torch.float32, cast),
        (Way("autocast forward", "plan", "two in flight", ring=1, cast="forward"), torch.float32, cast),
        (Way("autocast, live gate", "none", again="not reentrant", cast="forward"), torch.float32, cast),
    ):
        training = Training(way, dtype)
        for step in range(STEPS):
            loss, _ = training.step(step, trace.routes[step], rank)
            bound("loss in bf16", abs(loss - trace.losses[step]) / trace.losses[step], LOSS_IN_HALF)
            if step == 0:
                exact, theirs = (
                    {name: training.mine(name, gradient) for name, gradient in side.gradients[0].items()}
                    for side in (trace, beside)
                )
                bound("gradients' error in bf16", apart_by(training.gradients, theirs, exact), HALF_GRADIENTS)
        ours = training.balanced.state_dict()
        bound("weights' error in bf16", apart_by(ours, beside.weights[-1], trace.weights[-1]), HALF_WEIGHTS)


def check_autocast(rank: int) -> None:
    """One layer under autocast gives and learns what the stock layer does: products in bf16, not in the weights' fp32.

    The backward pass runs outside of autocast, as it should, and inside of it. float64 stays what it is.
    """
    generator = torch.Generator().manual_seed(7)
    random = torch.randn(2, 2, 40, 32, generator=generator)
    for dtype, inside in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        inputs_R, upstream_R = random.to(dtype)
        stock, ours = build(dtype), build(dtype)
        stock.set_experts_implementation("eager")  # the grouped one takes no notice of autocast
        balanced = balance(ours, timeout_s=30.0)
        theirs = layer_under_autocast(stock, inputs_R, upstream_R, inside)
        with balanced.step() as run:
            with run.micro_step(0):
                mine = layer_under_autocast(ours, inputs_R[rank : rank + 1], upstream_R[rank : rank + 1], inside)
            run.finish_gradients()
        parts = {
            "output": (mine[0], theirs[0][rank : rank + 1]),
            "input gradient": (mine[1], theirs[1][rank : rank + 1]),
        }
        at = torch.from_numpy(balanced.blocks[0].experts.homes_E == rank)
        for name, parameter in stock.model.layers[0].mlp.named_parameters():
            gradient = parameter.grad[at] if "experts" in name else parameter.grad
            parts[name] = ours.model.layers[0].mlp.get_parameter(name).grad, gradient
        for what, (a, b) in parts.items():
            assert a.dtype == b.dtype, what
            most = ONE_LAYER_IN_HALF if what == "output" else ONE_LAYERS_GRADIENTS
            if dtype == torch.float64 and what == "output":
                most = ONE_LAYER_IN_DOUBLE
            bound(f"{what} under autocast", float((a - b).norm() / b.norm()), most)


def layer_under_autocast(model: Any, inputs: torch.Tensor, upstream: torch.Tensor, inside: bool) -> Any:
    """Output and input gradient of its first MoE layer; inside: the backward pass is under autocast too."""
    inputs = inputs.clone().requires_grad_()
    with autocast(True):
        output = model.model.layers[0].mlp(inputs)
    with autocast(inside):
        output.backward(upstream)
    return output.detach(), inputs.grad


def apart_by(ours: Any, theirs: Any, exact: Any) -> float:
    """Distance of ours from what is exact, over the stock model's distance; over all ranks' parameters."""
    sides = [sum((side[n].double() - exact[n].double()).square().sum() for n in exact) for side in (ours, theirs)]
    total = torch.stack(sides)
    dist.all_reduce(total)
    return float((total[0] / total[1]).sqrt())


def bound(what: str, far: float, most: float) -> None:
    WORST[what] = max(WORST.get(what, 0.0), far)
    assert far <= most, f"{what}: {far}"


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    trace = Trace()
    for way in (
        Way("counts, recompute by host", first=True),
        Way("search", "search"),
        Way("new homes every step", "plan", first=True, update="host"),
        Way("live gate", "none", again="not reentrant"),
        Way("two in flight, ring 1", passes="two in flight", again="not reentrant", ring=1),
        Way("two in flight, ring 2, host", passes="two in flight", again="reentrant", ring=2, update="host"),
        Way("three in flight, all", "plan", passes="three in flight", again="not reentrant"),
        Way("three in flight, ring 1, host", "search", passes="three in flight", ring=1, update="host"),
        Way("a machine each, host", "plan", passes="two in flight", ring=1, update="host", apart=True),
    ):
        check_way(way, trace, rank)
    check_checkpoint(trace, rank)
    check_bits(trace, rank)
    check_half_precision(trace, rank)
    check_autocast(rank)
    sys.stdout.write(", ".join(f"{kind} {far:.2g}" for kind, far in WORST.items()) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
