"""Laws of the cache's books: used + free = capacity, held blocks are never handed out, prefixes stay whole."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from outrider.lab.engine.blocks import Blocks

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # one number a block: many shared prefixes


class Cache(RuleBasedStateMachine):
    """Chains come, compute their blocks one by one, and go; some are only half computed."""

    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(10, 16)
        self.open: list[dict[str, list]] = []
        self.content: dict[int, bytes] = {}  # block: what was last written there

    @rule(target=chains, tokens=TOKENS)
    def come(self, tokens: list[int]) -> dict[str, list]:
        keys = [bytes(tokens[: i + 1]) for i in range(len(tokens))]
        hit = self.blocks.match(keys)
        assert [self.content[block] for block in hit] == keys[: len(hit)], "a hit holds what its key says"
        self.blocks.hold(hit)
        chain = {"keys": keys, "blocks": hit, "done": [None] * len(hit)}
        missing = len(keys) - len(hit)
        if missing <= len(self.blocks.free):
            fresh = self.blocks.take(missing)
            held = {block for other in self.open for block in other["blocks"]} | set(hit)
            assert held.isdisjoint(fresh), "a held block was handed out"
            for block in fresh:
                self.content.pop(block, None)
            chain["blocks"] = hit + fresh
        self.open.append(chain)
        return chain

    @rule(chain=chains)
    def compute(self, chain: dict[str, list]) -> None:
        i = len(chain["done"])
        if chain in self.open and i < len(chain["blocks"]):
            self.content[chain["blocks"][i]] = chain["keys"][i]
            chain["blocks"][i] = self.blocks.name(chain["blocks"][i], chain["keys"][i])
            chain["done"].append(None)

    @rule(chain=consumes(chains))
    def go(self, chain: dict[str, list]) -> None:
        self.open = [other for other in self.open if other is not chain]
        self.blocks.release(chain["blocks"])

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check()
        holders = [block for chain in self.open for block in chain["blocks"]]
        assert self.blocks.refs == [holders.count(block) for block in range(10)]
        assert all(self.content[block] == key for key, block in self.blocks.by_key.items())

    @invariant()
    def prefixes_are_whole(self) -> None:
        assert all(len(key) == 1 or key[:-1] in self.blocks.by_key for key in self.blocks.by_key)


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_released_chain_is_taken_from_its_end() -> None:
    blocks = Blocks(4, 16)
    chain = blocks.take(3)
    for i, block in enumerate(chain):
        assert blocks.name(block, bytes([i])) == block
    blocks.release(chain)
    assert blocks.take(2) == [3, chain[2]]
    assert blocks.match([b"\0", b"\1", b"\2"]) == chain[:2]


def test_equal_content_is_kept_once() -> None:
    blocks = Blocks(4, 16)
    first, second = blocks.take(2)
    assert blocks.name(first, b"k") == first
    assert blocks.name(second, b"k") == first
    assert blocks.refs[first] == 2
    assert second in blocks.free
