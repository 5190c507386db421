"""The published traces, whole: their stated totals, and what their own numbers say of our reading."""

import json
import lzma
import resource
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from outrider.lab.traces import Workload, read
from outrider.lab.traces.runs import length, shared

ROOT = Path(__file__).parents[3]
Real = Callable[[str], Path]
CLAUDE = "agentic-claude-code/traces.jsonl.xz"


def counted(workload: Workload) -> tuple[int, int, int, int]:
    """Workflows, calls, prompt tokens, output tokens; every block is checked on the way."""
    calls = list(workload.calls)
    for call in calls:
        assert length(call.prompt) == call.prompt_tokens // workload.block_tokens
        assert length(call.chain) == (call.prompt_tokens + call.output_tokens) // workload.block_tokens
    tokens = sum(call.prompt_tokens for call in calls), sum(call.output_tokens for call in calls)
    return len(workload.workflows), len(calls), *tokens


def rows() -> list[tuple[str, ...]]:
    """The table of docs/traces.md."""
    page = (ROOT / "docs" / "traces.md").read_text()
    cells = [[cell.strip(" `").replace(",", "") for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    return [tuple(row) for row in cells if len(row) == 8 and "/" in row[0]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_page_tells_what_is_read(real: Real, row: tuple[str, ...]) -> None:
    name, format, *numbers, starts = row
    workload = read(real(name), seed=1)
    assert [format, *map(int, numbers)] == [workload.format, *counted(workload), workload.block_tokens]
    assert starts == ("trace" if read(real(name), seed=2).workflows == workload.workflows else "drawn")


@pytest.mark.parametrize(
    ("name", "workflows", "calls"),
    [
        (CLAUDE, 485, 31_023 + 370),  # main requests, and those of 35 sub-agents
        ("chatdev-calls/calls.jsonl.xz", 42, 952),
        ("tau2-calls/gpt41_telecom.jsonl.xz", 40, 1_509),
        ("tau2-calls/gpt41_retail.jsonl.xz", 40, 766),
        ("tau2-calls/gpt41_telecom_no-user.jsonl.xz", 40, 606),
        ("mooncake/conversation_trace.jsonl.xz", 12_031, 12_031),
        ("azure-llm-2023/AzureLLMInferenceTrace_conv.csv.xz", 19_366, 19_366),
    ],
)
def test_totals_are_those_that_the_source_states(real: Real, name: str, workflows: int, calls: int) -> None:
    """As SOURCE.md beside each file counts them."""
    assert rows() and counted(read(real(name)))[:2] == (workflows, calls)


def test_claude_code_tokens_are_those_that_the_sessions_state(real: Real) -> None:
    """Each session of the file says how many tokens its requests have."""
    with lzma.open(real(CLAUDE), "rt") as file:
        totals = [json.loads(line)["totals"]["combined_tokens"] for line in file]
    for flow, total in zip(read(real(CLAUDE)).workflows, totals, strict=True):
        assert sum(call.prompt_tokens for call in flow.calls) == total["input"]
        assert sum(call.output_tokens for call in flow.calls) == total["output"]


@pytest.mark.parametrize(
    ("name", "span_s"),
    [("mooncake/conversation_trace.jsonl.xz", 3537), ("azure-llm-2023/AzureLLMInferenceTrace_conv.csv.xz", 3502)],
)
def test_the_span_is_the_one_that_the_source_states(real: Real, name: str, span_s: int) -> None:
    assert round(read(real(name)).workflows[-1].start_s) == span_s


def test_claude_code_is_read_fast_and_small(real: Real) -> None:
    """4 billion prompt tokens are runs, never lists. Bounds are wide: other work may share the machine."""
    path = real(CLAUDE)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.process_time()
    read(path)
    assert time.process_time() - began_s < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 500 * 1024


def test_claude_code_prompts_go_on_from_each_other_as_measured_apart(real: Real) -> None:
    """96.1% of the prompts' tokens are a prefix of the prompt before; 35 sub-agents, each launched by an answer."""
    workload = read(real(CLAUDE))
    same = total = 0
    agents: Counter[str] = Counter()
    awaited: set[str] = set()
    for flow in workload.workflows:
        main = [call for call in flow.calls if call.role == "main"]
        for before, call in zip([None, *main], main, strict=False):
            same += shared(before.prompt, call.prompt) if before else 0
            total += length(call.prompt)
        lanes = {call.id: call.id.rpartition("/")[0] for call in flow.calls if call.role != "main"}
        agents.update(set(lanes.values()))
        awaited |= {lanes[parent] for call in main for parent in call.parents if parent in lanes}
        for call in flow.calls:
            if call.role != "main" and call.id.endswith("/0") and flow.name != "trace_0004":
                assert call.after_s <= 1.0  # t is a sub-agent's end: it began as the answer that launched it ended
    assert same / total == pytest.approx(0.961, abs=0.002)
    assert len(agents) == 35
    assert len(awaited) == 35 - 4 - 2  # 4 ran in the background, 2 are the last that their session did


def test_tau2_roles_and_tools(real: Real) -> None:
    calls = list(read(real("tau2-calls/gpt41_retail.jsonl.xz")).calls)
    assert Counter(call.role for call in calls) == {"agent": 476, "user_sim": 290}
    assert Counter(call.stage for call in calls if call.role == "agent") == {"after tool": 226, "after message": 250}
    agent = [call for call in calls if call.role == "agent"]
    reused = [shared(before.chain, call.prompt) for before, call in pairwise(agent)]
    assert min(reused) > 150  # every session of the file has the same policy: some 3,000 tokens


def test_chatdev_phases(real: Real) -> None:
    workload = read(real("chatdev-calls/calls.jsonl.xz"))
    stages = Counter(call.stage for call in workload.calls)
    assert {"DemandAnalysis", "Coding", "CodeReviewComment", "CodeReviewModification"} <= set(stages)
    assert all(call.parents == () for flow in workload.workflows for call in flow.calls[:1])
    assert all(len(call.parents) == 1 for flow in workload.workflows for call in flow.calls[1:])
