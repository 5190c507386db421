"""The demo's workload: a multi-agent code review of a real source tree. Decides what is asked, not when it is served.

    planner -> reviewers, one a file, each with a second turn after a tool ran -> reviser, a growing context
            -> tester -> summariser

Every agent that looks at a file begins with the same words, so that whoever looks second finds its KV blocks computed.
Tools are real (they read the file that is reviewed); how long they take is emulated, seeded by the agent's name.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from outrider.errors import CallerError

CODE = {".py", ".js", ".ts", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".java", ".rb", ".sh", ".md", ".toml"}
SYSTEM = "You are one of a team of careful engineers who review source code. Be concrete, name the lines, be brief."


@dataclass(frozen=True)
class Shape:
    """How big the review is. Characters: SmolLM2's tokenizer makes a token of about three of them."""

    workflows: int = 6
    reviewers: int = 3
    excerpt_chars: int = 1800
    tool_chars: int = 500
    reviser_turns: int = 3
    answer_tokens: int = 48  # at most; an answer ends with its first line
    pause_s: tuple[float, float] = (1.0, 4.0)
    arrival_gap_s: float = 0.5


QUICK = Shape(
    workflows=2,
    reviewers=2,
    excerpt_chars=1600,
    tool_chars=400,
    reviser_turns=3,
    answer_tokens=20,
    pause_s=(0.2, 0.6),
    arrival_gap_s=0.2,
)


@dataclass(frozen=True)
class Excerpt:
    """A piece of one real file, cut at line ends."""

    path: str
    first_line: int
    text: str

    @property
    def title(self) -> str:
        return f"{self.path} from line {self.first_line}"


@dataclass(frozen=True)
class Agent:
    """One conversation: what it is asked, turn by turn. Its answers are appended as they come.

    opening      what it looks at, before what other agents told it and the first ask
    pauses_s[i]  how long the tool before turn i takes; the first is 0
    """

    role: str
    name: str
    opening: str
    asks: tuple[str, ...]
    pauses_s: tuple[float, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Workflow:
    """One review: its agents in the order of the picture above, and when it starts."""

    name: str
    planner: Agent
    reviewers: tuple[Agent, ...]
    reviser: Agent
    tester: Agent
    summariser: Agent
    start_s: float

    @property
    def agents(self) -> tuple[Agent, ...]:
        return (self.planner, *self.reviewers, self.reviser, self.tester, self.summariser)

    @property
    def calls(self) -> int:
        return sum(len(agent.asks) for agent in self.agents)


def default_repo() -> tuple[Path, ...]:
    """The installed standard library's asyncio and json."""
    import asyncio
    import json

    return (Path(asyncio.__file__).parent, Path(json.__file__).parent)


def build(roots: tuple[Path, ...], shape: Shape) -> list[Workflow]:
    """Cut the tree into excerpts and give each workflow its own. Same tree and shape: same workload.

    Raises CallerError where a root is missing or has too little source.
    """
    excerpts = _excerpts(roots, shape)
    needed = shape.workflows * shape.reviewers
    if len(excerpts) < needed:
        where = ", ".join(str(root) for root in roots)
        raise CallerError(
            f"repo {where}: {len(excerpts)} pieces of source of {shape.excerpt_chars} characters found, "
            f"{needed} needed. Name a larger tree with --repo."
        )
    return [
        _workflow(number, excerpts[number * shape.reviewers : (number + 1) * shape.reviewers], shape)
        for number in range(shape.workflows)
    ]


def _excerpts(roots: tuple[Path, ...], shape: Shape) -> list[Excerpt]:
    """First pieces of all files, largest file first, then second pieces, and so on."""
    by_file: list[list[Excerpt]] = []
    for root in roots:
        if not root.is_dir():
            raise CallerError(f"repo {root}: no such directory. Name a source tree with --repo.")
        files = [
            path
            for path in sorted(root.rglob("*"))
            if path.suffix in CODE and path.is_file() and not _hidden(path, root)
        ]
        by_file += [list(_pieces(path, path.relative_to(root.parent), shape.excerpt_chars)) for path in files]
    by_file.sort(key=lambda pieces: (-len(pieces), pieces[0].path if pieces else ""))
    rounds = max((len(pieces) for pieces in by_file), default=0)
    return [pieces[i] for i in range(rounds) for pieces in by_file if i < len(pieces)]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)


def _pieces(path: Path, shown: Path, size: int) -> Iterator[Excerpt]:
    lines, first = [], 1
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        lines.append(line[:200])
        if sum(len(kept) + 1 for kept in lines) >= size:
            yield Excerpt(str(shown), first, "\n".join(lines)[:size])
            lines, first = [], number + 1


def _workflow(number: int, excerpts: list[Excerpt], shape: Shape) -> Workflow:
    name = f"review-{number}"

    def agent(role: str, opening: str, asks: list[str], which: str = "") -> Agent:
        own = f"{name}/{role}{which}"
        pauses = tuple(0.0 if i == 0 else _pause_s(f"{own}/{i}", shape.pause_s) for i in range(len(asks)))
        return Agent(role, own, opening, tuple(asks), pauses, shape.answer_tokens)

    listing = "\n".join(f"- {e.title}, {len(e.text.splitlines())} lines: {_outline(e)}" for e in excerpts)
    first, last = excerpts[0], excerpts[-1]
    doubt, mend = "Is it still a defect? What follows?", "Revise the change with this in mind."
    reviewers = tuple(
        agent("reviewer", _file(e), ["Name the most likely defect.", _tool(e, 0, shape, doubt)], f"-{i}")
        for i, e in enumerate(excerpts)
    )
    growth = [_tool(first, turn, shape, mend) for turn in range(1, shape.reviser_turns)]
    return Workflow(
        name,
        planner=agent("planner", f"Files:\n{listing}", ["Plan a review: what should each reviewer look for?"]),
        reviewers=reviewers,
        reviser=agent("reviser", _file(first), ["Propose one small change that mends it.", *growth]),
        tester=agent("tester", _file(last), ["Write one test that would fail today."]),
        summariser=agent("summariser", f"Files:\n{listing}", ["Summarise the review for the owner of these files."]),
        start_s=number * shape.arrival_gap_s,
    )


def _file(excerpt: Excerpt) -> str:
    """Agents that look at the same file begin with the same words."""
    return f"{excerpt.title}:\n```\n{excerpt.text}\n```"


def _tool(excerpt: Excerpt, turn: int, shape: Shape, ask: str) -> str:
    """What a tool says of the excerpt: turn by turn its outline, its calls, its longest lines, a search."""
    lines = excerpt.text.splitlines()
    reports = (
        ("outline", _outline(excerpt)),
        (
            "grep raise|return|except",
            "\n".join(f"{i}: {line}" for i, line in enumerate(lines, 1) if re.search(r"raise|return|except", line)),
        ),
        ("longest lines", "\n".join(sorted(lines, key=lambda line: (-len(line), line))[:12])),
        ("names", " ".join(sorted(set(re.findall(r"[A-Za-z_]{4,}", excerpt.text))))),
    )
    tool, report = reports[turn % len(reports)]
    return f"The tool `{tool}` says of {excerpt.path}:\n{report[: shape.tool_chars]}\n{ask}"


def _outline(excerpt: Excerpt) -> str:
    """Names defined in the excerpt: by the parser where it parses, by pattern where it was cut."""
    try:
        tree = ast.parse(excerpt.text)
    except SyntaxError:
        return ", ".join(re.findall(r"(?:def|class|func|fn)\s+(\w+)", excerpt.text)) or "no definitions"
    named = [
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return ", ".join(named) or "no definitions"


def _pause_s(name: str, bounds: tuple[float, float]) -> float:
    """A tool's emulated duration, the same for the same agent and turn in every run."""
    share = int.from_bytes(blake2b(name.encode(), digest_size=4).digest()) / 2**32
    return bounds[0] + share * (bounds[1] - bounds[0])
