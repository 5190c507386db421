"""A relay before a memory server's socket: a test may act at the very moment at which a client asks for a lease."""

import contextlib
import os
import socket as sockets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from outrider.memory import wire

REQUEST = msgspec.msgpack.Decoder(wire.Request)
BYTES = 1 << 18


class Relay:
    """Listens at `own` for clients of the server at `server`. `at_lease` runs once, before a Lease is passed on."""

    def __init__(self, own: Path, server: Path) -> None:
        self.server = server
        self.at_lease: Callable[[], None] | None = None
        self.leases = 0
        self._listener = sockets.socket(sockets.AF_UNIX)
        self._listener.bind(str(own))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                inner = sockets.socket(sockets.AF_UNIX)
                try:
                    inner.connect(str(self.server))
                except OSError:
                    client.close()
                    inner.close()
                    continue
                threading.Thread(target=self._serve, args=(client, inner), daemon=True).start()

    def _serve(self, client: sockets.socket, inner: sockets.socket) -> None:
        """Both ways, until both have ended."""
        with client, inner:
            back = threading.Thread(target=self._pump, args=(inner, client, False), daemon=True)
            back.start()
            self._pump(client, inner, True)
            back.join()

    def _pump(self, source: sockets.socket, sink: sockets.socket, watch: bool) -> None:
        """Pass bytes and file descriptors on until one side ends."""
        inbox = bytearray()
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = sockets.recv_fds(source, BYTES, 4)
                if not data:
                    break
                inbox += data if watch else b""
                while watch and (body := wire.take_frame(inbox)) is not None:
                    self._look(REQUEST.decode(body))
                if fds:
                    sockets.send_fds(sink, [data], fds)
                    for fd in fds:
                        os.close(fd)
                else:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(sockets.SHUT_RDWR)

    def _look(self, message: wire.Request) -> None:
        if isinstance(message, wire.Lease):
            self.leases += 1
            act, self.at_lease = self.at_lease, None
            if act is not None:
                act()
