"""Run on each of two ranks by test_precision.py: `python usage_ranks.py DIRECTORY RANK RANKS`.

What people do with a training loop beside the plain thing: freeze, accumulate, evaluate in the middle, wrap in DDP.
Each must train as the stock model does, or be refused by a sentence that says what to do instead.
"""

import copy
import io
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bitwise_ranks import random_plan
from precision_ranks import (
    EXPERTS,
    LAYERS,
    LENGTH,
    TOP_K,
    TRAINED,
    VOCABULARY,
    Trace,
    Way,
    adamw,
    build,
    check_way,
    close,
    counted,
    loss_of,
    replayed,
    same_state,
)
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - makes the backend known that is not gloo

from outrider.errors import CallerError, WorldError
from outrider.experts import balance, shared

IDS = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
TABLE = np.full((2, LAYERS, 2, EXPERTS), 2)
TABLE[:, :, :, 0] = 30  # one hot expert: it has a copy in every layer and micro-batch
ROUTES = torch.zeros((IDS.numel(), LAYERS, TOP_K), dtype=torch.int64)
ROUTES[:, :, 1] = torch.arange(IDS.numel())[:, None] % 5 + 1


def fresh(**options: Any) -> Any:
    model = build()
    return model, balance(model, timeout_s=10.0, **options)


def refused(words: str, what: Callable[[], Any]) -> None:
    """On both ranks, before anything waits for the other."""
    try:
        what()
    except CallerError as error:
        assert words in str(error), error  # noqa: PT017
    else:
        raise AssertionError(f"went on, and should have said: {words}")
    dist.barrier()


def check_frozen(rank: int) -> None:
    """Experts, one of their matrices, routers: an optimizer that was given them changes nothing that is frozen."""
    for frozen in (".experts.", "experts.gate_up_proj", "gate.weight"):
        trace = Trace(frozen=frozen)
        for way in (Way(f"{frozen} frozen", ring=1), Way(f"{frozen} frozen, bitwise", "none", bitwise=True)):
            check_way(way, trace, rank, frozen)
    model = build()
    model.requires_grad_(False)
    balance(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model, balanced = fresh()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    with balanced.step(TABLE) as run:
        with run.micro_step(0):
            loss_of(model, IDS).backward()
        run.finish_gradients()
    mover = balanced.mover
    sent = torch.tensor(mover.sent_bytes)
    dist.all_reduce(sent)
    weight_bytes = mover.copies_moved * mover.copies.numel * 4
    assert int(sent) == weight_bytes > 0, "what gathers no gradient sends none home"


def check_accumulation(rank: int) -> None:
    """Two steps on one zero_grad: dense gradients are summed over ranks once, not again with each step."""
    trace = Trace(zero=2)
    check_way(Way("accumulated", zero=2), trace, rank)
    check_way(Way("accumulated, bitwise", "search", zero=3, bitwise=True), Trace(zero=3), rank)


def check_unused(rank: int) -> None:
    """A parameter that nobody used has no gradient: with zeros an optimizer would let it decay."""
    model, balanced = fresh()
    model.unused = torch.nn.Linear(2, 2)
    model.used = torch.nn.Parameter(torch.ones(1))  # on one rank alone
    with balanced.step(TABLE) as run:
        with run.micro_step(0):
            (loss_of(model, IDS) + (model.used.sum() if rank else 0.0)).backward()
        run.finish_gradients()
    assert model.unused.weight.grad is None
    assert float(model.used.grad) == 1.0
    model.zero_grad()
    with balanced.step(TABLE) as run:
        with run.micro_step(0, "recompute"), torch.no_grad():
            loss_of(model, IDS)
        run.finish_gradients()
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing learned, and something would decay"


def check_evaluation(rank: int) -> None:
    """Without gradients, anywhere: before a step, in a recompute pass, between micro-steps, after the step."""
    expected = build()(input_ids=IDS).logits.detach()

    def evaluate() -> None:
        with torch.no_grad() if rank else torch.inference_mode():
            logits = model(input_ids=IDS).logits
        assert torch.allclose(logits, expected, atol=1e-5), float((logits - expected).abs().max())

    for foreseen in (TABLE, None):
        model, balanced = fresh(ring=0 if foreseen is None else 1)
        evaluate()
        with balanced.step(foreseen) as run:
            evaluate()
            with run.micro_step(0, "recompute"):
                evaluate()
            evaluate()
            for m in range(2):
                with run.micro_step(m):
                    loss_of(model, IDS).backward()
                evaluate()
            run.finish_gradients()
        evaluate()
        assert balanced.mover.copies_moved > 0
    gradient = model.lm_head.weight.grad
    with balanced.step() as run:
        with run.micro_step(0):
            evaluate()
        run.finish_gradients()
    assert torch.equal(gradient, model.lm_head.weight.grad), "what was summed already is summed once"


def check_several(rank: int) -> None:
    """The model twice in one micro-step: refused, or with several=True the sum."""
    other = IDS.flip(0) + 1
    stock = build()
    for ids in (IDS, other) * 2:  # both ranks have the same tokens
        loss_of(stock, ids).backward()
    for options, foreseen in (({}, TABLE), ({"ring": 1}, TABLE), ({}, None)):
        model, balanced = fresh(**options)

        def twice(several: bool, model: Any = model, balanced: Any = balanced, foreseen: Any = foreseen) -> None:
            with balanced.step(foreseen) as run:
                with run.micro_step(0, several=several):
                    (loss_of(model, IDS) + loss_of(model, other)).backward()
                run.finish_gradients()

        if options.get("ring") == 1:
            refused("set ring to 0", lambda: twice(True))
            continue
        if foreseen is not None:
            refused("layer 0 ran twice in one pass", lambda: twice(False))
            model, balanced = fresh(**options)
        twice(True, model, balanced)
        mine = torch.from_numpy(balanced.blocks[0].experts.homes_E == rank)
        for name, parameter in model.named_parameters():
            gradient = dict(stock.named_parameters())[name].grad
            gradient = gradient[mine] if ".experts." in name else gradient
            assert torch.allclose(parameter.grad, gradient, atol=1e-5 * float(gradient.abs().max())), name


def check_wrappers(rank: int) -> None:
    """DDP leaves experts alone, and the step is the same; Hugging Face's own auxiliary loss and generate run."""
    alone, model = fresh(), fresh()
    before = {name: parameter.detach().clone() for name, parameter in model[0].named_parameters()}
    wrapped = torch.nn.parallel.DistributedDataParallel(model[0])
    assert all(torch.equal(before[name], parameter) for name, parameter in model[0].named_parameters())
    for (plain, balanced), called in ((alone, alone[0]), (model, wrapped)):
        with balanced.step(TABLE) as run:
            for m in range(2):
                with run.micro_step(m):
                    loss_of(called, IDS + m).backward()
            run.finish_gradients()
        plain.eval()
        assert plain.generate(IDS, max_new_tokens=2, do_sample=False, attention_mask=IDS > -1).shape == (2, LENGTH + 2)
    for (name, ours), theirs in zip(model[0].named_parameters(), alone[0].parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name
    with alone[1].step() as run:
        with run.micro_step(0):
            alone[0](input_ids=IDS, labels=IDS, output_router_logits=True).loss.backward()
        run.finish_gradients()


def check_tables(rank: int) -> None:
    """Counts of whatever holds integers, routes as numpy and as int16, a mask as the tokenizer gives it."""
    for table in (TABLE.tolist(), torch.from_numpy(TABLE), TABLE.astype(np.int32)):
        model, balanced = fresh()
        with balanced.step(table) as run:
            for m, routes in enumerate((ROUTES.numpy(), ROUTES.to(torch.int16))):
                with run.micro_step(m, routes=routes, real=torch.ones_like(IDS)):
                    loss_of(model, IDS).backward()
            run.finish_gradients()


def check_refusals(rank: int) -> None:
    """Every one is found before a rank waits for another, and no step that went wrong is followed by one."""
    few = torch.zeros((3, LAYERS, TOP_K), dtype=torch.int64)

    def ran(
        foreseen: Any = TABLE,
        stage: Any = "update",
        passes: Any = (),
        batch: int = 0,
        with_grad: bool = True,
        **given: Any,
    ) -> None:
        model, balanced = fresh()
        with balanced.step(foreseen, passes) as run:
            with run.micro_step(batch, stage, **given), torch.set_grad_enabled(with_grad):
                loss = loss_of(model, IDS)
                if with_grad:
                    loss.backward()
            run.finish_gradients()

    for words, given in {
        "counts: float64": {"foreseen": TABLE.astype(float)},
        "Give [micro-batches, layers, ranks, experts], here one or more by 3, 2, 6": {"foreseen": TABLE[0]},
        "counts: shape (0, 3, 2, 6)": {"foreseen": TABLE[:0]},
        "negative number of token-slots": {"foreseen": TABLE - 3},
        "passes: (0, 'update') is none": {"passes": [(0, "update")]},
        "passes: 'update' is none": {"passes": ["update"]},
        "no stage 'training'": {"stage": "training"},
        "micro-batch 2: 2 were foreseen": {"batch": 2},
        "runs backward inside a recompute pass": {"stage": "recompute"},
        "routes: torch.int64 of shape (18, 2, 2). Give ids [tokens, 3, 2]": {
            "routes": ROUTES[:, 1:]
        },  # a layer is gone
        "routes: torch.int64 of shape (18, 3, 1)": {"routes": ROUTES[:, :, :1]},
        "routes: torch.float32": {"routes": ROUTES.float()},
        "holds expert 6, the limit is 5": {"routes": ROUTES + 1},
        "routes: 3 tokens, and layer 0 was given 18": {"routes": few},
        "real: 17 tokens, and layer 0 was given 18": {"real": torch.ones(17, dtype=torch.bool)},
    }.items():
        refused(words, lambda given=given: ran(**given))
    refused("runs backward inside a recompute pass", lambda: ran(None, "recompute"))


def check_order(rank: int) -> None:
    """What must come before what."""
    model, balanced = fresh()
    run = balanced.step(TABLE).__enter__()
    with run.micro_step(0):
        loss = loss_of(model, IDS)
    refused("forward ran in micro-step 0, its backward runs outside of any", loss.backward)
    refused("the one before has not ended", balanced.step(TABLE).__enter__)
    refused("load_state_dict: a step is under way", lambda: balanced.load_state_dict({}))

    model, balanced = fresh()
    model.activation_checkpointing_enable()
    run = balanced.step().__enter__()
    with run.micro_step(0):
        loss = loss_of(model, IDS)
    refused("activations are computed again outside of any micro-step", loss.backward)
    refused("without foresight a micro-step ends before the next begins", run.forward(0).__enter__)

    model, balanced = fresh()
    run, losses = balanced.step(TABLE).__enter__(), []
    for m in range(2):
        with run.forward(m):
            losses.append(loss_of(model, IDS))
    refused("micro-batch 0: it is in flight already", run.forward(0).__enter__)
    refused("micro-batches [0, 1] are in flight", run.finish_gradients)
    run.backward(0).__enter__()
    refused("forward ran in micro-step 1, its backward runs in micro-step 0", losses[1].backward)

    model, balanced = fresh()
    with balanced.step(TABLE) as run:
        run.finish_gradients()
        refused("the gradients are home already", run.finish_gradients)
        refused("Begin a new step", run.micro_step(0).__enter__)
    with balanced.step(TABLE) as run:
        refused("micro-batch 1: it is not in flight", run.backward(1).__enter__)
        run.finish_gradients()
    unfinished = balanced.step(TABLE)
    unfinished.__enter__()
    refused("Call run.finish_gradients()", lambda: unfinished.__exit__(None, None, None))
    alone = dist.new_group([rank], backend="fake", use_local_synchronization=True)
    refused("of cpu:fake", lambda: balance(build(), alone))
    refused("this model is balanced already", lambda: balance(model))
    refused("Linear: no MoE block with fused experts. Give a Hugging Face", lambda: balance(torch.nn.Linear(2, 2)))
    for words, options in {
        "slots -1": {"slots": -1}, "ring: 9 layers. Give 1 to 4": {"ring": 9}, "timeout_s 0": {"timeout_s": 0},
        "recompute: usb is no path": {"recompute": "usb"}, "block_rows 0": {"block_rows": 0},
    }.items():  # fmt: skip
        refused(words, lambda options=options: balance(build(), **options))
    refused("Copy the plain model before balance()", lambda: copy.deepcopy(model))
    refused("load balanced.state_dict() into a plain one", lambda: torch.save(model, io.BytesIO()))


def check_ranks_that_differ(rank: int) -> None:
    """Models of other seeds, and ranks that drift apart because each clipped by a norm of its own."""
    model = build()
    with torch.no_grad():
        model.model.norm.weight[0] += rank
    refused("model.norm.weight is not the same on ranks 0 and 1 (1 of", lambda: balance(model))
    model, balanced = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(clip: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        with balanced.step(TABLE) as run:
            with run.micro_step(0):
                loss_of(model, IDS).backward()
            run.finish_gradients()
        clip()
        optimizer.step()

    for _ in range(2):
        step(lambda: balanced.clip_grad_norm_(0.1))
    step(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    refused("Give every rank the same seed or checkpoint, and clip by balanced.clip_grad_norm_", lambda: step(list))


class Doubled(torch.nn.Module):
    """A gate whose weights are none that replay knows."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate, self.weight, self.top_k, self.norm_topk_prob = gate, gate.weight, gate.top_k, gate.norm_topk_prob

    def forward(self, rows: torch.Tensor) -> Any:
        logits, weights, chosen = self.gate(rows)
        return logits, weights * 2, chosen


def check_states(rank: int) -> None:
    """Checkpoints that are none, optimizers that cannot go along, plans that are refused and leave all as it was."""
    model, balanced = fresh(ring=1)
    whole = balanced.state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    refused(f"state: {name} has shape (3, 32, 16)", lambda: balanced.load_state_dict({**whole, name: whole[name][:3]}))
    refused(
        f"state: {name} is missing", lambda: balanced.load_state_dict({n: t for n, t in whole.items() if n != name})
    )
    early = torch.optim.AdamW(build().parameters())
    refused("Make it after balance(model)", lambda: balanced.optimizer_state_dict(early))
    refused("Make it after balance(model)", balanced.step(TABLE, (), early).__enter__)

    def learned(optimizer: Any, foreseen: Any = TABLE) -> None:
        optimizer.zero_grad()
        with balanced.step(foreseen, optimizer=optimizer) as run:
            with run.micro_step(0):
                loss_of(model, IDS).backward()
            run.finish_gradients()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    learned(optimizer)
    before = balanced.optimizer_state_dict(optimizer)
    plan = random_plan(np.random.default_rng(1), TABLE, 2)
    refused("nobody said whose state goes along", balanced.step(plan).__enter__)
    refused("gradients are not zero", balanced.step(plan, (), optimizer).__enter__)
    optimizer.zero_grad()
    crowded = random_plan(np.random.default_rng(1), TABLE, 3)
    refused("3 copies of one layer on a rank that has 2 frames", balanced.step(crowded, (), optimizer).__enter__)
    after = balanced.optimizer_state_dict(optimizer)
    assert all(
        torch.equal(before["state"][i]["momentum_buffer"], after["state"][i]["momentum_buffer"]) for i in after["state"]
    )
    learned(optimizer, plan)  # it was refused, changed nothing, and now it goes
    assert (plan.homes != np.array([0, 0, 0, 1, 1, 1])).any()
    assert all((block.experts.homes_E == homes).all() for block, homes in zip(balanced.blocks, plan.homes, strict=True))
    parameter = model.model.layers[0].mlp.experts.down_proj
    optimizer.state[parameter]["lumped"] = torch.zeros(1000)
    refused("lumped has no row for each expert", lambda: balanced.optimizer_state_dict(optimizer))
    other = random_plan(np.random.default_rng(2), TABLE, 2)
    optimizer.zero_grad()
    refused("lumped has no row for each expert", balanced.step(other, (), optimizer).__enter__)

    model = build()
    model.model.layers[1].mlp.gate = Doubled(model.model.layers[1].mlp.gate)
    balanced = balance(model, timeout_s=10.0)
    learned(torch.optim.SGD(model.parameters(), lr=0.01))  # its live choice is its own affair

    def replays() -> None:
        with balanced.step(TABLE) as run, run.micro_step(0, routes=ROUTES):
            loss_of(model, IDS)

    refused("routes: Doubled weighs experts in a way unknown to replay", replays)


def check_relocation(rank: int) -> None:
    """New homes every step, of as many experts a rank and of others, none and all too; old losses are still alive.

    What moves keeps its bits, the optimizer's state too; then the model trains on as the stock model does.
    """
    rng, counts = np.random.default_rng(0), counted([[ROUTES, ROUTES]] * 2)
    stock, (model, balanced) = build(), fresh()
    theirs, ours = adamw(stock), adamw(model)
    alive = []
    for homes in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 1], [0] * EXPERTS, [1, 1, 0, 1, 1, 1]):
        theirs.zero_grad()
        ours.zero_grad()
        weights, state = balanced.state_dict(), balanced.optimizer_state_dict(ours)
        plan = random_plan(rng, counts, 2, np.tile(homes, (LAYERS, 1)))
        with balanced.step(plan, optimizer=ours) as run:
            assert all(torch.equal(tensor, weights[name]) for name, tensor in balanced.state_dict().items())
            same_state(balanced.optimizer_state_dict(ours), state)
            for m in range(2):
                with run.micro_step(m, routes=ROUTES):
                    alive.append(loss_of(model, IDS + m))
                    alive[-1].backward()
            run.finish_gradients()
        for m in (0, 0, 1, 1):  # both ranks have the same tokens
            with replayed(stock, ROUTES):
                loss_of(stock, IDS + m).backward()
        mine = torch.tensor(homes) == rank
        for name, parameter in stock.named_parameters():
            here, own = mine if ".experts." in name else ..., model.get_parameter(name)
            close(own.grad, parameter.grad[here], f"{name}, {homes}", "relocated", TRAINED)
            close(own.detach(), parameter.detach()[here], f"{name}, {homes}", "relocated", TRAINED)
        theirs.step()
        ours.step()
    whole = balanced.state_dict()
    for name, tensor in stock.state_dict().items():
        close(whole[name], tensor, name, "relocated", TRAINED)


def check_broken_off(rank: int) -> None:
    """An error in the middle of a pass: no block keeps routes or a mask that were recorded for other tokens."""

    def fail(inside: Any) -> None:
        try:
            with inside:
                loss_of(model, IDS)
                raise FloatingPointError("the loss is not a number")
        except FloatingPointError:
            assert all(block.routes is None and block.real is None for block in balanced.blocks)

    given = {"routes": ROUTES, "real": torch.ones_like(IDS)}
    for foreseen, half in ((TABLE, False), (None, False), (TABLE, True)):
        model, balanced = fresh()
        run = balanced.step(foreseen).__enter__()
        fail(run.forward(0, **given) if half else run.micro_step(0, **given))
    with torch.no_grad():
        expected = build()(input_ids=IDS).logits
    model, balanced = fresh()
    run = balanced.step().__enter__()
    fail(run.micro_step(0, **given))
    with torch.no_grad():  # of the live gate, as before
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    model, balanced = fresh()
    run = balanced.step(TABLE).__enter__()
    with run.forward(0, **given):
        loss_of(model, IDS)
    with run.forward(1):
        loss_of(model, IDS)
    try:
        with run.backward(0):
            raise FloatingPointError
    except FloatingPointError:
        assert all(block.routes is None for block in balanced.blocks)


def check_shared_memory(rank: int) -> None:
    """When a pass that pulls begins, all is there, however slow its home; who cannot open it, all hear of it."""
    model, balanced = fresh()
    memory, stock = balanced.mover.shared, build()
    put = memory.put

    def late(*what: Any) -> None:
        time.sleep(0.1)
        put(*what)

    memory.put = late
    with balanced.step(TABLE) as run:
        with run.micro_step(0, "recompute"), torch.no_grad():
            assert any(expert < EXPERTS // 2 for _, expert in memory._at), "rank 0 has nothing that rank 1 could miss"
            for layer, expert in memory._at:
                into = torch.empty(memory.numel)
                memory.pull(layer, expert, into)
                experts = stock.model.layers[layer].mlp.experts
                parts = experts.gate_up_proj[expert], experts.down_proj[expert]
                assert torch.equal(into, torch.cat([part.detach().reshape(-1) for part in parts]))
            model(input_ids=IDS)
        run.finish_gradients()

    def no_such_file(path: Any, *_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", path)

    _, balanced = fresh()
    run = balanced.step(TABLE).__enter__()
    begin_s = time.monotonic()
    if rank == 1:
        shared.open = no_such_file  # type: ignore[attr-defined]
    try:
        run.micro_step(0, "recompute").__enter__()
    except WorldError as error:
        assert "cannot be opened: No such file or directory. Let all ranks" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("went on without shared memory")
    assert time.monotonic() - begin_s < 5.0, "it waited for the time-out"
    if rank == 1:
        del shared.open  # type: ignore[attr-defined]
    run.micro_step(0).__enter__()  # no group of ranks is out of step


def check_uneven(rank: int) -> None:
    """A rank that evaluates more often than the others is told so, in words. The last check: the other rank is gone."""
    model = build()
    balance(model, timeout_s=2.0)
    try:
        for _ in range(1 + rank):
            with torch.no_grad():
                model(input_ids=IDS)
    except WorldError as error:
        assert rank == 1
        assert "layer 0 exchanged tokens, which all ranks must do equally often" in str(error), error  # noqa: PT017
    else:
        assert rank == 0


def check_groups(rank: int) -> None:
    """Torch matches new groups by how many a rank is in: a group of rank 0 alone would let all of them hang."""
    dist.new_group([0])
    balanced = balance(build())
    assert balanced.state_dict()
    balanced.close()


def main(directory: str, rank: int, ranks: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{Path(directory) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for check in (
        check_frozen, check_accumulation, check_unused, check_evaluation, check_several, check_wrappers, check_tables,
        check_refusals, check_order, check_ranks_that_differ, check_states, check_relocation,
        check_broken_off, check_shared_memory, check_uneven, check_groups,
    ):  # fmt: skip
        check(rank)
    sys.stdout.write("all held\n")
    sys.stdout.flush()
    os._exit(0)  # steps that were refused left their groups behind


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
