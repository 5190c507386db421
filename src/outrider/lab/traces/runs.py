"""Block ids as runs of consecutive ids: what keeps a trace of three billion prompt tokens in memory. Pure.

Ids are prefix-chained: an id stands for a block and everything before it, so two sequences share KV exactly as far as
their leading ids are equal. `((7, 3), (20, 1))` is 7, 8, 9, 20. The same ids may be cut into runs in several ways;
`join` gives the one with the fewest runs, and every other function takes any cut and counts blocks, not runs.
"""

from collections.abc import Iterable, Iterator

Run = tuple[int, int]  # first id, how many (at least 1)
Runs = tuple[Run, ...]


def length(runs: Runs) -> int:
    """How many blocks."""
    return sum(count for _, count in runs)


def join(*parts: Iterable[Run]) -> Runs:
    """The parts one after the other, with as few runs as their ids allow; empty runs vanish."""
    joined: list[Run] = []
    for part in parts:
        for first, count in part:
            if not count:
                continue
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((first, count))
    return tuple(joined)


def head(runs: Runs, blocks: int) -> Runs:
    """The first `blocks` blocks, or all there are."""
    kept: list[Run] = []
    left = blocks
    for first, count in runs:
        if left <= 0:
            break
        kept.append((first, min(count, left)))
        left -= count
    return tuple(kept)


def tail(runs: Runs, blocks: int) -> Runs:
    """What follows the first `blocks` blocks."""
    kept: list[Run] = []
    skip = max(blocks, 0)
    for first, count in runs:
        if skip < count:
            kept.append((first + skip, count - skip))
        skip = max(skip - count, 0)
    return tuple(kept)


def shared(left: Runs, right: Runs) -> int:
    """How many leading blocks are equal: what a prefix cache that holds the one can give to the other."""
    same = i = j = 0
    skip_i = skip_j = 0  # blocks of left[i], right[j] already compared
    while i < len(left) and j < len(right):
        if left[i][0] + skip_i != right[j][0] + skip_j:
            return same
        step = min(left[i][1] - skip_i, right[j][1] - skip_j)
        same, skip_i, skip_j = same + step, skip_i + step, skip_j + step
        if skip_i == left[i][1]:
            i, skip_i = i + 1, 0
        if skip_j == right[j][1]:
            j, skip_j = j + 1, 0
    return same


def expand(runs: Runs) -> Iterator[int]:
    """Every id in order. For short sequences: a prompt of 100,000 tokens is over a thousand blocks."""
    for first, count in runs:
        yield from range(first, first + count)


def collect(ids: Iterable[int]) -> Runs:
    """The runs of a list of ids. One plain loop: a published session lists half a million."""
    runs: list[Run] = []
    begin = after = 0  # of the run under way; empty where they are equal
    for block in ids:
        if block != after or begin == after:
            if begin != after:
                runs.append((begin, after - begin))
            begin = block
        after = block + 1
    if begin != after:
        runs.append((begin, after - begin))
    return tuple(runs)
