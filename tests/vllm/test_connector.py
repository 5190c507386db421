"""The connector under vLLM's real scheduler: every trap of the interface, and that no answer ever changes."""

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pretended import BLOCK, Engine, answer, config, engine, hasher
from servers import Memory
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from outrider import memory as outrider_memory
from outrider.memory.adapters.copying import Job
from outrider.memory.adapters.orders import Copies

PROMPT = list(range(7, 107))  # 100 tokens: six whole blocks, and a tail
WHOLE = 6 * BLOCK
PARKED = RequestStatus.WAITING_FOR_REMOTE_KVS
Settings = Callable[..., Any]


@pytest.fixture
def settings(smollm2: Path, memory: Memory) -> Settings:
    return lambda **options: config(smollm2, memory.socket, **options)


def fill(settings: Settings, memory: Memory, *prompts: list[int], **options: Any) -> None:
    """Have an engine compute the prompts, and their blocks on disk."""
    with engine(settings(**options)) as first:
        for prompt in prompts or (PROMPT,):
            assert first.ask(prompt)[0] == answer(prompt)
    with outrider_memory.connect(memory.socket) as store:
        store.flush()


def settled(running: Engine) -> None:
    """All blocks are back, once."""
    running.run()
    assert running.free_blocks == len(running.kv["layer.0"]) - 1


def test_blocks_come_back_after_the_cache_is_reset_and_in_another_engine(settings: Settings, memory: Memory) -> None:
    with engine(settings()) as first:
        assert first.ask(PROMPT) == (answer(PROMPT), 103)
        first.forget()
        assert first.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)
        assert first.counts["saved_blocks"] == first.counts["loaded_blocks"] == 6
        settled(first)
    with engine(settings()) as second:
        assert second.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)
        assert memory.stats()["hit_blocks"] == 12


def test_generated_blocks_are_saved_too_and_a_turn_continues_them(settings: Settings, memory: Memory) -> None:
    with engine(settings()) as first:
        said, _ = first.ask(PROMPT, max_tokens=40)
    turn = PROMPT + said + [5, 6, 7]
    with engine(settings()) as second:
        assert second.ask(turn) == (answer(turn), len(turn) + 3 - 139 // BLOCK * BLOCK)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 6 * BLOCK])
def test_one_token_is_always_left_to_compute(settings: Settings, memory: Memory, length: int) -> None:
    fill(settings, memory)
    with engine(settings()) as running:
        running.ask(PROMPT[:length])
        memory_had = (length - 1) // BLOCK * BLOCK
        assert running.computed.popitem()[1] == length + 3 - memory_had


def test_asking_for_a_match_changes_nothing(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    with engine(settings()) as running:
        request = running.add(PROMPT)
        connector, before = running.scheduler.connector, memory.seen("Lookup")
        said = [connector.get_num_new_matched_tokens(request, 0) for _ in range(200)]
        while said[-1][0] is None:
            said.append(connector.get_num_new_matched_tokens(request, 0))
        assert {*said} <= {(None, False), (WHOLE, True)}
        assert connector.get_num_new_matched_tokens(request, 2 * BLOCK) == (WHOLE - 2 * BLOCK, True)
        assert connector.get_num_new_matched_tokens(request, WHOLE) == (0, False)
        assert connector.get_num_new_matched_tokens(request, 0) == (WHOLE, True)
        assert memory.seen("Lookup") <= before + 1 and memory.seen("Lease") == 0
        running.run()
        assert running.outputs[request.request_id] == answer(PROMPT)


def test_told_of_blocks_but_no_tokens_nothing_is_loaded(settings: Settings, memory: Memory) -> None:
    """vLLM tells twice of an asynchronous load: the second time of blocks and 0 tokens."""
    fill(settings, memory)
    with engine(settings()) as running:
        request = running.add(PROMPT)
        connector, told = running.scheduler.connector, []
        inner = connector._asking.allocated
        connector._asking.allocated = lambda *said: (told.append(said[3]), inner(*said))[1]
        running.run()
        assert told[:2] == [WHOLE, 0]
        assert memory.seen("Lease") == 1
        assert running.outputs[request.request_id] == answer(PROMPT)


def test_steps_without_metadata_and_without_a_forward_pass(settings: Settings) -> None:
    with engine(settings()) as running:
        worker = running.worker
        assert not worker.has_connector_metadata()
        worker.start_load_kv(SimpleNamespace(attn_metadata=None))
        worker.wait_for_layer_load("layer.0")
        worker.save_kv_layer("layer.0", running.kv["layer.0"], None)
        worker.wait_for_save()
        assert worker.get_finished(set()) == (None, None)
        assert worker.get_block_ids_with_load_errors() == set()
        running.step()  # nothing to do
        assert running.ask(PROMPT)[0] == answer(PROMPT)


@pytest.mark.parametrize("broken", [0, 2, 5])
def test_a_damaged_block_ends_the_load_there_and_vllm_computes(settings: Settings, memory: Memory, broken: int) -> None:
    with engine(settings()) as first:
        request = first.add(PROMPT)
        first.until(lambda: request.num_computed_tokens >= len(PROMPT))
        block = first.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0][broken]
        piece = first.kv["layer.0"][block].numpy().tobytes()
        first.run()
    with outrider_memory.connect(memory.socket) as store:
        store.flush()
    memory.stop()
    (file,) = [path for path in memory.folder.rglob("*") if path.is_file() and piece in path.read_bytes()]
    with file.open("r+b") as damaged:
        damaged.seek(file.read_bytes().index(piece))
        damaged.write(bytes(len(piece)))
    memory.start()
    with engine(settings()) as second:
        assert second.ask(PROMPT) == (answer(PROMPT), 103 - broken * BLOCK)
        assert second.counts["loaded_blocks"] == broken
        assert second.counts["failed_blocks"] == 6 - broken
        second.forget()
        assert second.ask(PROMPT)[0] == answer(PROMPT)
        settled(second)


def test_whoever_loaded_in_vain_does_not_ask_again(settings: Settings, memory: Memory) -> None:
    """Blocks that memory says it has, and that are of no use: of another size than a block's."""
    with engine(settings()) as running, outrider_memory.connect(memory.socket) as store:
        request = running.add(PROMPT)
        keys = running.scheduler.connector._asking.space.adopt(request.block_hashes)
        running.abort(request.request_id)
        store.complete(store.prepare(keys, 8))
        for _ in range(2):
            before = memory.seen("Lease")
            assert running.ask(PROMPT) == (answer(PROMPT), 103)
            assert memory.seen("Lease") == before + 1
            running.forget()
        settled(running)


def test_no_server_at_the_start_costs_nothing_and_one_that_comes_is_found(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, said = Memory(tmp_path, "host=8MiB", start=False), []
    monkeypatch.setattr(
        logging.getLogger("vllm.outrider"), "warning", lambda text, *parts: said.append(text % tuple(map(str, parts)))
    )
    with engine(config(smollm2, late.socket)) as running:
        assert running.ask(PROMPT) == (answer(PROMPT), 103)
        late.start()
        by_s = time.monotonic() + 10
        while late.stats()["tiers"]["host"]["blocks"] < 6:
            assert time.monotonic() < by_s, "it does not come back by itself"
            time.sleep(0.05)
            running.forget()
            assert running.ask(PROMPT)[0] == answer(PROMPT)
        running.forget()
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)
        assert running.counts["unanswered_calls"] > 0
    late.stop()
    assert all(str(late.socket) in text for text in said)  # each half says once that it is away, and that it is back
    assert sum("is away, its blocks are computed meanwhile: " in text for text in said) == 2
    assert sum(text == f"Outrider's memory at {late.socket} is back." for text in said) == 2


def test_a_server_that_dies_in_mid_load_costs_time_and_no_answer(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    memory.stop()
    memory.start()
    with engine(settings()) as running:
        memory.hold("Lease")
        request = running.add(PROMPT)
        running.until(lambda: memory.seen("Lease") and request.status == PARKED)
        memory.stop()  # the load is under way, and will never be answered
        running.run()
        assert (running.outputs[request.request_id], running.computed[request.request_id]) == (answer(PROMPT), 103)
        assert running.counts["failed_blocks"] == 6
        settled(running)
        memory.start()
        running.forget()
        time.sleep(1.0)  # longer than its pause
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)


def test_a_load_that_never_ends_is_given_up_and_its_late_bytes_touch_nothing(
    settings: Settings, memory: Memory
) -> None:
    fill(settings, memory)
    with engine(settings(extra={"patience_s": 0.3}), num_blocks=12) as running:
        memory.hold("Lease")
        began_s = time.monotonic()
        request = running.add(PROMPT)
        running.run()
        assert running.outputs[request.request_id] == answer(PROMPT)
        assert 0.3 <= time.monotonic() - began_s < 3.0
        assert running.counts["late_loads"] == 1
        others = [random.Random(seed).choices(range(900), k=70) for seed in range(2)]
        names = [running.add(other, max_tokens=9).request_id for other in others]
        running.until(lambda: all(running.outputs[name] for name in names))  # its blocks are theirs now
        memory.go_on("Lease")
        wait_for(lambda: memory.seen("Release") == 1)  # its bytes came, late
        running.run()
        assert [running.outputs[name] for name in names] == [answer(other, 9) for other in others]
        settled(running)


def test_a_look_up_that_hangs_is_not_waited_for(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    with engine(settings()) as running:
        memory.hold("Lookup")
        slowest_s, request = 0.0, running.add(PROMPT)
        while running.scheduler.has_requests():
            before_s = time.monotonic()
            running.step()
            slowest_s = max(slowest_s, time.monotonic() - before_s)
            if request.request_id in running.reasons:
                break
        assert running.outputs[request.request_id] == answer(PROMPT)
        assert slowest_s < 0.5, "the scheduler never waits for memory"
        memory.go_on("Lookup")


def test_fifty_requests_of_one_prefix_load_it_once(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    with engine(settings(max_num_seqs=64, max_num_batched_tokens=1024), num_blocks=400) as running:
        tails = [[*PROMPT[:WHOLE], i, i + 1] for i in range(50)]
        requests = [running.add(prompt) for prompt in tails]
        running.run()
        for request, prompt in zip(requests, tails, strict=True):
            assert running.outputs[request.request_id] == answer(prompt)
            assert running.computed[request.request_id] == len(prompt) + 3 - WHOLE
        assert memory.seen("Lease") == 1
        assert running.counts["loaded_blocks"] == 6
        settled(running)


def test_the_loader_is_aborted_and_another_takes_its_place(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    with engine(settings()) as running:
        memory.hold("Lease")
        requests = [running.add(PROMPT) for _ in range(3)]
        running.until(lambda: memory.seen("Lease") == 1)
        (loader,) = [request for request in requests if request.status == PARKED]
        free = running.free_blocks
        running.abort(loader.request_id)
        running.step()
        assert running.free_blocks <= free, "a copy in flight keeps its blocks (law 4)"
        memory.go_on("Lease")
        running.run()
        for request in requests:
            if request is not loader:
                assert running.outputs[request.request_id] == answer(PROMPT)
        settled(running)


def test_whoever_ends_while_it_is_saved_keeps_its_blocks_until_then(settings: Settings, memory: Memory) -> None:
    with engine(settings(extra={"patience_s": 20.0})) as running:
        memory.hold("Prepare")
        request = running.add(PROMPT, max_tokens=40)
        running.until(lambda: memory.seen("Prepare") and running.outputs[request.request_id])
        running.abort(request.request_id)
        for _ in range(5):
            running.step()
        assert running.free_blocks < 63, "memory has not copied them yet"
        memory.go_on("Prepare")
        settled(running)
    with engine(settings()) as second:
        assert second.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)


def test_a_save_that_never_ends_gives_its_blocks_back(settings: Settings, memory: Memory) -> None:
    with engine(settings(extra={"patience_s": 0.3})) as running:
        memory.hold("Prepare")
        assert running.ask(PROMPT)[0] == answer(PROMPT)
        settled(running)
        memory.go_on("Prepare")


def test_preempted_while_it_is_saved(settings: Settings, memory: Memory) -> None:
    """Two contexts in a cache for one and a half: what one had saved half is never the other's bytes."""
    jobs = [(PROMPT, 120), ([x + 300 for x in PROMPT], 60)]
    with engine(settings(extra={"patience_s": 20.0}), num_blocks=16) as running:
        memory.hold("Prepare")
        requests = [running.add(prompt, max_tokens=length) for prompt, length in jobs]
        running.until(lambda: requests[0].num_tokens > 210)
        assert requests[1].num_preemptions, "its blocks are the other's now"
        memory.go_on("Prepare")
        running.run()
        for request, (prompt, length) in zip(requests, jobs, strict=True):
            assert running.outputs[request.request_id] == answer(prompt, length)
        settled(running)
    with engine(settings(), num_blocks=40) as second:
        for prompt, length in jobs:
            turn = prompt + answer(prompt, length)
            assert second.ask(turn)[0] == answer(turn)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_no_answer_changes_and_every_block_comes_back(
    settings: Settings, memory: Memory, seed: int
) -> None:
    """Random requests of few families, aborts, resets, a memory that hangs, dies and returns; a cache too small."""
    dice = random.Random(seed)
    stems = [dice.choices(range(900), k=120) for _ in range(3)]
    with engine(settings(extra={"patience_s": 0.4}), num_blocks=22) as running:
        prompts: dict[str, tuple[list[int], int]] = {}
        aborted: set[str] = set()
        held = ""
        for _ in range(1200):
            running.step()
            what = dice.choices(["add", "abort", "reset", "hold", "go on", "die", ""], [12, 2, 2, 1, 5, 0.15, 78])[0]
            if what == "add" and len(running.scheduler.requests) < 8:
                prompt = [*dice.choice(stems)[: dice.randint(1, 120)], *dice.choices(range(900), k=dice.randint(1, 30))]
                length = dice.randint(1, 30)
                prompts[running.add(prompt, max_tokens=length).request_id] = (prompt, length)
            elif what == "abort" and running.scheduler.requests:
                name = dice.choice(sorted(running.scheduler.requests))
                aborted.add(name)
                running.abort(name)
            elif what == "reset":
                running.scheduler.reset_prefix_cache()
            elif what == "hold" and not held:
                held = dice.choice(["Lease", "Prepare", "Lookup", "Complete"])
                memory.hold(held)
            elif what == "go on" and held:
                memory.go_on(held)
                held = ""
            elif what == "die":
                memory.stop()
                memory.start()
                held = ""
        if held:
            memory.go_on(held)
        settled(running)
        for name, (prompt, length) in prompts.items():
            said = running.outputs[name]
            assert said == answer(prompt, length)[: len(said)]
            assert len(said) == length or name in aborted
        assert len(prompts) > 20
        loaded, by_s = running.counts["loaded_blocks"], time.monotonic() + 15
        while running.counts["loaded_blocks"] == loaded:  # it works on, as soon as memory's pause is over
            assert time.monotonic() < by_s
            running.forget()
            assert running.ask(stems[0])[0] == answer(stems[0])


def test_tenants_and_weights_share_nothing(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    for extra in ({"salt": "b"}, {"weights": "others"}):
        with engine(settings(extra=extra)) as running:
            assert running.ask(PROMPT) == (answer(PROMPT), 103), extra
    with engine(settings(hf_overrides={"rope_theta": 5.0})) as running:
        assert running.ask(PROMPT) == (answer(PROMPT), 103), "another model shape gives other numbers"
    with engine(settings()) as running:
        assert running.ask(PROMPT, cache_salt="tenant") == (answer(PROMPT), 103)
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)


def test_adapters_and_sessions_are_left_to_vllm(settings: Settings, memory: Memory) -> None:
    """A LoRA adapter is named by its path in vLLM's hash, not by its content."""
    from vllm.lora.request import LoRARequest

    with engine(settings()) as running:
        before = len(memory.server.seen)
        request = running.add(PROMPT, lora_request=LoRARequest("a", 1, "/somewhere"))
        running.run()
        assert running.outputs[request.request_id] == answer(PROMPT)
        assert len(memory.server.seen) == before


def test_pictures_that_a_client_named_are_left_to_vllm(settings: Settings, memory: Memory) -> None:
    """vLLM's hash has the name in place of the content: tomorrow another picture may have it."""
    fill(settings, memory)
    place = PlaceholderRange(offset=0, length=10)
    with engine(settings()) as running:
        asking, params = running.scheduler.connector._asking, SamplingParams()
        for identifier, known in (("cat.png", False), ("a" * 63 + "g", False), ("a1" * 32, True)):
            pictures = [MultiModalFeatureSpec(None, "image", identifier, place)]
            request = Request(identifier, PROMPT, params, None, mm_features=pictures, block_hasher=hasher)
            asking.arrived(request)
            assert (asking.matched(request, 0) != 0) is known


def test_external_caches_that_are_reset_are_not_served(settings: Settings, memory: Memory) -> None:
    with engine(settings()) as running:
        running.ask(PROMPT)
        assert running.scheduler.reset_prefix_cache(reset_connector=True)
        assert running.ask(PROMPT) == (answer(PROMPT), 103), "the weights may be others now"
        running.forget()
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)


def test_requests_under_way_when_external_caches_are_reset_meet_no_old_block(
    settings: Settings, memory: Memory
) -> None:
    """One waits with an answer of before the reset, one runs: neither loads an old block, nor saves one as new."""
    other = [x + 300 for x in PROMPT]
    fill(settings, memory, PROMPT, other)
    with engine(settings(max_num_seqs=1)) as running:
        runs = running.add(other, max_tokens=30)
        running.until(lambda: running.outputs[runs.request_id])
        waits = running.add(PROMPT)
        connector = running.scheduler.connector
        wait_for(lambda: connector.get_num_new_matched_tokens(waits, 0)[0] == WHOLE)
        assert running.computed[runs.request_id] < WHOLE, "it was loaded"
        running.scheduler.reset_prefix_cache(reset_connector=True)
        running.run()
        assert running.computed[waits.request_id] == 103, "the weights may be others now"
        running.forget()
        assert running.ask(other + answer(other, 29)) == (answer(other + answer(other, 29)), 132)
        settled(running)


def test_preempted_by_a_reset_of_external_caches_it_is_computed_anew(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    with engine(settings()) as running:
        request = running.add(PROMPT, max_tokens=20)
        running.until(lambda: running.outputs[request.request_id])
        assert running.computed[request.request_id] < WHOLE, "it was loaded"
        assert running.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        running.run()
        assert running.outputs[request.request_id] == answer(PROMPT, 20)
        assert running.computed[request.request_id] > len(PROMPT)
        running.forget()
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE), "what it computed since is saved"


def test_steps_longer_than_an_answer_is_fresh_put_nobody_off(
    settings: Settings, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step finds an answer that is older than it may be: the first look at it counts."""
    fill(settings, memory)
    monkeypatch.setattr("outrider.memory.adapters.asking.FRESH_S", 0.02)
    with engine(settings()) as running:
        busy = running.add([5] * 20, max_tokens=200)
        running.until(lambda: running.outputs[busy.request_id])
        request = running.add(PROMPT)
        for _ in range(12):
            time.sleep(0.05)
            running.step()
        assert request.request_id in running.reasons, "it waits for as long as others run"
        assert running.computed[request.request_id] == 103 - WHOLE


def test_what_a_load_overwrites_may_still_be_written_by_the_step_before(settings: Settings, memory: Memory) -> None:
    """On a device steps are launched, not over: a load waits for them, as a save does."""
    fill(settings, memory)
    with engine(settings()) as running:
        pages, fences = running.worker._copying.pages, []
        write = pages.write
        pages.fence = lambda: "launched"
        pages.write = lambda block, view, after: (fences.append(after), write(block, view, after))
        assert running.ask(PROMPT) == (answer(PROMPT), 103 - WHOLE)
        assert fences == ["launched"] * 6


def test_the_gateways_wants_find_the_context_by_its_call_id(settings: Settings, memory: Memory) -> None:
    with engine(settings()) as running:
        running.ask(PROMPT, name="chatcmpl-call-0123456789abcdef-1a2b3c4d")
        paths = memory.server.mover.policy.paths
        wait_for(lambda: len(paths.items("call-0123456789abcdef")) == 6)
        said = {"outrider": {"path": "mine", "returns_in_s": 30.0, "saved_s": 2.5}}
        running.ask(PROMPT[::-1], extra={"kv_transfer_params": said})
        wait_for(lambda: "mine" in paths.wants)
        want = paths.wants["mine"]
        assert want.saved_s == 2.5 and 20 < want.by_s - time.monotonic() <= 30
        running.ask(PROMPT[::-1], extra={"kv_transfer_params": {"outrider": {"path": "mine", "saved_s": 0}}})
        wait_for(lambda: "mine" not in paths.wants)


@pytest.mark.parametrize(
    "said", [{"outrider": 7}, {"outrider": {"returns_in_s": "soon"}}, {"outrider": {"saved_s": float("inf")}}, {"x": 1}]
)
def test_a_hint_that_makes_no_sense_costs_no_answer(settings: Settings, said: dict[str, Any]) -> None:
    with engine(settings()) as running:
        assert running.ask(PROMPT, extra={"kv_transfer_params": said})[0] == answer(PROMPT)


def test_what_only_the_disk_has_is_lifted_when_its_request_arrives(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)
    memory.stop()
    memory.start()
    with engine(settings()) as running:
        assert memory.stats()["tiers"]["host"]["blocks"] == 0
        running.add(PROMPT)  # no step is made: it waits in the line
        wait_for(lambda: memory.stats()["tiers"]["host"]["blocks"] == 6)
        assert memory.seen("Lease") == 0
        running.run()
        assert memory.stats()["wants_met"] == 1


def test_a_copy_that_ends_while_it_is_looked_for_is_not_lost(settings: Settings, memory: Memory) -> None:
    fill(settings, memory)

    class Ends(Job):
        """Over from the third look on."""

        looks = 0

        @property
        def over(self) -> bool:
            self.looks += 1
            return self.looks > 2

        @over.setter
        def over(self, value: bool) -> None:
            pass

    with engine(settings()) as running:
        copying = running.worker._copying
        job = Ends(Copies("r", (), ()), by_s=float("inf"))
        copying._loads.append(job)
        received = set()
        for _ in range(4):
            received |= copying.results().received
        assert received == {"r"} and not copying._loads


def wait_for(true: Callable[[], bool], within_s: float = 5.0) -> None:
    by_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < by_s
        time.sleep(0.005)
