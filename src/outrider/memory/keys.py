"""What a KV block is called: a chained hash of everything that makes its bytes what they are. Pure.

A key names the block's tokens, all tokens before it, and the space: weights, dtype, layout, block size, group, shard,
adapter and tenant salt. Two spaces that differ in any field share no key, so a hit can never be another model's,
another layout's or another tenant's block (law 1). Engines call `chain`, or `adopt` where they hash blocks themselves;
nobody else makes keys.

    root  = H(tag, name and value of every field of the space, each length-prefixed)
    key_0 = H(root + tokens of block 0)        key_i = H(key_{i-1} + tokens of block i)
    adopted key_i = H(tag + root + the engine's own chained hash of block i)
"""

from collections.abc import Sequence
from hashlib import blake2b

import msgspec
import numpy as np

from outrider.errors import CallerError

KEY_BYTES = 16
TAG = b"outrider key space 1"
ADOPTED = b"outrider adopted 1"


class KeySpace(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks are interchangeable exactly within one space.

    model         digest of the weights (a name is not enough: revisions differ)
    dtype         of the cached numbers, "float32"
    layout        how a block's bytes are ordered, instruction set included where it matters
    block_tokens  tokens in one block
    salt          tenant; the empty one is a tenant too
    group, shard  KV cache group of hybrid models; this rank's part, "tp0of2"
    adapter       digest of a LoRA adapter, or of whatever else changes the numbers
    """

    model: str
    dtype: str
    layout: str
    block_tokens: int
    salt: str = ""
    group: int = 0
    shard: str = "tp0of1"
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise CallerError(f"KeySpace: block_tokens is {self.block_tokens}. Use at least 1, as the engine does.")

    def root(self) -> bytes:
        """16 bytes that stand for the space itself: the parent of every first block."""
        digest = blake2b(TAG, digest_size=KEY_BYTES)
        for name in self.__struct_fields__:
            value = getattr(self, name)
            for part in (name, type(value).__name__, str(value)):
                data = part.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def chain(self, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the whole blocks of `token_ids`, first block first; a partial tail has no key."""
        count = len(token_ids) // self.block_tokens
        tokens = np.asarray(token_ids[: count * self.block_tokens], dtype="<i8").tobytes()
        step = 8 * self.block_tokens
        keys: list[bytes] = []
        parent = self.root()
        for start in range(0, count * step, step):
            parent = blake2b(parent + tokens[start : start + step], digest_size=KEY_BYTES).digest()
            keys.append(parent)
        return keys

    def adopt(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Keys of blocks that an engine has hashed itself, each hash over all tokens before it too (vLLM's)."""
        stem = ADOPTED + self.root()
        return [blake2b(stem + block_hash, digest_size=KEY_BYTES).digest() for block_hash in hashes]
