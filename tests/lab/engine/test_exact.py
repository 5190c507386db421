"""Greedy output equals `transformers.generate`, token for token: batched, chunked, preempted, from reused blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError


def prompts_of(lengths: list[int], shared: int = 0, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 8192, (shared,), generator=random).tolist()
    return [head + torch.randint(3, 8192, (n - shared,), generator=random).tolist() for n in lengths]


@pytest.fixture(params=["tiny_moe", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("kv_tokens", "batch", "seats", "lengths"),
    [
        (1024, 512, 8, [1]),
        (1024, 512, 8, [5, 17, 64, 33]),  # together
        (1024, 16, 4, [100, 40, 7]),  # in chunks beside decodes
        (160, 64, 4, [14, 12, 16, 10]),  # too small a cache: preempted
    ],
)
def test_equals_generate(
    folder: Path, make_engine: Any, ask: Any, generate: Any, kv_tokens: int, batch: int, seats: int, lengths: list[int]
) -> None:
    engine = make_engine(folder, kv_tokens, max_batch_tokens=batch, max_num_seqs=seats)
    prompts = prompts_of(lengths)
    for (request, answer), prompt in zip(ask(engine, prompts, 24, ignore_eos=True), prompts, strict=True):
        assert request.generated == generate(folder, prompt, 24)
        assert answer.finish == "length"
    preempted = engine.metrics.registry.get_sample_value("vllm:num_preemptions_total")
    assert (preempted > 0) == (kv_tokens == 160)
    assert len(engine.blocks.free) == engine.blocks.capacity


def test_equals_generate_from_reused_blocks(folder: Path, make_engine: Any, ask: Any, generate: Any) -> None:
    engine = make_engine(folder)
    (first,) = prompts_of([70])
    ask(engine, [first], 20, ignore_eos=True)
    turn = first + generate(folder, first, 20) + prompts_of([9], seed=5)[0]
    ((request, _),) = ask(engine, [turn], 20, ignore_eos=True)
    assert request.own_blocks == (70 + 19) // 16
    assert request.generated == generate(folder, turn, 20)
    ((again, _),) = ask(engine, [turn], 20, ignore_eos=True)
    assert again.own_blocks == (len(turn) - 1) // 16
    assert again.generated == request.generated


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(20, 60), min_size=1, max_size=5),
    kv_tokens=st.integers(6, 20).map(lambda n: 16 * n),
    batch=st.integers(4, 80),
    seed=st.integers(0, 3),
)
@example(lengths=[46, 40], kv_tokens=96, batch=4, seed=2)  # its eighth word ends a sequence, were it not ignored
def test_any_sizes(
    llama: Path, make_engine: Any, ask: Any, generate: Any, lengths: list[int], kv_tokens: int, batch: int, seed: int
) -> None:
    engine = make_engine(llama, kv_tokens, max_batch_tokens=batch, max_num_seqs=4)
    prompts = prompts_of(lengths, shared=18, seed=seed)
    for (request, _), prompt in zip(ask(engine, prompts, 10, ignore_eos=True), prompts, strict=True):
        assert request.generated == generate(llama, prompt, 10)


def test_routes_are_those_of_a_plain_pass(tiny_moe: Path, make_engine: Any, ask: Any, plain: Any) -> None:
    engine = make_engine(tiny_moe, max_batch_tokens=24)
    model, chosen = plain(tiny_moe), []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: chosen.append(out[-1]))
        for module in model.modules()
        if type(module).__name__ == "Qwen3MoeTopKRouter"
    ]
    prompts = prompts_of([50, 37, 50], shared=34)
    answered = ask(engine, prompts, 9, ignore_eos=True, return_routes=True)
    answered += ask(engine, prompts[:1], 9, ignore_eos=True, return_routes=True)  # now from reused blocks
    assert answered[-1][0].own_blocks == 3
    for request, answer in answered:
        chosen.clear()
        with torch.inference_mode():
            model(torch.tensor([request.tokens]))
        routes = answer.outputs[-1].routes
        assert routes is not None
        assert routes.shape == (len(request.prompt) + 9, 4, 4), "a row for every prompt and generated token"
        assert np.array_equal(np.sort(routes), np.sort(torch.stack(chosen, 1).numpy()))
    for hook in hooks:
        hook.remove()


def test_eos_stops_and_is_counted(llama: Path, make_engine: Any, ask: Any, generate: Any) -> None:
    (prompt,) = prompts_of([12])
    words = generate(llama, prompt, 8)
    engine = make_engine(llama)
    engine.eos = frozenset(words[3:4])
    end = words.index(words[3])
    ((request, answer),) = ask(engine, [prompt], 8)
    assert request.generated == words[: end + 1]
    assert answer.finish == "stop"
    ((request, answer),) = ask(engine, [prompt], 8, min_tokens=end + 2)
    assert words[3] not in request.generated[: end + 1], "eos is not chosen before min_tokens"


def test_seed_repeats_and_temperature_varies(llama: Path, make_engine: Any, ask: Any) -> None:
    engine = make_engine(llama)
    (prompt,) = prompts_of([12])
    warm = [ask(engine, [prompt], 8, temperature=1.0, seed=seed)[0][0].generated for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    greedy = ask(engine, [prompt], 8)[0][0].generated
    cold = ask(engine, [prompt], 8, temperature=1e-30)[0][0].generated
    assert cold == greedy
    narrow = ask(engine, [prompt], 8, temperature=1.0, top_p=1e-9, seed=3)[0][0].generated
    assert narrow == greedy, "top_p near 0 leaves the likeliest token"


def test_a_batch_smaller_than_the_seats_is_refused(llama: Path, make_engine: Callable[..., Any]) -> None:
    with pytest.raises(CallerError, match="max-batch-tokens 4 is less than"):
        make_engine(llama, max_batch_tokens=4)
    with pytest.raises(CallerError, match="the cache needs two blocks"):
        make_engine(llama, kv_tokens=20)
