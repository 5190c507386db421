"""The courier between agents and memory: in order, never in the way, and it says when wants are lost."""

import logging
import threading
import time
from pathlib import Path

import pytest

import outrider.memory as memory
from outrider import stack
from outrider.lab.processes import Children, await_path
from outrider.stack import Courier
from outrider.wants import Want

pytestmark = pytest.mark.slow


def want(number: int) -> Want:
    return Want(f"call-{number}", "host", by_s=time.monotonic() + 60, saved_s=1.0)


def until(condition, within_s: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    by_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < by_s, "not within its time"
        time.sleep(0.02)


def open_wants(socket: Path) -> int:
    with memory.connect(socket, timeout_s=2.0, name="test") as store:
        return int(store.stats()["open_wants"])


def test_wants_reach_a_real_server_also_after_its_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    socket = tmp_path / "m.sock"
    arguments = ("memory", "serve", "--socket", str(socket), "--tiers", "host=16MiB")
    courier = Courier(socket)
    try:
        with caplog.at_level(logging.WARNING, "outrider.stack"), Children(tmp_path) as children:
            courier.send(want(0))
            until(lambda: courier.dropped == 1)
            for name in ("first", "second"):
                server = children.outrider(name, *arguments)
                await_path(server, socket, 20)

                def arrives() -> bool:
                    courier.send(want(1))
                    return open_wants(socket) == 1

                until(arrives)
                server.kill()
                socket.unlink()
    finally:
        courier.close()
    assert caplog.text.count("no wants reach it, calls go on") >= 1
    assert caplog.text.count("reached again") >= 2


def test_sending_never_waits_and_a_full_queue_drops_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    gate, entered = threading.Event(), threading.Event()

    class Slow:
        def want(self, one: Want) -> None:
            entered.set()
            gate.wait(10)
            seen.append(one.item)

        def close(self) -> None:
            pass

    monkeypatch.setattr(stack, "WAITING_WANTS", 3)
    monkeypatch.setattr(memory, "connect", lambda *_, **__: Slow())
    courier = Courier(tmp_path / "m.sock")
    courier.send(want(0))
    assert entered.wait(5)
    began_s = time.monotonic()
    for number in range(1, 6):
        courier.send(want(number))
    assert time.monotonic() - began_s < 1.0
    gate.set()
    until(lambda: len(seen) == 4)
    courier.close()
    assert seen == ["call-0", "call-3", "call-4", "call-5"]
    assert courier.dropped == 2


def test_closing_is_prompt_without_a_server(tmp_path: Path) -> None:
    courier = Courier(tmp_path / "no.sock")
    for number in range(5000):
        courier.send(want(number))
    began_s = time.monotonic()
    courier.close()
    assert time.monotonic() - began_s < 1.5
