"""Reader of ChatDev's calls: JSONL, one call a line, runs of a chain of two-role chats. Texts are not kept.

A run is a workflow, a chat's phase the stage. Each call's parent is the call before it. What a speaker is shown grows
inside a chat: system prompt, then message and answer by turns; so its prompts share blocks, and equal beginnings of
prompts do across chats and runs (system prompts, instructions of a phase).
"""

from datetime import datetime
from typing import Annotated

import msgspec

from outrider.lab.traces.blocks import Ids, Piece, PrefixTree, answered
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.runs import Runs
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

KEYS = ("run", "seq", "chat", "phase", "in_tok", "out_tok")
BLOCK_TOKENS = 16
PIECE_CHARS = 64  # a block is about as many characters
CHARS_PER_TOKEN = 4.7  # of a system prompt: the trace counts tokens of whole prompts only
Count = Annotated[int, msgspec.Meta(ge=0)]


class Line(msgspec.Struct):
    """One call. Times are local, in whole seconds; the sent one is often missing."""

    run: str
    seq: Count
    chat: int
    phase: str
    role: str
    in_tok: Count
    out_tok: Count
    parent: int | None = None
    system: str | None = ""
    prompt: str | None = ""
    completion: str | None = ""
    t_send: datetime | None = None
    t_recv: datetime | None = None


class _Run:
    """A run under way: its calls, when each was answered, what each speaker of each chat has been shown."""

    def __init__(self) -> None:
        self.lines: dict[int, tuple[Line, Runs]] = {}
        self.shown: dict[tuple[int, str], list[Piece]] = {}
        self.following: dict[tuple[int, str], int] = {}  # speaker of a chat -> its last call
        self.next: dict[int, int] = {}  # call -> the next one of the same conversation


def read(source: Source, limit: int | None) -> Draft:
    """Every run a workflow, in the order of the file."""
    ids = Ids()
    tree, runs = PrefixTree(BLOCK_TOKENS, ids), dict[str, _Run]()
    decoder = msgspec.json.Decoder(Line)
    for number, raw in source.lines():
        line = source.decode(number, raw, decoder)
        if line.run not in runs and len(runs) == limit:
            continue
        run = runs.setdefault(line.run, _Run())
        if line.seq in run.lines:
            raise source.fault(number, f"a second call {line.seq} of run {line.run!r}")
        if line.parent is not None and line.parent not in run.lines:
            raise source.fault(number, f"its parent {line.parent} does not come before it in run {line.run!r}")
        _enter(run, line, tree)
    unsent = sum(
        line.parent is not None and line.t_send is None for run in runs.values() for line, _ in run.lines.values()
    )
    notes = (
        f"{unsent} calls do not tell when they were sent: they start when their parent is answered; times are whole "
        "seconds",
        f"blocks of {BLOCK_TOKENS} tokens are shared where texts begin alike; a piece's tokens are its characters' "
        "share of the prompt's count",
    )
    return Draft(BLOCK_TOKENS, [_workflow(name, run, ids) for name, run in runs.items()], False, notes)


def _enter(run: _Run, line: Line, tree: PrefixTree) -> None:
    speaker = (line.chat, line.role)
    system = _pieces("system", line.system)
    tree.lay(system, round(sum(chars for _, chars in system) / CHARS_PER_TOKEN))
    shown = run.shown.setdefault(speaker, system)
    shown += _pieces("shown", line.prompt)
    run.lines[line.seq] = (line, tree.lay(shown, line.in_tok))
    shown += _pieces("said", line.completion)
    if speaker in run.following:
        run.next[run.following[speaker]] = line.seq
    run.following[speaker] = line.seq


def _pieces(kind: str, text: str | None) -> list[Piece]:
    """A message as pieces that equal messages share from their beginning; at least one, to carry its tokens."""
    said = text or ""
    cut = [said[start : start + PIECE_CHARS] for start in range(0, max(len(said), 1), PIECE_CHARS)]
    return [((kind, piece) if n == 0 else piece, len(piece)) for n, piece in enumerate(cut)]


def _workflow(name: str, run: _Run, ids: Ids) -> Workflow:
    calls: list[Call] = []
    for seq, (line, prompt) in run.lines.items():
        parents: tuple[str, ...] = ()
        after_s = 0.0
        if line.parent is not None:
            parents = (f"{name}/{line.parent}",)
            after_s = _gap_s(run.lines[line.parent][0].t_recv, line.t_send)
        following = run.lines[run.next[seq]][1] if seq in run.next else ()
        blocks = (line.in_tok + line.out_tok) // BLOCK_TOKENS
        chain = answered(prompt, following, blocks, ids)
        lengths = line.in_tok, line.out_tok
        calls.append(Call(f"{name}/{seq}", line.role, line.phase, parents, after_s, *lengths, prompt, chain))
    return Workflow(name, 0.0, tuple(calls))


def _gap_s(answered_at: datetime | None, sent_at: datetime | None) -> float:
    if answered_at is None or sent_at is None:
        return 0.0
    return max((sent_at - answered_at).total_seconds(), 0.0)
