"""The composition root: the only place where the three systems meet.

    agents says Want  ->  a courier thread  ->  memory's socket

It also knows every policy object by its journal's name, so that any journal can be replayed. Called by `cli.py`.
"""

import queue
import threading
import time
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

WAITING_WANTS = 4096  # more than this many unsent wants: the oldest are worthless, new ones are dropped and counted
RECONNECT_S = 0.5


class Courier:
    """Carries wants from agents to memory, in order, off the gateway's loop. A dead memory server costs it nothing.

    `dropped` counts the wants that never reached memory: the queue was full, or the server was gone.
    """

    def __init__(self, socket: Path) -> None:
        self.dropped = 0
        self._socket = socket
        self._wants: queue.Queue[Want | None] = queue.Queue(WAITING_WANTS)
        self._thread = threading.Thread(target=self._carry, name="want-courier", daemon=True)
        self._thread.start()

    def send(self, want: Want) -> None:
        try:
            self._wants.put_nowait(want)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        self._wants.put(None)
        self._thread.join(timeout=1.0)

    def _carry(self) -> None:
        store: memory.Store | None = None
        retry_at_s = 0.0
        while (want := self._wants.get()) is not None:
            try:
                if store is None and time.monotonic() >= retry_at_s:
                    store = memory.connect(self._socket, timeout_s=2.0, name="gateway")
                if store is None:
                    self.dropped += 1
                else:
                    store.want(want)
            except (StoreGone, CallerError):  # restarting, or not there yet: ask again later, requests go on
                store, retry_at_s = None, time.monotonic() + RECONNECT_S
                self.dropped += 1
        if store is not None:
            store.close()


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
