"""The readers: spans are those of the journal, without holes; levels and sums are exact."""

import shutil
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import journal
from outrider.agents import events as ev
from outrider.agents.settings import GatewaySettings
from outrider.errors import CallerError
from outrider.journal import Journal
from outrider.lab import levels, report
from outrider.lab.report import calls, draw, loads, strips, tiers, timeline, totals
from outrider.lab.report.run import Journals
from outrider.memory.events import Event
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings

ROOT = Path(__file__).parents[3]
ENGINES = ("http://a", "http://b")
BEGAN_S = 1000.0


def dispatch(call: str, engine: str, attempt: int) -> ev.Dispatch:
    return ev.Dispatch(call, engine, attempt, 1.0, 1.0, 0.0, "order, sticky", (), 7, 20, "prior", 1.0, 30)


def arrived(call: str, workflow: str) -> ev.Arrived:
    return ev.Arrived(ev.Call(call, ev.Identity(workflow=workflow, role="r", stage="r/0"), "/v1/chat/completions"))


def wrote(path: Path, lines: list[tuple[float, ev.Event, list[ev.Command]]]) -> calls.Calls:
    writer = Journal(path / "agents.jsonl", "agents", GatewaySettings(engines=ENGINES))
    for now, event, commands in sorted(lines, key=lambda line: line[0]):
        writer.write(now, event, commands)
    writer.close()
    return calls.read(path / "agents.jsonl")


def one_call(name: str, at: list[float], tries: int, usage: ev.Usage) -> list[tuple[float, ev.Event, list[ev.Command]]]:
    """A call that waits, breaks `tries` - 1 times before its first byte, waits again each time, and is answered."""
    moments = iter(at)
    lines: list[tuple[float, ev.Event, list[ev.Command]]] = [(next(moments), arrived(name, "w"), [])]
    for number in range(1, tries + 1):
        engine = ENGINES[number % 2]
        lines.append((next(moments), ev.Woke(), [dispatch(name, engine, number)]))
        if number < tries:
            lines.append((next(moments), ev.Failed(name, number, "reset", "it died", False), []))
    lines.append((next(moments), ev.FirstByte(name, tries), []))
    end_s = next(moments)
    settle = ev.Settle(name, ENGINES[tries % 2], 200, usage, 0.0, end_s - at[0])
    lines.append((end_s, ev.Finished(name, tries, 200, usage), [settle]))
    return lines


@st.composite
def runs(draw_from: st.DrawFn) -> list[tuple[list[float], int, ev.Usage]]:
    """Calls: their moments in order, how often they were tried, their tokens."""
    found = []
    for _ in range(draw_from(st.integers(1, 6))):
        tries = draw_from(st.integers(1, 3))
        gaps = draw_from(st.lists(st.integers(0, 50), min_size=2 * tries + 2, max_size=2 * tries + 2))
        at = [BEGAN_S + sum(gaps[: i + 1]) / 8 for i in range(len(gaps))]
        prompt = draw_from(st.integers(1, 500))
        cached = draw_from(st.integers(0, prompt))
        found.append(
            (
                at,
                tries,
                ev.Usage(prompt, draw_from(st.integers(0, 40)), cached, draw_from(st.integers(0, cached)), False),
            )
        )
    return found


@settings(max_examples=60, deadline=None)
@given(runs())
def test_a_journal_reads_back_as_it_was_made(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[list[float], int, ev.Usage]]
) -> None:
    lines = [line for i, (at, tries, usage) in enumerate(made) for line in one_call(f"c{i}", at, tries, usage)]
    read = wrote(tmp_path_factory.mktemp("j"), lines)
    assert len(read.stories) == len(made)
    for i, (at, tries, usage) in enumerate(made):
        story = read.stories[f"c{i}"]
        assert (story.arrived_s, story.ended_s, story.end, story.usage) == (at[0], at[2 * tries + 1], "Settle", usage)
        assert [attempt.began_s for attempt in story.attempts] == at[1 : 2 * tries : 2]
        assert [bool(attempt.failed) for attempt in story.attempts] == [True] * (tries - 1) + [False]
        assert story.attempts[-1].first_byte_s == at[2 * tries]
        whole = timeline.pieces(story, read.ended_s)
        edges = [edge for _, begin_s, end_s in whole for edge in (begin_s, end_s)]
        assert edges == sorted(edges) and all(a == b for a, b in zip(edges[1:-1:2], edges[2::2], strict=True)), (
            "no hole"
        )
        assert not whole or (edges[0], edges[-1]) == (story.arrived_s, story.ended_s)
        assert sum(e - b for kind, b, e in whole if kind == "stream") == at[2 * tries + 1] - at[2 * tries]
    tokens = totals.by_source(list(read.stories.values()), {"host": 2, "disk": 1})
    assert sum(tokens.values()) == sum(usage.prompt_tokens for _, _, usage in made)
    assert tokens["computed"] == sum(usage.prompt_tokens - usage.cached_tokens for _, _, usage in made)
    (arm,) = totals.totals(Journals({"outrider": read}, {}, None, None))["arms"]
    assert arm["retries"] == sum(tries - 1 for _, tries, _ in made)
    waits = dict(calls.waiting(read))
    for now in sorted({moment for at, _, _ in made for moment in at}):
        before = [level for moment, level in waits.items() if moment <= now]
        assert (before[-1] if before else 0) == sum(_waits(at, tries, now) for at, tries, _ in made)


def _waits(at: list[float], tries: int, now: float) -> bool:
    """Is a call in the line just after `now`? Between each moment before a dispatch and that dispatch."""
    return any(at[2 * i] <= now < at[2 * i + 1] for i in range(tries))


def test_late_news_of_an_attempt_changes_nothing(tmp_path: Path) -> None:
    """The client left, the engine's failure came afterwards; a call that is open when the journal ends stays open."""
    read = wrote(
        tmp_path,
        [
            (1.0, arrived("gone", ""), [dispatch("gone", "http://a", 1)]),
            (2.0, ev.Gone("gone"), [ev.Abort("gone", "http://a")]),
            (5.0, ev.Failed("gone", 1, "reset", "cut", False), []),
            (6.0, arrived("open", ""), [ev.Hold("open", 3, (), 0.0, {})]),
            (7.0, ev.EngineUp("http://b", (), 100, 0.25, 1, 0), []),
        ],
    )
    gone, unended = read.stories["gone"], read.stories["open"]
    assert (gone.end, gone.ended_s, gone.attempts[0].ended_s, gone.attempts[0].failed) == ("Abort", 2.0, 2.0, "")
    assert (unended.end, unended.ended_s, unended.ahead, unended.attempts) == ("", None, 2, [])
    assert calls.waiting(read) == [(1.0, 0), (6.0, 1), (7.0, 0)]
    assert (read.probes[0].kv_used, read.kv_tokens) == (25.0, {"http://b": 100})
    assert list(read.by_workflow()) == ["gone", "open"], "a call of no workflow stands for itself"


def test_a_large_run_is_drawn_in_time(tmp_path: Path) -> None:
    """6,000 calls: page and trace within 3 seconds of work, as it must be after a simulation."""
    usage = ev.Usage(500, 20, 100, 0, False)
    lines = [line for i in range(6000) for line in one_call(f"c{i}", [i, i + 1.0, i + 2.0, i + 9.0], 1, usage)]
    wrote(tmp_path, lines)
    began_s = time.process_time()
    report.write(tmp_path / "r.html", report.Run("large", True, [report.Arm("a", tmp_path, {})], figures={"a": {}}))
    assert time.process_time() - began_s < 3.0
    page = (tmp_path / "r.html").read_text()
    assert "one call in 4 has a bar" in page
    assert page.count("<g data-i") == 1500


@given(st.integers(0, 10**6), st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_parts_sum_up(total: int, weights: list[int]) -> None:
    named = {str(i): weight for i, weight in enumerate(weights)}
    parts = totals.shared_out(total, named)
    assert sum(parts.values()) == total
    if sum(weights):
        for name, weight in named.items():
            assert abs(parts[name] - total * weight / sum(weights)) < 1


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)), max_size=40))
def test_lanes_never_overlap_and_are_as_few_as_can_be(spans: list[tuple[int, int]]) -> None:
    timed = sorted((float(begin), float(begin + length)) for begin, length in spans)
    lanes = timeline.laid_out(timed)
    for lane in set(lanes):
        mine = [span for span, one in zip(timed, lanes, strict=True) if one == lane]
        assert all(a[1] <= b[0] for a, b in pairwise(mine))
    crowd = max((sum(b <= begin < e or (b == begin == e) for b, e in timed) for begin, _ in timed), default=0)
    assert len(set(lanes)) <= max(crowd, 0)


@given(st.floats(1e-3, 1e9), st.integers(2, 9))
def test_ticks_are_round_and_inside(top: float, about: int) -> None:
    ticks = draw.ticks(top, about)
    assert ticks[0].at == 0
    assert all(a.at < b.at <= 100 for a, b in pairwise(ticks))
    assert about / 3 <= len(ticks) <= 3 * about


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 9)), min_size=1, max_size=300))
def test_thinning_keeps_the_peak_and_the_end(points: list[tuple[float, int]]) -> None:
    levels = [(moment, float(value)) for moment, value in sorted(points)]
    kept = draw.thinned(levels, 100.0, points=20)
    assert max(value for _, value in kept) == max(value for _, value in levels)
    assert kept[-1] == levels[-1]
    assert set(kept) <= set(levels)


@given(st.lists(st.tuples(st.floats(0, 99), st.integers(0, 1000)), max_size=50))
def test_bins_lose_nothing(moves: list[tuple[float, int]]) -> None:
    total, levels = 0.0, []
    for moment, gained in sorted(moves):
        total += gained
        levels.append((moment, total))
    assert sum(draw.binned(levels, 99.0, 7)) == pytest.approx(total)


def test_what_moves_after_the_run_is_told_and_not_drawn_into_its_last_moment() -> None:
    memory = tiers.Memory(moved={"disk->host": [(1.0, 10), (11.0, 30), (50.0, 1030)]})
    strip = strips.moved(memory, "disk->host", 1.0, 10.0, draw.Scale(10.0), lambda size: f"{size:.0f} B")
    assert strip.top.startswith("20 B in 0.083") and strip.top.endswith("; 1000 B after the last call's end")


GOLDEN = ROOT / "tests" / "golden" / "memory_cancelled_and_wanted_again.jsonl"


def test_memory_is_told_by_its_own_journal() -> None:
    """A journal of the policy's tests: levels and sums are what the policy object itself reports at the end."""
    memory = tiers.read(GOLDEN)
    header, lines = journal.read(GOLDEN)
    policy = Policy(msgspec.json.decode(header.settings, type=Settings))
    for line in lines:
        policy.handle(msgspec.json.decode(line.event, type=Event), line.now)
    stats = policy.stats()
    assert not memory.stops
    for place, tier in stats["tiers"].items():
        assert memory.levels[-1].used_bytes[place] == tier["used_bytes"] <= memory.capacity_bytes[place]
    assert memory.moved_bytes == stats["moved_bytes"]
    assert memory.hit_blocks == stats["hit_blocks_by_tier"]


def test_what_a_simulation_noted_is_what_a_replay_finds(simulated: report.Run, tmp_path: Path) -> None:
    source = simulated.arms[1].directory / "memory.jsonl"
    shutil.copy(source, tmp_path / "memory.jsonl")
    noted, replayed = tiers.read(source), tiers.read(tmp_path / "memory.jsonl")
    assert levels.beside(source).exists()
    assert len(noted.levels) > 20
    assert (noted.levels, noted.stops) == (replayed.levels, replayed.stops)


def test_levels_that_are_damaged_say_so_and_what_to_do(simulated: report.Run, tmp_path: Path) -> None:
    source = simulated.arms[1].directory / "memory.jsonl"
    shutil.copy(source, tmp_path / "memory.jsonl")
    whole = levels.beside(source).read_bytes()
    levels.beside(tmp_path / "memory.jsonl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CallerError, match=r"memory\.levels\.json: .*Delete it"):
        tiers.read(tmp_path / "memory.jsonl")


def test_a_replay_that_would_cost_too_much_says_where_it_ends(
    simulated: report.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(simulated.arms[1].directory / "memory.jsonl", tmp_path)
    monkeypatch.setattr(levels, "VISITS", 200)
    cut, whole = tiers.read(tmp_path / "memory.jsonl"), tiers.read(simulated.arms[1].directory / "memory.jsonl")
    assert "are replayed" in cut.stops
    assert 0 < len(cut.levels) < len(whole.levels)
    assert (cut.moved, cut.hit_blocks) == (whole.moved, whole.hit_blocks)


def test_a_journal_that_decides_otherwise_says_where(tmp_path: Path) -> None:
    lines = GOLDEN.read_text().splitlines()
    lines[4] = lines[4].replace('"commands":[', '"commands":[{"type":"Wake","at_s":1.0},', 1).replace("},]", "}]")
    (tmp_path / "memory.jsonl").write_text("\n".join(lines) + "\n")
    assert "line 5 of memory.jsonl" in tiers.read(tmp_path / "memory.jsonl").stops


def test_what_is_no_journal_is_said(tmp_path: Path) -> None:
    for read in (calls.read, tiers.read, loads.read):
        with pytest.raises(CallerError, match=r"no\.jsonl"):
            read(tmp_path / "no.jsonl")
