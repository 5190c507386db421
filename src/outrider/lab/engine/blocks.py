"""The paged KV cache's books: which block is free, who holds it, whose content it has. Pure; bytes live in forward.py.

A block is held (refs > 0) or free; a free block keeps its content and its key until it is taken for something else,
least recently released first. So used + free = capacity always (law 2), and a held block is never handed out.
Holders release a chain back to front: a prefix outlives what stands on it.
"""

from collections import OrderedDict
from collections.abc import Sequence


class Blocks:
    """Reference counts, content keys and the free list of `capacity` blocks of `block_tokens` tokens."""

    def __init__(self, capacity: int, block_tokens: int) -> None:
        self.capacity, self.block_tokens = capacity, block_tokens
        self.refs = [0] * capacity
        self.key_of: list[bytes | None] = [None] * capacity
        self.by_key: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))  # first = taken first

    def count_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the leading run of keys whose content is here. Holds nothing: call `hold` before anything else."""
        found = []
        for key in keys:
            if (block := self.by_key.get(key)) is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each."""
        for block in blocks:
            self.refs[block] += 1
            self.free.pop(block, None)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, held once, their old content forgotten. The caller checks `len(free)` first."""
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            if (key := self.key_of[block]) is not None:
                del self.by_key[key]
                self.key_of[block] = None
            self.refs[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a chain; free blocks without a key are taken again first."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free[block] = None
                if self.key_of[block] is None:
                    self.free.move_to_end(block, last=False)

    def name(self, block: int, key: bytes) -> int:
        """The held `block` now has the content of `key`. Returns the block to use from now on.

        If that content is here already, the older block is held in its place and this one released, so that every
        chain of held or free content stands on named blocks (prefix closure) and equal content is kept once.
        """
        twin = self.by_key.get(key)
        if twin is None:
            self.by_key[key], self.key_of[block] = block, key
            return block
        if twin != block:
            self.hold([twin])
            self.release([block])
        return twin

    def check(self) -> None:
        """Tests call it after every step: the books agree with one another."""
        held = {block for block, refs in enumerate(self.refs) if refs > 0}
        assert min(self.refs) >= 0
        assert held.isdisjoint(self.free)
        assert len(held) + len(self.free) == self.capacity
        assert all(self.key_of[block] == key for key, block in self.by_key.items())
        assert len(self.by_key) == sum(key is not None for key in self.key_of)
