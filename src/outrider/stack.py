"""The composition root: the only place where the three systems meet.

    agents says Want  ->  a courier thread  ->  memory's socket

It also knows every policy object by its journal's name, so that any journal can be replayed. Called by `cli.py`.
"""

import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from outrider import journal, memory
from outrider.agents import events as agents_events
from outrider.agents import policy as agents_policy
from outrider.agents import settings as agents_settings
from outrider.errors import CallerError, StoreGone
from outrider.experts import events as experts_events
from outrider.experts import policy as experts_policy
from outrider.memory import events as memory_events
from outrider.memory import policy as memory_policy
from outrider.memory import settings as memory_settings
from outrider.wants import Want

LOG = logging.getLogger("outrider.stack")
WAITING_WANTS = 4096  # unsent; beyond it the oldest is dropped and counted
RECONNECT_S = 0.5
CALL_S = 0.5  # one exchange with memory; also what `close` may have to wait for


class Courier:
    """Carries wants from agents to memory, in order, off the gateway's loop. A dead memory server costs it nothing.

    `dropped` counts the wants that never reached memory: the oldest of a full queue, and those of a time without a
    server. It is logged when the server goes, comes back, and at the end.
    """

    def __init__(self, socket: Path) -> None:
        self.dropped = 0
        self._socket = socket
        self._wants: deque[Want] = deque(maxlen=WAITING_WANTS)
        self._news = threading.Condition()
        self._ended = False
        self._lost = False
        self._thread = threading.Thread(target=self._carry, name="want-courier", daemon=True)
        self._thread.start()

    def send(self, want: Want) -> None:
        """Queue a want; a full queue drops its oldest, whose time has most likely passed. Never blocks on memory."""
        with self._news:
            self.dropped += len(self._wants) == WAITING_WANTS
            self._wants.append(want)
            self._news.notify()

    def close(self) -> None:
        """End the thread; what is still queued is worthless once the gateway is gone."""
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join(timeout=1.0)
        if self.dropped:
            LOG.warning("memory %s: %d wants never reached it.", self._socket, self.dropped)

    def _carry(self) -> None:
        store: memory.Store | None = None
        retry_at_s = 0.0
        while (want := self._next()) is not None:
            try:
                if store is None and time.monotonic() >= retry_at_s:
                    store = memory.connect(self._socket, timeout_s=CALL_S, name="gateway")
                    self._say(lost=False)
                if store is None:
                    self.dropped += 1
                else:
                    store.want(want)
            except (StoreGone, CallerError) as error:  # restarting, or not there yet: requests go on meanwhile
                if store is not None:
                    store.close()
                store, retry_at_s = None, time.monotonic() + RECONNECT_S
                self.dropped += 1
                self._say(lost=True, why=str(error))
        if store is not None:
            store.close()

    def _next(self) -> Want | None:
        """The oldest want, or None when the courier is closed."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._wants)
            return None if self._ended else self._wants.popleft()

    def _say(self, lost: bool, why: str = "") -> None:
        """One line when memory goes or comes back, not one a want."""
        if lost and not self._lost:
            LOG.warning("memory %s: no wants reach it, calls go on: %s", self._socket, why)
        elif self._lost and not lost:
            LOG.warning("memory %s: reached again; %d wants were dropped.", self._socket, self.dropped)
        self._lost = lost


def serve_gateway(settings: Any, socket: Path | None, journal_dir: Path | None) -> None:
    """Run the gateway until SIGTERM or SIGINT, with its wants carried to the memory server at `socket`, if any."""
    from outrider.agents import gateway  # aiohttp: heavy, and an extra

    courier = Courier(socket) if socket else None
    try:
        gateway.serve(settings, courier.send if courier else None, journal_dir)
    finally:
        if courier:
            courier.close()


POLICIES: dict[str, tuple[Any, Any, Any]] = {  # journal's name: (events, settings, policy)
    "memory": (memory_events.Event, memory_settings.Settings, memory_policy.Policy),
    "agents": (agents_events.Event, agents_settings.GatewaySettings, agents_policy.Policy),
    "experts": (experts_events.Event, experts_policy.Settings, experts_policy.Policy),
}


def replay(path: Path) -> tuple[int, journal.Difference | None]:
    """Run a journal of any system through a fresh policy object: lines that agreed, first line that differs.

    Raises CallerError where `path` is no journal or names a policy that this version does not have.
    """
    header, _ = journal.read(path)
    if header.policy not in POLICIES:
        known = ", ".join(POLICIES)
        raise CallerError(
            f"journal {path}: policy {header.policy!r} is none of {known}. Use outrider {header.outrider}."
        )
    events, settings, policy = POLICIES[header.policy]
    return journal.replay(path, events, lambda raw: policy(msgspec.json.decode(raw, type=settings)))
