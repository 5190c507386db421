"""A Store that may be away: connected at the first need, tried again with growing pauses. Live, thread-safe.

Used by both halves of an engine's connector. What memory cannot do costs time, never an answer: a call that fails says
`gone`, and while memory rests nobody waits for it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from outrider.errors import OutriderError, StoreGone
from outrider.memory.store import Store

T = TypeVar("T")
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 4.0
LOG = logging.getLogger("vllm.outrider")  # under vLLM's name, so that vLLM's handlers show it


class Reach:
    """`connect` gives a Store or raises; `where`, for people. `gone` counts the calls that memory did not answer."""

    def __init__(self, connect: Callable[[], Store], where: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.gone = 0
        self._where = where
        self._connect, self._clock = connect, clock
        self._store: Store | None = None
        self._lock = threading.Lock()  # never held for longer than a moment: the engine's thread takes it too
        self._dialling = threading.Lock()
        self._pause_s, self._rest_until_s = FIRST_PAUSE_S, 0.0
        self._lost = self._closed = False

    @property
    def resting(self) -> bool:
        """Memory failed a moment ago: do not count on it."""
        return self._clock() < self._rest_until_s

    def ask(self, call: Callable[[Store], T], gone: T) -> T:
        """What `call` returns, or `gone` where memory is away, or refuses. Blocks as long as the Store's time-outs."""
        try:
            result = call(self._reached())
        except StoreGone as error:
            self._rest(str(error))
        except (OutriderError, OSError) as error:
            LOG.warning("Outrider's memory refused: %s", error)
        else:
            self._back()
            return result
        with self._lock:
            self.gone += 1
        return gone

    def take_gone(self) -> int:
        """Calls that were not answered since the last call of this."""
        with self._lock:
            gone, self.gone = self.gone, 0
        return gone

    def close(self) -> None:
        self._closed = True
        store = self._store
        if store is not None:
            store.close()

    def _reached(self) -> Store:
        with self._dialling:
            if self._closed or self.resting:
                raise StoreGone("memory is away")
            if self._store is None:
                try:
                    self._store = self._connect()
                except (OutriderError, OSError) as error:
                    raise StoreGone(str(error)) from error
            return self._store

    def _rest(self, why: str) -> None:
        with self._lock:
            if self.resting or self._closed:
                return
            self._rest_until_s = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
            if not self._lost:
                LOG.warning("Outrider's memory at %s is away, its blocks are computed meanwhile: %s", self._where, why)
            self._lost = True

    def _back(self) -> None:
        with self._lock:
            self._pause_s = FIRST_PAUSE_S
            if self._lost:
                LOG.warning("Outrider's memory at %s is back.", self._where)
            self._lost = False
