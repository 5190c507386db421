"""The engine and memory: blocks come back as they went, and whatever fails costs time, never an answer."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import StoreGone
from outrider.lab.engine.engine import Engine
from outrider.lab.engine.request import Params, Request

PROMPT = torch.randint(3, 8192, (100,), generator=torch.Generator().manual_seed(3)).tolist()
WHOLE = 6  # blocks of the prompt that may be reused


def settle(engine: Engine) -> None:
    """Until the saver is idle and every block that it held is given back."""
    quiet = threading.Event()
    engine.hook.writes.put(lambda: engine.inbox.put(quiet.set))
    while not quiet.is_set():
        engine.inbox.get(timeout=20)()
    assert len(engine.blocks.free) == engine.blocks.capacity


@pytest.fixture(params=["tiny_moe", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_second_engine_reuses_what_the_first_computed(
    folder: Path, make_engine: Any, ask: Any, generate: Any, dict_store: Any
) -> None:
    first = make_engine(folder, connect=dict_store.connect)
    ((one, answer_one),) = ask(first, [PROMPT], 30, ignore_eos=True, return_routes=True)
    settle(first)
    assert one.generated == generate(folder, PROMPT, 30)
    assert dict_store.paths["r0"] == one.keys[: 130 // 16], "the whole context is named, prompt and output"
    assert set(one.keys[: 130 // 16]) <= set(dict_store.blocks)
    for key in one.keys[:8]:
        block = first.blocks.by_key[key]
        assert dict_store.blocks[key] == first.forward.rows[block].tobytes() + first.forward.route_rows[block].tobytes()

    second = make_engine(folder, connect=dict_store.connect)
    ((two, answer_two),) = ask(second, [PROMPT], 30, ignore_eos=True, return_routes=True)
    assert (two.own_blocks, two.external_blocks) == (0, WHOLE)
    assert two.generated == one.generated
    assert (answer_two.outputs[-1].routes[:96] == answer_one.outputs[-1].routes[:96]).all()
    turn = [*one.tokens, 5, 6, 7]
    ((three, _),) = ask(second, [turn], 10, ignore_eos=True)
    assert three.own_blocks + three.external_blocks == len(turn) // 16
    assert three.generated == generate(folder, turn, 10)
    settle(second)


@pytest.mark.parametrize("call", ["lookup", "lease", "prepare", "complete", "remember"])
def test_a_server_that_dies_in_any_call_costs_no_answer(
    llama: Path, make_engine: Any, ask: Any, generate: Any, dict_store: Any, call: str
) -> None:
    filled = make_engine(llama, connect=dict_store.connect)
    ask(filled, [PROMPT[:64]], 2)
    settle(filled)

    def fault(now: str) -> None:
        if now == call:
            dict_store.up = False
            raise StoreGone("killed")

    dict_store.fault = fault
    engine = make_engine(llama, connect=dict_store.connect)
    prompts = [PROMPT, PROMPT[:70]]
    for (request, _), prompt in zip(ask(engine, prompts, 9, ignore_eos=True), prompts, strict=True):
        assert request.generated == generate(llama, prompt, 9)
    settle(engine)
    assert not dict_store.up


def test_a_bug_in_the_store_costs_no_answer(
    llama: Path, make_engine: Any, ask: Any, generate: Any, dict_store: Any
) -> None:
    engine = make_engine(llama, connect=dict_store.connect)
    bugs = []

    def fault(call: str) -> None:
        if call in {"lookup", "prepare"}:
            bugs.append(call)
            raise KeyError(call)

    dict_store.fault = fault
    ((request, _),) = ask(engine, [PROMPT], 9, ignore_eos=True)
    assert request.generated == generate(llama, PROMPT, 9)
    settle(engine)
    assert "lookup" in bugs


@pytest.mark.parametrize("broken", [0, 2, WHOLE - 1])
def test_computes_from_the_first_failed_block(
    llama: Path, make_engine: Any, ask: Any, generate: Any, dict_store: Any, broken: int
) -> None:
    first = make_engine(llama, connect=dict_store.connect)
    ((one, _),) = ask(first, [PROMPT], 2)
    settle(first)
    dict_store.broken = {one.keys[broken]}
    second = make_engine(llama, connect=dict_store.connect)
    ((two, _),) = ask(second, [PROMPT], 9, ignore_eos=True)
    assert two.external_blocks == broken
    assert two.generated == generate(llama, PROMPT, 9)
    settle(second)


def test_a_block_of_the_wrong_size_is_not_read(
    llama: Path, make_engine: Any, ask: Any, generate: Any, dict_store: Any
) -> None:
    first = make_engine(llama, connect=dict_store.connect)
    ((one, _),) = ask(first, [PROMPT], 2)
    settle(first)
    dict_store.blocks[one.keys[1]] = b"short"
    second = make_engine(llama, connect=dict_store.connect)
    ((two, _),) = ask(second, [PROMPT], 9, ignore_eos=True)
    assert two.external_blocks == 1
    assert two.generated == generate(llama, PROMPT, 9)


def test_requests_for_one_prefix_join_one_load_and_others_go_on(
    llama: Path, make_engine: Any, ask: Any, drive: Any, generate: Any, dict_store: Any
) -> None:
    first = make_engine(llama, connect=dict_store.connect)
    ask(first, [PROMPT], 2)
    settle(first)
    engine = make_engine(llama, connect=dict_store.connect)
    dict_store.gate.clear()
    dict_store.leased.clear()
    other = PROMPT[50:90]

    def open_the_gate_when_the_other_is_done() -> None:
        if requests[2].finish is None:
            return
        assert [r.computed for r in engine.scheduler.loading] == [0], "one loads, its twin waits for it"
        dict_store.gate.set()

    requests = [Request(f"j{i}", p, Params(9), lambda out: None) for i, p in enumerate([PROMPT, PROMPT, other])]
    for request in requests:
        engine.submit(request)
    drive(engine, lambda: None if dict_store.gate.is_set() else open_the_gate_when_the_other_is_done())
    assert [(r.own_blocks, r.external_blocks) for r in requests] == [(0, WHOLE), (WHOLE, 0), (0, 0)]
    assert len(dict_store.leased) == WHOLE
    for request in requests:
        assert request.generated == generate(llama, request.prompt, 9)[: len(request.generated)]
    settle(engine)


def test_aborted_while_loading(llama: Path, make_engine: Any, ask: Any, drive: Any, dict_store: Any) -> None:
    first = make_engine(llama, connect=dict_store.connect)
    ask(first, [PROMPT], 2)
    settle(first)
    engine = make_engine(llama, connect=dict_store.connect)
    dict_store.gate.clear()
    request = Request("a", PROMPT, Params(9), lambda out: None)
    engine.submit(request)
    while not engine.scheduler.loading:
        engine.step()
        if not engine.scheduler.loading:
            engine.inbox.get(timeout=20)()
    engine.abort(request)
    engine.inbox.get(timeout=20)()
    assert engine.blocks.check() is None
    assert len(engine.blocks.free) < engine.blocks.capacity, "a copy in flight keeps its blocks (law 4)"
    dict_store.gate.set()
    drive(engine)
    assert not engine.scheduler.loading
    settle(engine)


def test_pool_blocks_wait_until_they_are_saved(
    llama: Path, make_engine: Any, ask: Any, drive: Any, generate: Any, dict_store: Any
) -> None:
    go = threading.Event()
    dict_store.fault = lambda call: None if call != "prepare" else (go.wait(20), None)[1]
    engine = make_engine(llama, kv_tokens=128, connect=dict_store.connect)
    ((one, _),) = ask(engine, [PROMPT], 9, ignore_eos=True)
    other = Request("b", PROMPT[::-1], Params(9, ignore_eos=True), lambda out: None)
    engine.submit(other)
    engine.inbox.get(timeout=20)()
    assert not engine.step(), "no room: the blocks of the first are still being saved"
    go.set()
    drive(engine)
    assert other.generated == generate(llama, other.prompt, 9)
    settle(engine)
    second = make_engine(llama, connect=dict_store.connect)
    ((two, _),) = ask(second, [PROMPT], 9, ignore_eos=True)
    assert two.external_blocks == WHOLE
    assert two.generated == one.generated


def test_comes_back_to_a_server_that_comes_back(llama: Path, make_engine: Any, ask: Any, dict_store: Any) -> None:
    dict_store.up = False
    engine = make_engine(llama, connect=dict_store.connect)
    ask(engine, [PROMPT], 2)
    settle(engine)
    assert engine.hook.retry_at_s > 0, "it pauses between tries"
    dict_store.up, engine.hook.retry_at_s = True, 0.0
    ask(engine, [[*PROMPT, 9]], 2)
    settle(engine)
    assert len(dict_store.blocks) == WHOLE, "what it has from before is offered again"
