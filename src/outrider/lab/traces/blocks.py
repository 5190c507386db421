"""Block ids for prompts that a trace does not number: fresh ones, and shared ones for equal beginnings. Pure.

    pieces   system | message | message ...     what a prompt is made of, front to back; equal fronts share blocks
    tokens   0 .. 41 .. 180 .... 233            where each piece ends: set once, by the first prompt that has it
    ids        0 1  2 ... 10  11 12 13          a block belongs to the piece in which it ends

A trace tells a whole prompt's tokens, seldom a piece's: the tokens of what a prompt has new are spread over its new
pieces by weight (characters). So the next prompt of a conversation begins exactly where the last one ended.
"""

from collections.abc import Hashable, Iterable

from outrider.lab.traces.runs import Run, Runs, head, join, length, shared

Piece = tuple[Hashable, int]  # what it is, and its weight


class Ids:
    """Hands out ids that nobody has yet, consecutive ones at a time."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, blocks: int) -> Runs:
        """`blocks` fresh ids as at most one run."""
        first, self.next = self.next, self.next + max(blocks, 0)
        return ((first, blocks),) if blocks > 0 else ()


class _Node:
    """One piece after certain others: where it ends, the blocks that end in it, what has followed it."""

    __slots__ = ("after", "end_tokens", "runs")

    def __init__(self, end_tokens: int, runs: Runs) -> None:
        self.end_tokens = end_tokens
        self.runs = runs
        self.after: dict[Hashable, _Node] = {}


class PrefixTree:
    """All prompts laid so far."""

    def __init__(self, block_tokens: int, ids: Ids) -> None:
        self._block_tokens = block_tokens
        self._ids = ids
        self._root = _Node(0, ())

    def lay(self, pieces: Iterable[Piece], tokens: int) -> Runs:
        """Ids of the whole blocks of a prompt of `tokens` tokens: exactly tokens // block_tokens of them.

        A prompt with fewer tokens than its known pieces were given keeps the first blocks of them.
        """
        node, runs = self._root, list[Run]()
        rest = list(pieces)
        for known, (what, _) in enumerate(rest):
            if what not in node.after:
                del rest[:known]
                break
            node = node.after[what]
            runs += node.runs
        else:
            rest.clear()
        begin, weight, weights = node.end_tokens, 0, sum(weight for _, weight in rest)
        for number, (what, own) in enumerate(rest, start=1):
            weight += own
            share = 1.0 if number == len(rest) else weight / weights if weights else 0.0
            node = self._grow(node, what, begin + round(max(tokens - begin, 0) * share))
            runs += node.runs
        whole = tokens // self._block_tokens
        laid = head(join(runs), whole)
        return join(laid, self._ids.take(whole - length(laid)))

    def _grow(self, node: _Node, what: Hashable, end_tokens: int) -> _Node:
        blocks = end_tokens // self._block_tokens - node.end_tokens // self._block_tokens
        node.after[what] = _Node(end_tokens, self._ids.take(blocks))
        return node.after[what]


def answered(prompt: Runs, following: Runs, blocks: int, ids: Ids) -> Runs:
    """The first `blocks` blocks of prompt and output: a call's `chain`.

    following   the next prompt of the same conversation: where it begins with the whole of `prompt`, what comes after
                are the output's blocks. Where it does not, or is too short, the output's blocks are fresh.
    """
    known = head(following, blocks) if shared(prompt, following) == length(prompt) else prompt
    return join(known, ids.take(blocks - length(known)))


def moved(runs: Iterable[Run], by: int) -> Runs:
    """The same runs with ids that are `by` higher: how a session's own ids become the workload's."""
    return join((first + by, count) for first, count in runs)
