"""Child processes that never outlive their parent. Used by the demo and the end-to-end tests.

Each child leads its own session, so that Ctrl-C reaches the parent alone and the parent decides the order of ending.
A child dies with its parent, even by kill -9 (`tether.py`).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

from outrider.errors import WorldError

POLITE_S = 1.2  # after this long a child that was asked to end is killed: all are gone within 2 seconds


class Child:
    """One running `outrider` command: its process, what it logs, and where it answers."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash would: nothing is cleaned up by the child itself."""
        self.process.kill()
        self.process.wait()

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, for an error message."""
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return " | ".join(text.splitlines()[-lines:]) or "(it said nothing)"


class Children:
    """A context in which children run; leaving it, for whatever reason, ends them all within 2 seconds."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._children: list[Child] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def outrider(self, name: str, *arguments: str) -> Child:
        """Start `outrider ARGUMENTS` under the interpreter that runs us."""
        return self.start(name, [sys.executable, "-m", "outrider", *arguments])

    def start(self, name: str, command: Sequence[str], more: Mapping[str, str] = MappingProxyType({})) -> Child:
        """Start `command`, with `more` environment variables than ours."""
        log = self.log_dir / f"{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.log_dir / "torch"),  # torch makes one on import: it must go with us
            **more,
        }
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "outrider.lab.tether", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def end(self) -> None:
        """Ask all to end, then kill what is left: nothing runs when this returns."""
        running = [child for child in self._children if child.running]
        for child in running:
            child.process.terminate()
        by_s = time.monotonic() + POLITE_S
        for child in running:
            try:
                child.process.wait(timeout=max(0.0, by_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_session(child.process)
        for child in running:
            child.process.wait()
        self._children.clear()


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended between the wait and the kill


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_http(child: Child, url: str, within_s: float) -> None:
    """Return when `url` answers 200. WorldError, with the child's last words, when it died or the time is up."""
    by_s = time.monotonic() + within_s
    while time.monotonic() < by_s:
        if not child.running:
            raise WorldError(f"{child.name} ended with code {child.process.returncode} at start: {child.last_words()}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise WorldError(f"{child.name} did not answer {url} within {within_s:.0f} s: {child.last_words()}")


def await_path(child: Child, path: Path, within_s: float) -> None:
    """Return when `path` exists (a server's socket). WorldError as `await_http`."""
    by_s = time.monotonic() + within_s
    while time.monotonic() < by_s:
        if path.exists():
            return
        if not child.running:
            raise WorldError(f"{child.name} ended with code {child.process.returncode} at start: {child.last_words()}")
        time.sleep(0.02)
    raise WorldError(f"{child.name} made no {path} within {within_s:.0f} s: {child.last_words()}")
