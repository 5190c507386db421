"""The lane beside compute on which weights and gradients travel: a thread, and on CUDA a stream. Not pure.

Jobs are done one after another, in the order in which they were put, which is the same on every rank; so a job may be
an exchange between ranks. On CUDA a job waits for what compute had launched when it was put, and who waits for a job
lets its own stream wait: neither blocks the host. Whatever a job raises is raised again to the next who waits or puts.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from outrider.errors import WorldError

Job = Callable[[], None]
Entry = tuple[int, str, int, Job, Any]  # ticket, what, layer, job, CUDA: the event behind what compute had launched
CLOSE_S = 1.0  # for a job under way


class Span(msgspec.Struct, frozen=True):
    """Something that took time, on this rank's clock (time.perf_counter). layer: -1 for no one layer."""

    what: str
    layer: int
    begin_s: float
    end_s: float


class Lane:
    """watchdog_s: whoever waits longer for a job gives up with a WorldError. spans: None, or what gets a Span a job."""

    def __init__(self, device: torch.device, watchdog_s: float, spans: list[Span] | None = None) -> None:
        self.watchdog_s, self.spans = watchdog_s, spans
        self._cuda: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ended: dict[int, Any] = {}  # CUDA: the event behind a job
        self._jobs: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        weakref.finalize(self, self._jobs.put, None).atexit = False  # who wakes while Python ends may bring it down
        self._turn = threading.Condition()
        self._put = self._done = 0
        self._doing: tuple[str, float] | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, what: str, job: Job, layer: int = -1) -> int:
        """Queue a job; its ticket. `what` names it to people; layer: whose turn it is for."""
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._jobs, weakref.ref(self)), name="outrider-experts-lane", daemon=True
            )
            self._thread.start()
        self._put += 1
        launched = None
        if self._cuda is not None:
            launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.record(torch.cuda.current_stream(self._cuda.device))
        self._jobs.put((self._put, what, layer, job, launched))
        return self._put

    def wait(self, ticket: int) -> None:
        """Until this job and all before it are done. WorldError after `watchdog_s`; what a job raised, raised again."""
        with self._turn:
            by_s = time.monotonic() + self.watchdog_s
            while self._done < ticket and self._error is None:
                if not self._turn.wait(max(0.0, by_s - time.monotonic())) and time.monotonic() >= by_s:
                    what, since_s = self._doing or ("nothing", by_s)
                    raise WorldError(
                        f"experts: transfer {ticket} did not end within {self.watchdog_s:.0f} s; the lane is at {what}"
                        f" since {time.monotonic() - since_s:.1f} s. No weight was changed in this step. Look at the"
                        " rank that fell behind, or set a longer timeout_s."
                    )
            self._raise()
            if self._cuda is not None:
                for done in [n for n in self._ended if n <= ticket]:
                    torch.cuda.current_stream(self._cuda.device).wait_event(self._ended.pop(done))

    def drain(self) -> None:
        """Until everything that was put is done."""
        self.wait(self._put)

    def close(self) -> None:
        """No job comes any more. Does not wait for one that hangs."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=0.0 if self._error else CLOSE_S)
            self._thread = None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _do(self, ticket: int, what: str, layer: int, job: Job, launched: Any) -> bool:
        """Whether it went well."""
        begin_s = time.perf_counter()
        self._doing = what, time.monotonic()
        try:
            with torch.no_grad():
                self._on_stream(ticket, job, launched)
        except BaseException as error:
            with self._turn:
                self._error = error
                self._turn.notify_all()
            return False
        if self.spans is not None:
            self.spans.append(Span(what, layer, begin_s, time.perf_counter()))
        with self._turn:
            self._done, self._doing = ticket, None
            self._turn.notify_all()
        return True

    def _on_stream(self, ticket: int, job: Job, launched: Any) -> None:
        if self._cuda is None:
            job()
            return
        with torch.cuda.stream(self._cuda):
            self._cuda.wait_event(launched)
            job()
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._cuda)
        with self._turn:  # who waits walks through these
            self._ended[ticket] = ended


def _work(jobs: "queue.SimpleQueue[Entry | None]", lane_of: "weakref.ref[Lane]") -> None:
    """The thread. It keeps no lane alive that nobody else holds, and ends with it."""
    while (entry := jobs.get()) is not None:
        lane = lane_of()
        if lane is None or not lane._do(*entry):
            return
        del entry, lane
