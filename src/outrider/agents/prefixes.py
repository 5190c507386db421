"""Which prompt prefixes are believed to lie where: an LRU of prompt pieces, bounded in tokens. Pure; policy's.

    chain   d1 -> d2 -> d3      each digest covers everything before it, so d3 present means "the same prompt up to d3"
    LRU     a chain is touched tail first: its end is forgotten before its beginning, as an engine's radix cache does

It is a belief: an engine may have evicted earlier. A wrong belief costs a prefill, never an answer.
"""

from collections import OrderedDict
from collections.abc import Sequence

from outrider.agents.events import Link


class Prefixes:
    """Pieces believed resident in one place of `capacity_tokens`."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.held_tokens = 0.0
        self._pieces: OrderedDict[str, float] = OrderedDict()  # digest -> estimated tokens, least recent first

    def resident_chars(self, chain: Sequence[Link]) -> int:
        """Characters of the longest leading run of `chain` that is here."""
        chars = 0
        for link in chain:
            if link.digest not in self._pieces:
                break
            chars += link.chars
        return chars

    def touch(self, chain: Sequence[Link], tokens_per_char: float) -> None:
        """`chain` is computed or read here now; what no longer fits is forgotten, least recent first."""
        for link in reversed(chain):
            tokens = link.chars * tokens_per_char
            self.held_tokens += tokens - self._pieces.pop(link.digest, 0.0)
            self._pieces[link.digest] = tokens
        while self.held_tokens > self.capacity_tokens and self._pieces:
            self.held_tokens -= self._pieces.popitem(last=False)[1]

    def resize(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.touch((), 0.0)

    def clear(self) -> None:
        """The place lost everything: never claim what cannot be proved."""
        self._pieces.clear()
        self.held_tokens = 0.0

    def __len__(self) -> int:
        return len(self._pieces)
