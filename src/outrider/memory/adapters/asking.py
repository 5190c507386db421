"""The scheduler's half of an engine's connector: what memory has, who loads it, what is saved, what is foreseen. Live.

vLLM's scheduler calls these, once a request or once a step, and none of them waits for memory: a thread asks, and
until it has an answer the scheduler is told to come again.

    arrived    a request came: look it up, and lift what lies on disk only        matched    tokens that memory has
    allocated  blocks were taken for them: load                                   ordered    this step's orders
    landed     loads that are over, good or bad                                   finished   name the chain, foresee

Requests that need the same prefix load it once: the first loads, the others wait until its blocks are in the engine's
own prefix cache. Whoever loaded in vain does not ask again, and computes.
"""

import re
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import msgspec

from outrider.memory.adapters.orders import Copies, Orders
from outrider.memory.adapters.reach import Reach
from outrider.memory.keys import KeySpace
from outrider.memory.store import Store
from outrider.wants import Want

FRESH_S = 1.0  # an answer older than this is asked for again
LOOK_UP_S = 1.0  # a look-up that takes longer counts as: nothing there
CHAT = re.compile(r"(?:\d+_)?(?:chatcmpl-)?(.+?)(?:-[0-9a-f]{8})?")
COMPLETION = re.compile(r"(?:\d+_)?cmpl-(.+)-\d+(?:-[0-9a-f]{8})?")
DIGEST = re.compile(r"[0-9a-f]{64,}")  # what vLLM calls a picture by that its client gave no name


class Request(Protocol):
    """What is read of vLLM's request."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    num_in_flight_tokens: int
    block_hashes: Sequence[bytes]
    skip_reading_prefix_cache: bool
    lora_request: object
    resumable: bool
    mm_features: Sequence[Any]
    kv_transfer_params: Mapping[str, Any] | None


class Foresight(msgspec.Struct, forbid_unknown_fields=True):
    """`kv_transfer_params["outrider"]` of a request: what its client knows of the future.

    path          name of this context; by default the call's X-Request-Id
    returns_in_s  seconds after the end of this call until its context is needed again
    saved_s       expected seconds saved if it is there by then; 0 or less: it is over, its blocks may leave first
    """

    path: str = ""
    returns_in_s: float = 0.0
    saved_s: float | None = None


@dataclass
class Known:
    """One request under way. `answer` is the length of the leading run that memory had at `answered_s`."""

    request: Request
    keys: list[bytes] = field(default_factory=list)
    answer: int = 0
    answered_s: float = -1e9
    asked_s: float | None = None  # a look-up is under way since
    awaited: bool = False  # the scheduler was told to come again, and has not seen the answer yet
    loading: Copies | None = None
    vain: bool = False  # it loaded, and some of it failed
    offered: int = 0  # leading blocks whose save was ordered
    saves: bool = False
    outdated: bool = False  # its blocks were computed before the keys were renewed: not to be saved


class Asking:
    """All but `_work` belongs to the scheduler's thread. `space` None: the worker has not told its layout yet."""

    def __init__(
        self, reach: Reach, block_tokens: int, shares: bool, patience_s: float, token_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`shares`: the engine has a prefix cache. `token_s`: what computing one token takes, the worth of a block."""
        self.space: KeySpace | None = None
        self.reach, self.block_tokens, self.shares, self.clock = reach, block_tokens, shares, clock
        self.patience_s, self.token_s = patience_s, token_s
        self._known: dict[str, Known] = {}
        self._loading: dict[bytes, tuple[str, float]] = {}  # key -> who loads it, and until when others wait for that
        self._loads: list[Copies] = []
        self._saves: list[Copies] = []
        self._held: list[str] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="outrider-ask", daemon=True).start()

    # -- the scheduler's thread

    def arrived(self, request: Request) -> None:
        """What is known by a name, not by content, is left to vLLM alone: LoRA adapters, pictures that a client names.

        So is a session, whose tokens change.
        """
        named = any(not DIGEST.fullmatch(feature.identifier) for feature in request.mm_features)
        if self.space is None or request.lora_request is not None or request.resumable or named:
            return
        known = self._known[request.request_id] = Known(request)
        self._ask(known, lift=True)

    def matched(self, request: Request, computed_tokens: int) -> int | None:
        """Tokens beyond the engine's own `computed_tokens` that may be loaded; None: ask again in the next step."""
        known = self._known.get(request.request_id)
        here = computed_tokens // self.block_tokens
        usable = (request.num_tokens - 1) // self.block_tokens  # one token must be left to compute
        if known is None or known.vain or here >= usable or request.skip_reading_prefix_cache or self.reach.resting:
            return 0
        now = self.clock()
        if known.awaited and known.asked_s is None:  # fresh from here on, however long a step takes
            known.awaited, known.answered_s = False, now
        keys = self._keys(known)
        loader, until_s = self._loading.get(keys[here], ("", 0.0))
        if loader and loader != request.request_id and now < until_s:
            return None
        if now - known.answered_s > FRESH_S:
            if known.asked_s is None:
                self._ask(known)
            known.awaited = now - (known.asked_s or now) < LOOK_UP_S
            return None if known.awaited else 0
        return max(0, min(known.answer, usable) - here) * self.block_tokens

    def allocated(self, request: Request, blocks: Sequence[int], here: int, external_tokens: int) -> None:
        """`blocks` are all of the request's, `here` of them computed; called again with 0 tokens when they are in."""
        known = self._known.get(request.request_id)
        if known is None:
            return
        if external_tokens == 0:
            self._forget_load(known)
            return
        stop = here + external_tokens // self.block_tokens
        copies = Copies(request.request_id, tuple(self._keys(known)[here:stop]), tuple(blocks[here:stop]))
        known.loading = copies
        self._loads.append(copies)
        if self.shares:
            until_s = self.clock() + 2 * self.patience_s
            self._loading.update(dict.fromkeys(copies.keys, (request.request_id, until_s)))

    def ordered(
        self, scheduled: Mapping[str, int], blocks_of: Callable[[str], Sequence[int]], preempted: Collection[str]
    ) -> Orders:
        """The step's orders: its loads, and saves of the blocks that its forward pass fills. Resets them."""
        for name in preempted:
            if known := self._known.get(name):
                known.offered, known.saves, known.answered_s, known.outdated = 0, False, -1e9, False
        for name, tokens in scheduled.items():
            if known := self._known.get(name):
                written = (known.request.num_computed_tokens + tokens) // self.block_tokens
                self._offer(known, written, partial(blocks_of, name))
        orders = Orders(tuple(self._loads), tuple(self._saves), frozenset(preempted), tuple(self._held))
        self._loads, self._saves, self._held = [], [], []
        return orders

    def landed(self, received: Iterable[str], bad_blocks: Collection[int]) -> None:
        """Loads that are over. Those in vain are not tried again; who waits for a good one waits for its caching."""
        now = self.clock()
        for name in received:
            known = self._known.get(name)
            if known is None or known.loading is None:
                continue
            if bad_blocks and not set(bad_blocks).isdisjoint(known.loading.blocks):
                known.vain = True
                self._forget_load(known)
                for other in self._known.values():
                    other.answered_s = -1e9  # what memory said before is not to be believed
            else:
                for key in known.loading.keys:
                    self._loading[key] = (name, now + FRESH_S)

    def finished(self, request: Request, blocks: Sequence[int]) -> bool:
        """Once a request, however it ended. True: its blocks must stay until the worker says that it is through."""
        known = self._known.pop(request.request_id, None)
        if known is None:
            return False
        if known.loading is not None:
            self._forget_load(known)  # the engine itself keeps the blocks until the load is over
            return False
        written = max(0, request.num_computed_tokens - request.num_in_flight_tokens) // self.block_tokens
        self._offer(known, written, lambda: blocks)
        if known.offered and not known.outdated:
            self._foresee(known, known.offered)
        if known.saves:
            self._held.append(request.request_id)
        return known.saves

    def renew(self, space: KeySpace) -> None:
        """Other keys from now on: no request, new or under way, meets a block of the old ones, or saves one as new."""
        self.space = space
        for known in self._known.values():
            known.keys, known.answer, known.answered_s = [], 0, -1e9
            known.outdated = known.request.num_computed_tokens > 0

    def close(self) -> None:
        self._jobs.put(None)
        self.reach.close()

    def _keys(self, known: Known) -> list[bytes]:
        """Keys of all blocks that the engine has hashed so far."""
        assert self.space is not None
        known.keys += self.space.adopt(known.request.block_hashes[len(known.keys) :])
        return known.keys

    def _offer(self, known: Known, written: int, blocks: Callable[[], Sequence[int]]) -> None:
        """Order saves of blocks that are whole, written and hashed; of those found here too: memory may lack them."""
        stop = min(written, len(known.request.block_hashes))
        if stop > known.offered and not known.outdated:
            start, known.offered, known.saves = known.offered, stop, True
            keys = tuple(self._keys(known)[start:stop])
            self._saves.append(Copies(known.request.request_id, keys, tuple(blocks()[start:stop])))

    def _forget_load(self, known: Known) -> None:
        if known.loading is not None:
            for key in known.loading.keys:
                if self._loading.get(key, ("", 0.0))[0] == known.request.request_id:
                    del self._loading[key]
            known.loading = None

    # -- the asking thread

    def _ask(self, known: Known, lift: bool = False) -> None:
        """Have the thread look the request up; `lift`: and want in host what is found."""
        usable = (known.request.num_tokens - 1) // self.block_tokens
        keys, space = list(self._keys(known)[:usable]), self.space
        if not keys:
            known.answer, known.answered_s = 0, float("inf")
            return
        known.asked_s = self.clock()

        def look_up() -> None:
            found = self.reach.ask(lambda store: store.lookup(keys), 0)
            if space is not self.space:  # renewed meanwhile: these are nobody's keys
                found = 0
            known.answer, known.answered_s, known.asked_s = found, self.clock(), None
            if lift and found:
                name, worth_s = path_of(known.request.request_id), found * self.block_tokens * self.token_s
                self._say(name, keys[:found], Want(name, "host", self.clock(), worth_s))

        self._jobs.put(look_up)

    def _foresee(self, known: Known, whole: int) -> None:
        """Name the request's chain for the wants of others, and pass on its own client's."""
        said = foresight(known.request.kv_transfer_params)
        name = said.path or path_of(known.request.request_id)
        keys, by_s = list(known.keys[:whole]), self.clock() + said.returns_in_s
        want = None if said.saved_s is None else Want(name, "host", by_s, said.saved_s)
        self._jobs.put(lambda: self._say(name, keys, want))

    def _say(self, name: str, keys: list[bytes], want: Want | None) -> None:
        def say(store: Store) -> None:
            store.remember(name, keys)
            if want is not None:
                store.want(want)

        self.reach.ask(say, None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a bug of ours: this question stays without answer, the next ones are asked
                traceback.print_exc()


def path_of(request_id: str) -> str:
    """The call's X-Request-Id, which vLLM wraps: chatcmpl-ID-1a2b3c4d, cmpl-ID-0-1a2b3c4d."""
    found = COMPLETION.fullmatch(request_id) or CHAT.fullmatch(request_id)
    return found[1] if found else request_id


def foresight(params: Mapping[str, Any] | None) -> Foresight:
    """What a client said; nothing where it said nothing that makes sense: a hint may never cost an answer."""
    try:
        said = msgspec.convert((params or {}).get("outrider", {}), Foresight)
    except (msgspec.ValidationError, AttributeError):
        return Foresight()
    finite = abs(said.returns_in_s) < float("inf") and abs(said.saved_s or 0.0) < float("inf")
    return said if finite else Foresight()
