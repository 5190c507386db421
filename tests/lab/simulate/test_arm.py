"""One arm: conservation, journals that replay, callers that ask again, laws that break loudly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider import stack
from outrider.errors import CallerError, LawBroken
from outrider.lab.clock import Clock
from outrider.lab.simulate import arm, callers, predict
from outrider.lab.simulate.arm import Fleet
from outrider.lab.traces.workload import Workload
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.hook import MemoryHook
from outrider.lab.twins.links import Lane
from outrider.lab.twins.speed import Profile, Speed
from outrider.memory.settings import Hybrid, Settings
from outrider.topology import Link

SPEED = Speed(0.02, 0.001, 0.005, 1e-7)
PROFILE = Profile("test", SPEED, "made up", 1024, 4096, 256, 4, hop_s=0.001)
BASELINE = Fleet(PROFILE, 2, 1024, 4, "fcfs", "sticky")
MEMORY = Settings(1 << 20, 64 << 20)  # host holds a fraction of what is asked: 16 blocks of 64 KiB
OUTRIDER = Fleet(PROFILE, 2, 1024, 4, "srtf", "residency", MEMORY)
HYBRID = replace(OUTRIDER, memory=Settings(1 << 20, 64 << 20, hybrid=Hybrid(16 << 20, 4 << 20)))


def play(workload: Workload, fleet: Fleet, directory: Path | None = None) -> dict[str, Any]:
    return arm.play(workload, fleet, directory, lambda: None)


@pytest.mark.parametrize("fleet", [BASELINE, OUTRIDER, HYBRID], ids=["baseline", "memory", "hybrid"])
def test_every_call_ends_once_and_every_token_has_one_source(
    make_reviews: Callable[..., Workload], fleet: Fleet, tmp_path: Path
) -> None:
    workload = make_reviews(workflows=3)
    found = play(workload, fleet, tmp_path)
    assert found["calls"] == found["answered"] == found["arrivals"] == len(list(workload.calls))
    assert found["workflows"] == 3 and found["refused"] == {}
    assert found["prompt_tokens"] == sum(call.prompt_tokens for call in workload.calls)
    sources = found["prompt_tokens_from"]
    assert sum(sources.values()) == found["prompt_tokens"]
    assert min(sources.values()) >= 0
    assert found["prompt_tokens_computed"] == sources["computed"]
    assert ("host" in sources) == (fleet.memory is not None)
    journals = ["agents.jsonl"] + (["memory.jsonl"] if fleet.memory else [])
    for name in journals:
        agreed, difference = stack.replay(tmp_path / name)
        assert difference is None and agreed > 50, name
    if fleet.memory is None:
        return
    by_tier = found["memory"]["hit_blocks_by_tier"]
    assert sum(by_tier.values()) == found["memory"]["hit_blocks"] > 0
    assert found["prompt_tokens_from_memory"] <= sum(by_tier.values()) * 16
    moved = {way for way, link in found["links"].items() if link["moved_bytes"]}
    assert moved >= {"host->engine-0", "engine-0->host", "host->engine-1", "engine-1->host", "host->disk"}
    assert moved & {"disk->host", "hybrid->host", "cache->host"}


def test_a_link_is_busy_no_longer_than_the_run(make_reviews: Callable[..., Workload]) -> None:
    """Memory goes on after the last answer: those bytes count, those seconds are not the run's."""
    clock = Clock()
    lane = Lane(Link("disk", "host", 100.0, slots=2), clock)
    busy: list[float] = []
    for size_bytes in (300, 100, 200):  # 3 s on one slot, 1 and then 2 s on the other
        lane.send(size_bytes, lambda: None)
    for at_s in (0.5, 2.0, 5.0):
        clock.at(at_s, lambda: busy.append(lane.busy_s()))
    clock.run()
    assert busy == pytest.approx([1.0, 4.0, 6.0])
    slow = replace(OUTRIDER, memory=Settings(1 << 20, 64 << 20, disk_write=1e5))
    found = play(make_reviews(workflows=3), slow)
    assert found["links"]["host->disk"]["moved_bytes"] / 1e5 > found["wall_s"], "it does go on"
    assert 0.9 < found["links"]["host->disk"]["busy_share"] <= 1


def test_a_tier_below_host_is_used_when_host_is_small(make_reviews: Callable[..., Workload]) -> None:
    workload = make_reviews(workflows=3)
    assert play(workload, OUTRIDER)["prompt_tokens_from"]["disk"] > 0
    assert play(workload, HYBRID)["prompt_tokens_from"]["hybrid"] > 0


def test_memory_and_foresight_help_where_they_should(workload: Workload) -> None:
    roomy = replace(OUTRIDER, memory=Settings(8 << 20, 64 << 20))
    before, after = play(workload, BASELINE), play(workload, roomy)
    assert after["prompt_tokens_computed"] < 0.7 * before["prompt_tokens_computed"]
    assert after["workflow_completion_mean_s"] < before["workflow_completion_mean_s"]


def test_what_a_simulated_journal_says_is_what_the_figures_say(workload: Workload, tmp_path: Path) -> None:
    found = play(workload, OUTRIDER, tmp_path)
    came = predict.actual(tmp_path / "agents.jsonl")
    for name in predict.JUDGED:
        assert came[name] == pytest.approx(found[name], abs=0.01), name  # the client's hop is not the gateway's


def test_a_call_that_is_refused_for_now_is_sent_again(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arm.GatewaySettings
    monkeypatch.setattr(arm, "GatewaySettings", lambda **given: whole(queue_limit=3, **given))
    found = play(workload, replace(BASELINE, credit=2))
    assert found["sends"] > found["calls"] == found["answered"]
    assert found["arrivals"] == found["sends"]


def test_what_never_fits_is_refused_and_ends_its_workflow(workload: Workload) -> None:
    found = play(workload, replace(BASELINE, kv_tokens=416))
    assert found["refused"]["400"] > 0
    assert found["workflows_abandoned"] > 0
    assert found["workflows"] + found["workflows_abandoned"] == 6
    assert found["answered"] + found["refused"]["400"] < found["calls"], "what waits for them is not sent"


def test_a_cache_of_one_block_is_the_callers_mistake(workload: Workload) -> None:
    with pytest.raises(CallerError, match=r"--kv-tokens 16: this trace has blocks of 16 tokens"):
        play(workload, replace(BASELINE, kv_tokens=16))


def test_lost_bytes_are_found(make_reviews: Callable[..., Workload], monkeypatch: pytest.MonkeyPatch) -> None:
    send = Lane.send

    def short(lane: Lane, size_bytes: int, do: Callable[[], object]) -> None:
        send(lane, size_bytes - (lane.way == ("disk", "host")), do)

    monkeypatch.setattr(Lane, "send", short)
    with pytest.raises(LawBroken, match=r"LawBroken 2: disk->host: links moved \d+ bytes, memory counted \d+"):
        play(make_reviews(workflows=3), OUTRIDER)


@pytest.mark.parametrize("way", ["host->engine", "engine->host"])
def test_bytes_lost_between_engine_and_host_are_found(
    make_reviews: Callable[..., Workload], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    send = Lane.send

    def short(lane: Lane, size_bytes: int, do: Callable[[], object]) -> None:
        ours = way in "->".join(lane.way) if way == "host->engine" else lane.way[0].startswith("engine")
        send(lane, size_bytes - (ours and size_bytes > 0), do)

    monkeypatch.setattr(Lane, "send", short)
    with pytest.raises(LawBroken, match=f"LawBroken 2: {way}: links moved"):
        play(make_reviews(workflows=3), OUTRIDER)


def test_a_call_that_no_client_sends_is_found(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    later = callers.Callers._later

    def forgetful(self: callers.Callers, run: callers.Open, call: Any) -> None:
        if call.id != "w1/sum-0":
            later(self, run, call)

    monkeypatch.setattr(callers.Callers, "_later", forgetful)
    with pytest.raises(LawBroken, match="LawBroken 8: 6 workflows, 5 ended; 0 calls"):
        play(workload, BASELINE)


def test_a_block_counted_in_two_tiers_is_found(
    make_reviews: Callable[..., Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = MemoryHook._count

    def twice(hook: MemoryHook, job: Any, *rest: Any) -> None:
        count(hook, job, *rest)
        job.tiers["host"] = job.tiers.get("host", 0) + 1

    monkeypatch.setattr(MemoryHook, "_count", twice)
    with pytest.raises(LawBroken, match=r"LawBroken 2: call .* blocks from memory, by tier"):
        play(make_reviews(workflows=3), OUTRIDER)


def test_an_answer_given_twice_is_found(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Engine._settle

    def twice(engine: Engine, job: Any) -> None:
        settle(engine, job)
        job.passed += 1
        settle(engine, job)

    monkeypatch.setattr(Engine, "_settle", twice)
    with pytest.raises(LawBroken, match="tokens do not add up"):
        play(workload, BASELINE)


def test_a_call_that_never_ends_is_found_with_its_story(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "submit", lambda engine, job: None)
    monkeypatch.setattr("outrider.lab.twins.agents.AgentsTwin._limit", lambda *_: None)
    with pytest.raises(LawBroken, match=r"LawBroken 8: \d+ calls never ended: w0/plan-0.*Story: Dispatch 0"):
        play(workload, BASELINE)
