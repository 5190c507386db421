"""A real memory server on a thread of the test's process, that can be held up at any kind of message."""

import threading
from pathlib import Path
from typing import Any

from outrider.memory import parse_tiers, wire
from outrider.memory.server import Server, listen_at


class Held(Server):
    """Hangs before it sees to a message of a held kind, as a stopped process would, until it is let go on."""

    def __init__(self, tiers: Any) -> None:
        super().__init__(tiers)
        self.seen: list[str] = []
        self.ends = False  # what it did not see to by then is never answered
        self.gates: dict[str, threading.Event] = {}

    def _request(self, peer: Any, message: wire.Request) -> None:
        kind = type(message).__name__
        self.seen.append(kind)
        if gate := self.gates.get(kind):
            gate.wait(30)
        if not self.ends:
            super()._request(peer, message)


class Memory:
    """`stop` and `start` as often as a test likes; what was flushed is there again."""

    def __init__(self, folder: Path, tiers: str, start: bool = True) -> None:
        self.socket, self.folder, self.tiers = folder / "m.sock", folder / "blocks", tiers
        self.thread = threading.Thread()
        if start:
            self.start()

    def start(self) -> None:
        listener = listen_at(self.socket)
        self.server = Held(parse_tiers(self.tiers, self.folder))
        self.server.listen(listener)
        self.listener = listener
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Every connection ends, whatever is under way on it."""
        self.server.ends = True
        self.server.stop()
        for kind in list(self.server.gates):
            self.go_on(kind)
        self.thread.join()
        self.listener.close()
        self.socket.unlink(missing_ok=True)

    def hold(self, kind: str) -> None:
        self.server.gates[kind] = threading.Event()

    def go_on(self, kind: str) -> None:
        self.server.gates.pop(kind).set()

    def seen(self, kind: str) -> int:
        return self.server.seen.count(kind)

    def stats(self) -> dict[str, Any]:
        return self.server.mover.policy.stats()
