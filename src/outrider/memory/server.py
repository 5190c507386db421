"""The socket door: one thread that owns the tiers, the policy and every client's connection. Live.

Called by `outrider memory serve` (`serve`) and by `outrider.memory.open` (a `Server` on a thread of the caller's).
Clients of the same user only: the socket has mode 0600 and each peer's uid is checked. A connection that ends, for
whatever reason, gives back its leases and drops the blocks it was writing.
"""

import fcntl
import logging
import os
import selectors
import signal
import socket as sockets
import stat
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import msgspec

from outrider.errors import CallerError
from outrider.journal import Journal
from outrider.memory import events as ev
from outrider.memory import wire
from outrider.memory.move import Answer, Mover
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings
from outrider.memory.tiers.arena import Arena
from outrider.memory.tiers.disk import HEADER_BYTES, Disk
from outrider.memory.tiers.hybrid import HybridTier, open_device
from outrider.memory.tiers.spec import Tiers, emulated, parse_tiers

UNSENT_MAX_BYTES = 64 << 20  # a client that lets so many answers lie is cut off
RECEIVE_BYTES = 1 << 18
log = logging.getLogger("outrider.memory")


def serve(socket: Path, tiers: str | Tiers, journal: Path | None = None) -> None:
    """Serve memory at `socket` until SIGTERM or SIGINT; `journal` is a directory. CallerError where it cannot."""
    if isinstance(tiers, str):
        tiers = parse_tiers(tiers, default_path=socket.with_name(socket.name + ".blocks"))
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # until the server can be told to stop: clean up as for ^C
    listener = listen_at(socket)
    own = os.stat(socket).st_ino
    try:
        server = Server(tiers, journal)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        server.listen(listener)
        sys.stderr.write(f"ready on {socket}\n")
        sys.stderr.flush()
        server.run()
    finally:
        if socket.exists() and os.stat(socket).st_ino == own:
            socket.unlink()
        listener.close()


def listen_at(path: Path) -> sockets.socket:
    """A listening socket of mode 0600 at `path`, in place of one that a dead server left there. CallerError else."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        why = f"memory socket {path}: directory {path.parent}: {error.strerror}"
        raise CallerError(f"{why}. Make that directory, or name another socket.") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # two servers that start at once must not both take over
        if path.exists() or path.is_symlink():
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise CallerError(f"memory socket {path}: is a file, but no socket. Name another path.")
            if _answers(path):
                raise CallerError(f"memory socket {path}: a server listens there. Use it, or name another socket.")
            path.unlink()
        listener = sockets.socket(sockets.AF_UNIX)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind, so that it never shows with another mode
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(64)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            why = f"memory socket {path}: {error.strerror or error}"
            raise CallerError(f"{why}. Name a short path in a writable directory.") from error
        return listener
    finally:
        os.close(directory)


def _answers(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # full or slow, but alive
    return True


@dataclass(slots=True)
class Peer:
    """One client's connection."""

    number: int
    socket: sockets.socket
    name: str = ""
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)


class Server:
    """Tiers, policy and connections of one memory server. All but `stop` belong to the thread that calls `run`."""

    def __init__(self, tiers: Tiers, journal: Path | None = None) -> None:
        host, *_ = Settings(tiers.host_bytes).topology().places
        cache_bytes = tiers.hybrid.cache_bytes if tiers.hybrid and emulated(tiers.hybrid) else 0
        self.arena = Arena(host.capacity_bytes, cache_bytes)
        self.disk: Disk | None = None
        self.hybrid: HybridTier | None = None
        try:
            if tiers.disk_bytes and tiers.path is not None:
                self.disk = Disk(tiers.path, tiers.disk_bytes)
            if tiers.hybrid is not None:
                self.hybrid = HybridTier(open_device(tiers.hybrid, tiers.path))
            device = self.hybrid.settings() if self.hybrid else None
            settings = Settings(tiers.host_bytes, tiers.disk_bytes, header_bytes=HEADER_BYTES, hybrid=device)
            journal_file = Journal(journal / "memory.jsonl", "memory", settings) if journal else None
        except CallerError:
            self._close_tiers()
            raise
        self._peers: dict[int, Peer] = {}
        self._numbers = self._lookup_blocks = self._lookup_hit_blocks = 0
        self._broken: list[int] = []
        self._decoder = msgspec.msgpack.Decoder(wire.Request)
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stop_fd, selectors.EVENT_READ)
        policy = Policy(settings)
        self.mover = Mover(policy, self.arena, self.disk, journal_file, self._answer, time.monotonic, self.hybrid)
        self._selector.register(self.mover.poke_fd, selectors.EVENT_READ)

    def listen(self, listener: sockets.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def stop(self) -> None:
        """End `run`; from any thread or signal handler."""
        os.eventfd_write(self._stop_fd, 1)

    def run(self) -> None:
        """Serve until `stop`, then close everything."""
        try:
            while self._turn():
                pass
        finally:
            self._close()

    def adopt(self, socket: sockets.socket) -> None:
        """Serve a connected socket; one of another user's process is refused."""
        socket.setblocking(False)
        self._numbers += 1
        peer = Peer(self._numbers, socket)
        _, uid, _ = struct.unpack("3i", socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12))
        self._peers[peer.number] = peer
        self._selector.register(socket, selectors.EVENT_READ, peer)
        if uid != os.geteuid():
            self._refuse(peer, f"this memory belongs to user {os.geteuid()}, you are user {uid}")

    def _turn(self) -> bool:
        """Wait for something to happen and see to it; False when told to stop."""
        wake_at_s = self.mover.wake_at_s
        wait_s = None if wake_at_s is None else max(wake_at_s - time.monotonic(), 0.0)
        for key, mask in self._selector.select(wait_s):
            if key.fd == self._stop_fd:
                return False
            if key.fd == self.mover.poke_fd:
                os.eventfd_read(self.mover.poke_fd)
            elif isinstance(key.data, Peer):
                if mask & selectors.EVENT_WRITE:
                    self._push(key.data)
                if mask & selectors.EVENT_READ and key.data.number in self._peers:
                    self._receive(key.data)
            else:
                self._accept(key.fileobj)
            self._drop_broken()
        self.mover.drain()
        self._drop_broken()
        return True

    def _accept(self, listener: object) -> None:
        assert isinstance(listener, sockets.socket)
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # the client went away again, or too many files are open: it tries once more
        self.adopt(connection)

    def _receive(self, peer: Peer) -> None:
        try:
            data = peer.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._broken.append(peer.number)
            return
        peer.inbox += data
        try:
            while peer.number not in self._broken and (body := wire.take_frame(peer.inbox)) is not None:
                self._request(peer, self._decoder.decode(body))
        except (ValueError, msgspec.DecodeError) as error:
            self._refuse(peer, f"this is no message of outrider memory, version {wire.VERSION}: {error}")

    def _request(self, peer: Peer, message: wire.Request) -> None:
        """Turn a client's message into an event, or answer it where it changes nothing."""
        client, feed = peer.number, self.mover.feed
        if isinstance(message, wire.Hello) == bool(peer.name):
            raise ValueError("Hello comes first, and once")
        match message:
            case wire.Hello(version, name):
                self._welcome(peer, version, name)
            case wire.Lookup(request, keys):
                items = wire.split(keys)
                count = self.mover.policy.lookup(items)
                self._lookup_blocks += len(items)
                self._lookup_hit_blocks += count
                self._send(peer, wire.Count(request, count))
            case wire.Lease(request, keys, timeout_s):
                feed(ev.Leased(client, request, wire.split(keys), time.monotonic() + max(0.0, min(timeout_s, 3600.0))))
            case wire.Release(lease):
                feed(ev.Released(client, lease))
            case wire.Prepare(request, keys, size_bytes):
                if not 0 < size_bytes <= self.arena.size_bytes:
                    raise ValueError(f"a block of {size_bytes} bytes")
                feed(ev.Prepared(client, request, wire.split(keys), size_bytes))
            case wire.Complete(request, keys, checksums, durable):
                feed(ev.Completed(client, request, wire.split(keys), checksums, durable))
            case wire.Abandon(request, keys):
                feed(ev.Abandoned(client, request, wire.split(keys)))
            case wire.Remember(path, keys):
                feed(ev.Remembered(path, wire.split(keys)))
            case wire.Ask(want):
                feed(ev.Wanted(want))
            case wire.Withdraw(item):
                feed(ev.Withdrawn(item))
            case wire.Flush(request):
                feed(ev.Flushed(client, request))
            case wire.Stats(request):
                lookups = {"lookup_blocks": self._lookup_blocks, "lookup_hit_blocks": self._lookup_hit_blocks}
                device = {"device": self.hybrid.stats()} if self.hybrid else {}
                self._send(peer, wire.Numbers(request, self.mover.policy.stats() | lookups | device))
            case _:
                assert_never(message)

    def _welcome(self, peer: Peer, version: int, name: str) -> None:
        if version != wire.VERSION:
            self._refuse(peer, f"you speak version {version}, this server {wire.VERSION}. Install the same outrider.")
            return
        peer.name = name or f"client {peer.number}"
        welcome = wire.frame(wire.Welcome(wire.VERSION, self.arena.size_bytes))
        try:
            sockets.send_fds(peer.socket, [welcome], [self.arena.fd])
        except OSError:
            self._broken.append(peer.number)

    def _answer(self, answer: Answer) -> None:
        """An answer of the policy goes to its client, if that is still there."""
        peer = self._peers.get(answer.client)
        if peer is None:
            return
        match answer:
            case ev.Grant(_, request, spans) | ev.Offer(_, request, spans):
                self._send(peer, wire.Spans(request, spans))
            case ev.Acknowledge(_, request, failed):
                self._send(peer, wire.Done(request, failed))
            case ev.Refuse(_, 0, why):
                self._refuse(peer, why)
            case ev.Refuse(_, request, why):
                self._send(peer, wire.Refusal(request, why))
            case _:
                assert_never(answer)

    def _refuse(self, peer: Peer, why: str) -> None:
        """Say why, then end the connection."""
        log.warning("memory: %s cut off: %s.", peer.name or f"client {peer.number}", why)
        self._send(peer, wire.Refusal(0, why))
        self._broken.append(peer.number)

    def _send(self, peer: Peer, message: wire.Reply) -> None:
        peer.outbox += wire.frame(message)
        self._push(peer)

    def _push(self, peer: Peer) -> None:
        """Send what the socket takes; the rest waits for it. Never drops here: `feed` may be our caller."""
        try:
            sent = peer.socket.send(peer.outbox)
            del peer.outbox[:sent]
        except BlockingIOError:
            sent = 0
        except OSError:
            peer.outbox.clear()
            self._broken.append(peer.number)
        if len(peer.outbox) > UNSENT_MAX_BYTES:
            self._broken.append(peer.number)
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
        if self._selector.get_key(peer.socket).events != mask:
            self._selector.modify(peer.socket, mask, peer)

    def _drop_broken(self) -> None:
        while self._broken:
            peer = self._peers.pop(self._broken.pop(), None)
            if peer is not None:
                self._selector.unregister(peer.socket)
                peer.socket.close()
                self.mover.feed(ev.Left(peer.number))

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.socket.close()
        self._selector.close()
        self.mover.close()
        os.close(self._stop_fd)
        self.arena.close()

    def _close_tiers(self) -> None:
        for tier in (self.hybrid, self.disk):
            if tier is not None:
                tier.close()
        self.arena.close()
