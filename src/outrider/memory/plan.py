"""What to lift first and what to evict first. Pure: orders what it is given, changes nothing. Called by `policy.py`.

Source: ours, greedy by one density (seconds saved per byte-second held, `foresee.py`). Ties go to the block touched
earlier; within one request the deepest block was touched first, so leaves leave before their roots.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop

from outrider.memory.residency import Block
from outrider.wants import Want


def victims(blocks: Iterable[Block], worth: Callable[[Block], float]) -> Iterator[tuple[float, Block]]:
    """Blocks in the order in which they should leave a tier, with the worth of each: least first, then least touched.

    Costs one pass now and a logarithm per block taken; what became unevictable since is the caller's to skip.
    """
    heap = [(worth(block), block.touched, block.item, block) for block in blocks]
    heapify(heap)
    while heap:
        density, _, _, block = heappop(heap)
        yield density, block


def lifts(missing: Iterable[tuple[Want, int, str]]) -> list[tuple[Want, str]]:
    """Order of promotion: earliest deadline first, then most seconds saved, then along the path from its root.

    missing  (want, position on its path, item), an item once for every want that names it; the first place counts
    """
    best_first = sorted(missing, key=lambda entry: (entry[0].by_s, -entry[0].saved_s, entry[0].item, entry[1]))
    first: dict[str, tuple[Want, str]] = {}
    for want, _, item in best_first:
        first.setdefault(item, (want, item))
    return list(first.values())
