"""Azure and Mooncake: a request is a workflow of one call, with the blocks that its trace can prove."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.lab.traces import read
from outrider.lab.traces.runs import expand, length, shared

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
ROWS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 5000), st.integers(0, 900)), min_size=1, max_size=12)


@FIXTURE
@given(ROWS)
def test_azure_comes_back_with_blocks_of_its_own(write: Any, rows: list[tuple[int, int, int]]) -> None:
    origin = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC)
    rows = sorted(rows)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens\r"]
    for at_ms, prompt, output in rows:
        stamp = (origin + timedelta(milliseconds=at_ms)).strftime("%Y-%m-%d %H:%M:%S.%f")
        lines.append(f"{stamp}0,{prompt},{output}\r")
    workload = read(write(lines))
    assert [(c.prompt_tokens, c.output_tokens) for c in workload.calls] == [row[1:] for row in rows]
    starts = [(at - rows[0][0]) / 1000 for at, _, _ in rows]
    assert [flow.start_s for flow in workload.workflows] == pytest.approx(starts, abs=2e-6)
    blocks = [block for call in workload.calls for block in expand(call.chain)]
    assert len(blocks) == len(set(blocks))
    for call in workload.calls:
        assert length(call.prompt) == call.prompt_tokens // 16
        assert length(call.chain) == (call.prompt_tokens + call.output_tokens) // 16


def test_azure_reads_other_column_orders_and_zones(write: Any) -> None:
    lines = [
        "GeneratedTokens,TIMESTAMP,Extra,ContextTokens",
        "5,2024-05-10 00:00:00.009930+00:00,x,100",
        "6,2024-05-10 02:00:01.009930+02:00,x,200",
    ]
    workload = read(write(lines))
    assert [(c.prompt_tokens, c.output_tokens) for c in workload.calls] == [(100, 5), (200, 6)]
    assert workload.workflows[1].start_s == pytest.approx(1.0)
    with pytest.raises(CallerError, match="no call"):
        read(write(lines[:1]))
    for bad, says in (("5,yesterday,x,1", "line 2"), ("5", "line 2"), ("5,2024-05-10,x,1.5", "line 2")):
        with pytest.raises(CallerError, match=says):
            read(write([lines[0], bad]))


PROMPTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 511), st.integers(0, 2000)), min_size=1, max_size=10
)


@FIXTURE
@given(PROMPTS, st.integers(0, 2**62))
def test_mooncakes_prompts_share_as_their_hashes_do(write: Any, rows: list[tuple], base: int) -> None:
    """Prompts keep some blocks of the one before and add some; hashes may be any numbers."""
    hashes, lines, fresh = list[int](), [], base
    for number, (kept, new, spare, out) in enumerate(rows):
        hashes = [*hashes[:kept], *range(fresh, fresh + new)]
        fresh += new + 1
        partial = [10**19 + number] if spare else []
        tokens = 512 * len(hashes) + spare
        lines.append(
            {"timestamp": 10 * number, "input_length": tokens, "output_length": out, "hash_ids": hashes + partial}
        )
    calls = list(read(write(lines)).calls)
    fronts = [line["hash_ids"][: line["input_length"] // 512] for line in lines]
    for call, line, front in zip(calls, lines, fronts, strict=True):
        assert (call.prompt_tokens, call.output_tokens) == (line["input_length"], line["output_length"])
        assert length(call.prompt) == len(front)
        for other, theirs in zip(calls, fronts, strict=True):
            same = next((n for n, (a, b) in enumerate(zip(front, theirs, strict=False)) if a != b), None)
            expected = min(len(front), len(theirs)) if same is None else same
            assert shared(call.prompt, other.prompt) == expected
            outputs = set(expand(call.chain)) - set(expand(call.prompt))
            assert other is call or not outputs & set(expand(other.chain))


def test_mooncake_refuses_a_count_that_does_not_fit(write: Any, samples: dict[str, list]) -> None:
    wrong = {**samples["mooncake"][0], "hash_ids": [0, 1]}
    with pytest.raises(CallerError, match="line 2: 2 hash_ids, 3 blocks of 512 tokens"):
        read(write([samples["mooncake"][0], wrong]))
