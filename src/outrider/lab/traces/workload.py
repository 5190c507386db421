"""What a trace asks of a cluster: workflows of calls, when each may start, how long it is, what KV it shares. Pure.

Written by the readers of this folder, whatever the trace's format; run by the simulator. A call starts `after_s` after
the last of its parents was answered, or after its workflow's start where it has none: think time or tool time is the
trace's, service time is the simulator's. Blocks hold `block_tokens` tokens; ids are unique in the whole workload and
prefix-chained (runs.py), and only whole blocks have one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from outrider.errors import CallerError
from outrider.lab.traces.runs import Runs, length, shared


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    parents  ids of calls of the same workflow that must be answered first, listed before this one; () = none
    after_s  seconds from the last parent's answer, or from the workflow's start
    prompt   the prompt's whole blocks; its partial last block is left out
    chain    the whole blocks of prompt and output, beginning with `prompt`: what a prefix cache may hold afterwards
    """

    id: str
    role: str
    stage: str
    parents: tuple[str, ...]
    after_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: Runs
    chain: Runs
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Workflow:
    """All calls for one goal, parents before children. start_s counts from the workload's start."""

    name: str
    start_s: float
    calls: tuple[Call, ...]
    klass: str = ""
    deadline_s: float | None = None  # after start_s


@dataclass(frozen=True, slots=True)
class Workload:
    """A whole trace; workflows by start. `notes` say in plain words what was assumed and what was left out."""

    format: str
    source: str
    block_tokens: int
    workflows: tuple[Workflow, ...]
    notes: tuple[str, ...]

    @property
    def calls(self) -> Iterator[Call]:
        return (call for workflow in self.workflows for call in workflow.calls)

    def check(self) -> "Workload":
        """Itself, when it is whole; CallerError naming the first call that is not. Readers call it last."""
        if self.block_tokens < 1:
            raise CallerError(f"{self.source}: blocks of {self.block_tokens} tokens. A block holds at least one.")
        names: set[str] = set()
        ids: set[str] = set()
        last_s = 0.0
        for workflow in self.workflows:
            where = f"{self.source}: workflow {workflow.name!r}"
            _require(workflow.name not in names, where, "appears twice")
            _require(bool(workflow.calls), where, "has no call")
            _require(_time(workflow.start_s) and workflow.start_s >= last_s, where, "starts before the one before it")
            _require(workflow.deadline_s is None or _time(workflow.deadline_s), where, "has a negative deadline")
            names.add(workflow.name)
            last_s = workflow.start_s
            above: set[str] = set()
            for call in workflow.calls:
                _check(call, above, self.block_tokens, f"{self.source}: call {call.id!r} of {workflow.name!r}")
                _require(call.id not in ids, where, f"has a second call {call.id!r}")
                ids.add(call.id)
                above.add(call.id)
        return self


def _check(call: Call, above: set[str], block_tokens: int, where: str) -> None:
    for parent in call.parents:
        _require(parent in above, where, f"waits for {parent!r}, which is not listed above it in its workflow")
    _require(len(set(call.parents)) == len(call.parents), where, "names a parent twice")
    _require(_time(call.after_s), where, f"starts {call.after_s} s after its parents")
    _require(call.prompt_tokens >= 0 and call.output_tokens >= 0, where, "has a negative number of tokens")
    _require(call.max_tokens is None or call.max_tokens >= 0, where, "has a negative max_tokens")
    _require(all(first >= 0 and count >= 1 for first, count in call.chain), where, "has an empty or negative run")
    prompt, chain = length(call.prompt), length(call.chain)
    _require(prompt <= call.prompt_tokens // block_tokens, where, f"has {prompt} prompt blocks, more than whole ones")
    whole = (call.prompt_tokens + call.output_tokens) // block_tokens
    _require(chain <= whole, where, f"has {chain} blocks afterwards, more than {whole} whole ones")
    _require(shared(call.prompt, call.chain) == prompt, where, "has a chain that does not begin with its prompt")


def _time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise CallerError(f"{where} {what}. The trace or its reader is at fault.")
