"""The door: formats by content, arrivals by seed and rate, one sentence for every kind of bad file, no text kept."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import CallerError
from outrider.lab.traces import FORMATS, read
from outrider.lab.traces.draft import PER_SECOND

UNTIMED = {"claude-code", "chatdev"}


@pytest.mark.parametrize("packed", [False, True])
def test_each_format_is_known_by_its_content(sample: tuple[str, list], write: Any, packed: bool) -> None:
    name, lines = sample
    other = next(format for format in FORMATS if format != name)
    workload = read(write(lines, packed, f"{other}.csv.txt"))
    assert workload.format == name
    assert workload.block_tokens in {16, 64, 512}
    assert all(call.prompt_tokens > 0 for call in workload.calls)
    assert workload == read(write(lines, not packed, f"{other}.csv.txt"))


def test_a_format_may_be_named(sample: tuple[str, list], write: Any) -> None:
    name, lines = sample
    assert read(write(lines), format=name) == read(write(lines))
    with pytest.raises(CallerError, match="not known") as refused:
        read(write(lines), format="vidur")
    assert all(known in str(refused.value) for known in FORMATS)
    other = "azure" if name != "azure" else "mooncake"
    with pytest.raises(CallerError, match="line 1: "):
        read(write(lines), format=other)


@pytest.mark.parametrize("line", ['{"hello": 1}', "[1, 2]", "plain words", "\x00\x01", '{"run": 1, "seq": 2'])
def test_a_file_of_no_known_format_names_those_there_are(write: Any, line: str) -> None:
    with pytest.raises(CallerError, match="no known trace format") as refused:
        read(write([line]))
    assert all(known in str(refused.value) for known in FORMATS)


def test_an_empty_file_is_said_to_be_empty(write: Any) -> None:
    with pytest.raises(CallerError, match="is empty"):
        read(write([]))
    with pytest.raises(CallerError, match="is empty"):
        read(write([], packed=True))


@pytest.mark.parametrize("bad", ["{", "garbage", '{"kind": "song", "type": "x"}', '"text"'])
def test_a_malformed_line_is_named_by_its_number(sample: tuple[str, list], write: Any, bad: str) -> None:
    _, lines = sample
    lines.insert(len(lines) - 1, bad)
    with pytest.raises(CallerError, match=rf"line {len(lines) - 1}: .*--format"):
        read(write(lines))


def test_negative_numbers_are_malformed(write: Any, samples: dict[str, list]) -> None:
    edits = {
        "mooncake": (1, "output_length", -1),
        "chatdev": (1, "in_tok", -5),
        "tau2": (3, "out_tok", -5),
    }
    for name, (index, key, value) in edits.items():
        lines = [dict(line) for line in samples[name]]
        lines[index][key] = value
        with pytest.raises(CallerError, match=rf"line {index + 1}: "):
            read(write(lines))
    azure = [*samples["azure"], "2023-11-16 18:15:51.0,-4,3"]
    with pytest.raises(CallerError, match="line 4: a negative number"):
        read(write(azure))
    session = json.loads(json.dumps(samples["claude-code"][0]))
    session["requests"][1]["out"] = -1
    with pytest.raises(CallerError, match="line 1: "):
        read(write([session]))


def test_no_text_is_kept(sample: tuple[str, list], write: Any) -> None:
    name, lines = sample
    kept = json.dumps(asdict(read(write(lines))))
    assert "launch code" not in kept and "4711" not in kept
    if name in {"chatdev", "tau2"}:
        assert "4711" in json.dumps(lines)  # there was some


def test_arrivals_are_drawn_from_the_seed_where_there_are_none(sample: tuple[str, list], write: Any) -> None:
    name, lines = sample
    path = write(lines)
    if name in UNTIMED:
        assert any(f"{PER_SECOND:.6g} a second, drawn with seed 3" in note for note in read(path, seed=3).notes)
    else:
        assert any("start as the trace says" in note for note in read(path).notes)
        assert read(path, seed=1).workflows == read(path, seed=2).workflows
    assert read(path, seed=5) == read(path, seed=5)


def test_the_same_seed_gives_the_same_arrivals_and_a_limit_cuts_the_end(write: Any, samples: dict[str, list]) -> None:
    lines = [{**samples["claude-code"][1], "id": f"s{n}"} for n in range(400)]
    path = write(lines)
    starts = [flow.start_s for flow in read(path, seed=1, rate=2.0).workflows]
    assert starts == [flow.start_s for flow in read(path, seed=1, rate=2.0).workflows]
    assert starts != [flow.start_s for flow in read(path, seed=2, rate=2.0).workflows]
    assert starts[0] == 0.0 and starts == sorted(starts)
    assert 0.8 < starts[-1] / (399 / 2.0) < 1.2  # a mean of 399 gaps: five standard errors are 25%
    gaps = [b - a for a, b in pairwise(starts)]
    assert 0.3 < sum(gap > 0.5 for gap in gaps) / 399 < 0.44  # exponential: 1/e of them above the mean
    some = read(path, seed=1, rate=2.0, limit=10)
    assert [flow.start_s for flow in some.workflows] == starts[:10]
    assert some.workflows == read(path, seed=1, rate=2.0).workflows[:10]
    assert any("first 10 workflows" in note for note in some.notes)
    assert [flow.start_s for flow in read(path, seed=1, rate=4.0).workflows] == pytest.approx([s / 2 for s in starts])


def test_a_rate_stretches_the_traces_own_arrivals(write: Any, samples: dict[str, list]) -> None:
    stamps = [900, 0, 100, 400]  # out of order
    lines = [{**samples["mooncake"][0], "timestamp": stamp} for stamp in stamps]
    path = write(lines)
    assert [flow.start_s for flow in read(path).workflows] == [0.0, 0.1, 0.4, 0.9]
    stretched = read(path, rate=1.0)  # 3 gaps in 3 s
    assert [flow.start_s for flow in stretched.workflows] == pytest.approx([0.0, 1 / 3, 4 / 3, 3.0])
    assert [flow.name for flow in stretched.workflows] == [f"request-{n}" for n in (1, 2, 3, 0)]
    assert read(path, rate=1.0, limit=2).workflows == stretched.workflows[:2]
    at_once = read(write(lines[:1] * 3), rate=1.0)
    assert [flow.start_s for flow in at_once.workflows] == [0.0] * 3
    assert any("no rate can be reached" in note for note in at_once.notes)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"rate": 0.0}, {"rate": -1.0}, {"rate": float("nan")}])
def test_arguments_are_checked(write: Any, samples: dict[str, list], wrong: dict[str, Any]) -> None:
    with pytest.raises(CallerError, match=next(iter(wrong))):
        read(write(samples["azure"]), **wrong)


def test_progress_ends_with_the_whole_file(sample: tuple[str, list], write: Any) -> None:
    path: Path = write(sample[1])
    seen: list[tuple[int, int]] = []
    read(path, progress=lambda at, total: seen.append((at, total)))
    assert seen[-1] == (path.stat().st_size,) * 2
