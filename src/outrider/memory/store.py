"""The client door: what an engine holds. Live: blocking, thread-safe, every call ends within its timeout.

Blocks are read and written in place, in the server's shared memory. Any call may raise StoreGone, when the server is
dead or does not answer in time: recompute instead. A Store that was connected by path looks for the server again at a
later call; leases and unpublished blocks of the lost connection are gone with it.
"""

import contextlib
import itertools
import math
import mmap
import os
import select
import socket as sockets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import xxhash

from outrider.errors import CallerError, StoreGone, WorldError
from outrider.memory import wire
from outrider.memory.server import Server
from outrider.memory.tiers.arena import PREFAULT_BYTES
from outrider.memory.tiers.spec import parse_tiers
from outrider.wants import Want

RETRY_S = 0.5  # a Store without server looks for it so often at most
RECEIVE_BYTES = 1 << 18
FLUSH_TIMEOUT_S = 60.0
R = TypeVar("R", wire.Count, wire.Spans, wire.Done, wire.Numbers)


def connect(socket_path: Path | str, timeout_s: float = 5.0, name: str = "") -> "Store":
    """A Store on the server that listens at `socket_path`; CallerError where none does."""
    path = Path(socket_path)

    def dial() -> "Link":
        connection = sockets.socket(sockets.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise StoreGone(f"memory socket {path}: {error.strerror or error}.") from error
        return Link(connection, name, timeout_s)

    try:
        return Store(dial(), timeout_s, dial)
    except StoreGone as error:
        raise CallerError(f"{error} Start `outrider memory serve --socket {path}`, or name its socket.") from error


def open(tiers: str, journal: Path | None = None, timeout_s: float = 5.0) -> "Store":
    """A Store with a private server, on a thread of this process; `tiers` as in `parse_tiers`. Ends with `close`."""
    server = Server(parse_tiers(tiers), journal)
    ours, theirs = sockets.socketpair()
    server.adopt(theirs)
    thread = threading.Thread(target=server.run, name="outrider-memory", daemon=True)
    thread.start()

    def end() -> None:
        server.stop()
        thread.join()

    ours.settimeout(timeout_s)
    return Store(Link(ours, "private", timeout_s), timeout_s, end=end)


class Slot:
    """Where to write one new block: `view` is writable until it is completed or abandoned."""

    def __init__(self, link: "Link", key: bytes, view: memoryview) -> None:
        self.link, self.key, self.view = link, key, view


class Lease:
    """A hold on blocks in host: `views` has one read-only view a key, None for a block that is gone."""

    def __init__(self, link: "Link", number: int, views: list[memoryview | None]) -> None:
        self._link, self._number, self._open = link, number, True
        self.views = views

    def release(self) -> None:
        """Give the blocks back; their views must not be read any more. CallerError the second time.

        StoreGone: the connection was lost meanwhile, and with it the hold: what was read may be another block's bytes.
        """
        if not self._open:
            raise CallerError("a lease was released twice. Release it once, or use it in a `with` block.")
        self._open = False
        _let_go(self.views)
        self._link.tell(wire.Release(self._number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.release()


class Store:
    """A client of one memory server; see `outrider.memory` for an example."""

    def __init__(
        self,
        link: "Link",
        timeout_s: float,
        dial: Callable[[], "Link"] | None = None,
        end: Callable[[], None] | None = None,
    ) -> None:
        self._link, self._timeout_s, self._dial, self._end = link, timeout_s, dial, end
        self._redial = threading.Lock()
        self._dialled_s = time.monotonic()
        self._closed = False

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Length of the leading run of `keys` that is published in some tier; what is still written does not count."""
        joined = wire.join(keys)
        return self._call(lambda request: wire.Lookup(request, joined), wire.Count)[1].count

    def lease(self, keys: Sequence[bytes], timeout_s: float = 2.0) -> Lease:
        """Hold the leading run of `keys` in host, loading what lies on disk, for `timeout_s` at most."""
        joined = wire.join(keys)
        link, reply = self._call(lambda request: wire.Lease(request, joined, timeout_s), wire.Spans, timeout_s)
        views = [link.view(span.at, span.size_bytes).toreadonly() if span else None for span in reply.spans]
        return Lease(link, reply.request, views)

    def prepare(self, keys: Sequence[bytes], nbytes: int) -> list[Slot | None]:
        """Room for new blocks of `nbytes` each; None where a block is stored, is being written, or finds no room."""
        joined = wire.join(keys)
        if nbytes < 1:
            raise CallerError(f"prepare: a block of {nbytes} bytes. Blocks have at least 1.")
        link, reply = self._call(lambda request: wire.Prepare(request, joined, nbytes), wire.Spans)
        slots = zip(keys, reply.spans, strict=True)
        return [Slot(link, key, link.view(span.at, span.size_bytes)) if span else None for key, span in slots]

    def complete(self, slots: Sequence[Slot | None], durable: bool = False) -> None:
        """Publish written blocks (None is skipped). `durable`: return when on disk; WorldError if they cannot be."""
        written = [slot for slot in slots if slot is not None]
        if not written:
            return
        checksums = tuple(xxhash.xxh3_64_intdigest(slot.view) for slot in written)
        timeout_s = FLUSH_TIMEOUT_S if durable else 0.0
        keys = wire.join([slot.key for slot in written])
        self._finish(written, lambda request: wire.Complete(request, keys, checksums, durable), timeout_s)

    def abandon(self, slots: Sequence[Slot | None]) -> None:
        """Give prepared slots back unpublished."""
        prepared = [slot for slot in slots if slot is not None]
        if prepared:
            keys = wire.join([slot.key for slot in prepared])
            self._finish(prepared, lambda request: wire.Abandon(request, keys))

    def remember(self, path: str, keys: Sequence[bytes]) -> None:
        """Name a chain of blocks, so that wants can speak of it: `path` is the gateway's request id."""
        self._tell(wire.Remember(path, wire.join(keys)))

    def want(self, want: Want) -> None:
        """Have a path's blocks (or one block, by hex key) in host by `by_s`; `saved_s` <= 0: its value is gone."""
        if want.place != "host":
            raise CallerError(f"want: place {want.place!r} is not served. Use 'host'.")
        if not (math.isfinite(want.by_s) and math.isfinite(want.saved_s)):
            raise CallerError(f"want: by_s {want.by_s} and saved_s {want.saved_s} must be finite. Mend them.")
        self._tell(wire.Ask(want))

    def withdraw(self, path: str) -> None:
        """The path's blocks are worth nothing any more: they leave first."""
        self._tell(wire.Withdraw(path))

    def flush(self) -> None:
        """Return when everything published so far is on disk; WorldError if some of it is not."""
        reply = self._call(wire.Flush, wire.Done, FLUSH_TIMEOUT_S)[1]
        _all_durable(reply)

    def stats(self) -> dict[str, Any]:
        """Counters and tiers of the server; names in `memory/tally.py`."""
        return self._call(wire.Stats, wire.Numbers)[1].numbers

    def close(self) -> None:
        """End the connection: leases return, unpublished blocks vanish. A private server ends with it."""
        self._closed = True
        self._link.close("the store was closed")
        if self._end is not None:
            end, self._end = self._end, None
            end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, slots: list[Slot], make: Callable[[int], wire.Request], timeout_s: float = 0.0) -> None:
        """Complete or abandon slots on the connection that prepared them."""
        link = slots[0].link
        if any(slot.link is not link for slot in slots):
            raise StoreGone("memory server: these slots belong to different connections. Prepare them again.")
        _let_go([slot.view for slot in slots])
        _all_durable(link.call(make, wire.Done, self._timeout_s + timeout_s))

    def _call(self, make: Callable[[int], wire.Request], kind: type[R], extra_s: float = 0.0) -> tuple["Link", R]:
        link = self._alive()
        return link, link.call(make, kind, self._timeout_s + extra_s)

    def _tell(self, message: wire.Request) -> None:
        self._alive().tell(message)

    def _alive(self) -> "Link":
        """The connection; after it was lost, a new one, looked for now and then."""
        link = self._link
        if link.gone is None:
            return link
        with self._redial:
            if self._link.gone is None:
                return self._link
            now = time.monotonic()
            if self._dial is None or self._closed or now - self._dialled_s < RETRY_S:
                raise StoreGone(f"memory server: {self._link.gone}.")
            self._dialled_s = now
            self._link = self._dial()
            return self._link


class Link:
    """One connection: requests out, replies back to whichever thread asked, the arena mapped.

    Whoever waits first reads for all; the others wait for their reply or for their turn to read. `gone` says why no
    more is asked of it. A call that times out spoils it, since a late answer would hold blocks for nobody; but the
    socket stays open until the last lease and slot on it are dropped, so that the server does not give their bytes away
    while a thread still copies them.
    """

    def __init__(self, connection: sockets.socket, name: str, timeout_s: float) -> None:
        self.gone: str | None = None
        self._socket = connection
        self._numbers = itertools.count(1)
        self._send_lock = threading.Lock()
        self._turn = threading.Condition(threading.RLock())
        self._reading = False
        self._waiting: dict[int, wire.Reply | None] = {}
        self._inbox = bytearray()
        self._decoder = msgspec.msgpack.Decoder(wire.Reply)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        try:
            arena_bytes, fd = self._greet(name, time.monotonic() + timeout_s)
        except StoreGone:
            connection.close()
            raise
        populate = mmap.MAP_POPULATE if arena_bytes <= PREFAULT_BYTES else 0
        self._view = memoryview(mmap.mmap(fd, arena_bytes, mmap.MAP_SHARED | populate))
        os.close(fd)

    def view(self, start: int, size_bytes: int) -> memoryview:
        return self._view[start : start + size_bytes]

    def tell(self, message: wire.Request) -> None:
        """Send what is not answered."""
        data = wire.frame(message)
        if self.gone is None:
            try:
                with self._send_lock:
                    self._socket.sendall(data)
            except TimeoutError:
                self._spoil("it takes no requests")
            except OSError as error:
                self.close(error.strerror or str(error))
        if self.gone is not None:
            raise StoreGone(f"memory server: {self.gone}.")

    def call(self, make: Callable[[int], wire.Request], kind: type[R], timeout_s: float) -> R:
        """Send a request and wait for its reply. CallerError where it is refused, StoreGone where none comes."""
        by_s = time.monotonic() + timeout_s
        number = next(self._numbers)
        self._waiting[number] = None
        try:
            self.tell(make(number))
            reply = self._reply(number, by_s, timeout_s)
        finally:
            del self._waiting[number]
        if isinstance(reply, wire.Refusal):
            raise CallerError(f"memory server: {reply.why}.")
        if not isinstance(reply, kind):
            self.close(f"it answered with {type(reply).__name__}, not {kind.__name__}")
            raise StoreGone(f"memory server: {self.gone}.")
        return reply

    def close(self, why: str) -> None:
        """End the connection, once; threads that wait on it hear why."""
        self._spoil(why)
        with contextlib.suppress(OSError):  # it was closed before
            self._socket.shutdown(sockets.SHUT_RDWR)
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()  # no shutdown: a forked child that drops its copy must not end ours

    def _spoil(self, why: str) -> None:
        """Ask nothing more of it; threads that wait on it hear why."""
        with self._turn:
            if self.gone is None:
                self.gone = why
            self._turn.notify_all()

    def _reply(self, number: int, by_s: float, timeout_s: float) -> wire.Reply:
        with self._turn:
            while (reply := self._waiting[number]) is None:
                rest_s = by_s - time.monotonic()
                if self.gone is None and rest_s <= 0:
                    self._spoil(f"no answer within {timeout_s:g} s")
                if self.gone is not None:
                    raise StoreGone(f"memory server: {self.gone}.")
                if self._reading:
                    self._turn.wait(rest_s)
                    continue
                self._reading = True
                self._turn.release()
                try:
                    replies, over = self._read(rest_s)
                finally:
                    self._turn.acquire()
                    self._reading = False
                for each in replies:
                    if each.request in self._waiting:
                        self._waiting[each.request] = each
                if over:
                    self.close(over)
                self._turn.notify_all()
            return reply

    def _read(self, rest_s: float) -> tuple[list[Any], str]:
        """Replies that came in, and why the connection is over (empty: it is not)."""
        replies: list[Any] = []
        try:
            if not self._poll.poll(rest_s * 1000):
                return replies, ""
            data = self._socket.recv(RECEIVE_BYTES)
            self._inbox += data
            while (body := wire.take_frame(self._inbox)) is not None:
                reply = self._decoder.decode(body)
                if isinstance(reply, wire.Refusal) and reply.request == 0:
                    return replies, reply.why
                replies.append(reply)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            return replies, str(error)
        return replies, "" if data else "it ended the connection"

    def _greet(self, name: str, by_s: float) -> tuple[int, int]:
        """Say hello; the size and the file descriptor of the arena."""
        fds: list[int] = []
        try:
            self._socket.sendall(wire.frame(wire.Hello(wire.VERSION, name)))
            body = None
            while body is None:
                self._socket.settimeout(max(by_s - time.monotonic(), 0.001))
                data, more, _, _ = sockets.recv_fds(self._socket, RECEIVE_BYTES, 1)
                fds += more
                if not data:
                    raise StoreGone("memory server: it ended the connection before its welcome.")
                self._inbox += data
                body = wire.take_frame(self._inbox)
            reply = self._decoder.decode(body)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise StoreGone(f"memory server: no welcome ({error}).") from error
        if isinstance(reply, wire.Refusal):
            raise StoreGone(f"memory server: {reply.why}.")
        if not isinstance(reply, wire.Welcome) or len(fds) != 1:
            raise StoreGone(f"memory server: {type(reply).__name__} with {len(fds)} file descriptors is no welcome.")
        return reply.arena_bytes, fds[0]


def _let_go(views: Sequence[memoryview | None]) -> None:
    """Make views unusable, but for those that an array was made of: that is for its owner to drop."""
    for view in views:
        if view is not None:
            with contextlib.suppress(BufferError):
                view.release()


def _all_durable(reply: wire.Done) -> None:
    if reply.failed:
        count, first = len(reply.failed), reply.failed[0]
        how = "Free disk room, or add disk=SIZE to --tiers"
        raise WorldError(f"memory: {count} blocks are not on disk, {first} first; they stay where they are. {how}.")
