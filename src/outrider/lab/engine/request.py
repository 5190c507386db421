"""What the engine is asked for and what it answers. Plain data, between the door, the engine's thread and the hook."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.errors import CallerError


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine. kv_tokens is rounded down to whole blocks of block_tokens."""

    kv_tokens: int
    max_batch_tokens: int = 512
    max_num_seqs: int = 8
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.kv_tokens < 2 * self.block_tokens or self.max_num_seqs < 1:
            raise CallerError(
                f"--kv-tokens {self.kv_tokens}, --block-tokens {self.block_tokens}, --max-num-seqs {self.max_num_seqs}"
                ": the cache needs two blocks and the batch one seat at least. Raise --kv-tokens."
            )
        if self.max_batch_tokens < self.max_num_seqs:
            raise CallerError(
                f"--max-batch-tokens {self.max_batch_tokens} is less than --max-num-seqs {self.max_num_seqs}: "
                "each running request needs a token a step. Raise the first or lower the second."
            )


@dataclass(frozen=True)
class Params:
    """How to generate; the door validates. temperature 0 = greedy; `max_tokens` counts generated tokens."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    return_routes: bool = False


@dataclass(frozen=True)
class Output:
    """News of one request. `finish` is None until the last one: stop, length, or error (then `text` says what)."""

    text: str
    token_ids: tuple[int, ...]
    finish: str | None = None
    routes: np.ndarray | None = None  # last output, if asked for: int16 [prompt + generated, layers, top_k]


@dataclass(eq=False)
class Request:
    """One request's whole state. Only the engine's thread touches it after `Engine.submit`."""

    id: str
    prompt: list[int]
    params: Params
    emit: Callable[[Output], None]
    priority: int = 0
    born_s: float = 0.0

    arrival: int = 0  # set by the engine: breaks ties between equal priorities
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated
    keys: list[bytes] = field(default_factory=list)  # one a whole block of `tokens`
    blocks: list[int] = field(default_factory=list)  # the pool blocks that hold tokens[: len(blocks) * block_tokens]
    computed: int = 0  # tokens whose keys and values are in the pool
    external: int | None = 0  # leading blocks that memory can give; None: being looked up
    own_blocks: int = 0  # of them found in the engine's own pool at the first admission
    external_blocks: int = 0  # of them loaded from memory
    admitted: bool = False  # at least once: hits are counted at the first admission only
    finish: str | None = None
    closed: bool = False  # answered or aborted: out of the engine's books
    random: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.temperature > 0:
            self.random = torch.Generator()
            self.random.seed() if self.params.seed is None else self.random.manual_seed(self.params.seed)

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first: vLLM's sign of priority, ties by arrival."""
        return (self.priority, self.arrival)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.prompt) :]
