"""Each request gets exactly one answer, whatever dies; nothing of it stays behind. Correctness list 1-3, 17, live."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from outrider import journal
from outrider.agents.events import Event
from outrider.agents.gateway import Gateway
from outrider.agents.policy import Policy
from outrider.agents.settings import GatewaySettings
from outrider.errors import CallerError

FULL = Path("/dev/full")


async def ask(gate: Any, body: Any = None, **options: Any) -> tuple[int, bytes, Any]:
    async with gate.post(body, **options) as answer:
        return answer.status, await answer.read(), answer.headers


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_engine_killed_before_the_first_byte_costs_time_only(farm: Any, door: Any, streamed: bool) -> None:
    first, second = engines = await farm(2)
    first.behave = "hang"
    gate = await door(engines)
    asked = asyncio.create_task(ask(gate, {"stream": streamed}))
    await first.arrived.wait()
    await first.kill()
    status, body, headers = await asked
    assert (status, headers["Outrider-Engine"]) == (200, second.url)
    assert body
    assert (len(first.seen), len(second.seen)) == (1, 1)
    status, _, headers = await ask(gate)  # it stays out until it answers again
    assert headers["Outrider-Engine"] == second.url
    first.behave = "well"
    await first.start()
    await gate.until(lambda: gate.policy.engines[first.url].alive)


async def test_a_whole_answer_whose_engine_dies_in_its_middle_is_asked_for_again(farm: Any, door: Any) -> None:
    first, _ = engines = await farm(2)
    first.behave = "die_middle"
    gate = await door(engines)
    status, body, headers = await ask(gate)
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 7
    assert headers["Outrider-Engine"] != first.url
    story = await gate.get(headers["Outrider-Explain"])
    assert [failure["kind"] for failure in story["failures"]] == ["reset"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_stream_that_breaks_ends_with_an_error_event(farm: Any, door: Any, path: str) -> None:
    first, second = engines = await farm(2)
    first.behave = second.behave = "die_middle"
    gate = await door(engines)
    status, body, _ = await ask(gate, {"stream": True}, path=path)
    assert status == 200
    assert len(first.seen) + len(second.seen) == 1, "no second try once a byte was sent"
    events = body.decode().split("\n\n")
    assert events.pop() == "", "it ends with a whole event"
    last = events.pop()
    for event in events:
        json.loads(event.removeprefix("data: "))  # no torn event before it
    if path == "/v1/messages":
        assert last.startswith("event: error\ndata: ")
        assert json.loads(last.split("data: ")[1])["type"] == "error"
    else:
        assert "broke off" in json.loads(last.removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("behave", ["500", "503"])
async def test_5xx_is_tried_elsewhere_and_else_relayed(farm: Any, door: Any, behave: str) -> None:
    first, second = engines = await farm(2)
    gate = await door(engines, limits={"probe_every_s": 30.0})
    first.behave = behave
    status, _, headers = await ask(gate)
    assert (status, headers["Outrider-Engine"]) == (200, second.url)
    second.behave = behave
    status, body, _ = await ask(gate)
    assert status == int(behave)
    assert b"CUDA error" in body, "the engine's own words"


async def test_a_request_that_breaks_every_engine_is_given_up(farm: Any, door: Any) -> None:
    first, second = engines = await farm(2)
    first.behave = second.behave = "die_before"
    gate = await door(engines, limits={"attempts": 3})
    status, body, _ = await ask(gate)
    assert status == 502
    assert "3 attempts broke" in json.loads(body)["error"]["message"]
    assert len(first.seen) + len(second.seen) == 3


async def test_no_engine_alive_is_503_after_a_bounded_wait(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    gate = await door(engines, limits={"no_engine_s": 0.2})
    await engine.kill()
    began_s = time.monotonic()
    status, body, headers = await ask(gate)
    assert 0.15 < time.monotonic() - began_s < 2
    assert status == 503
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert engine.url in json.loads(body)["error"]["message"]
    assert (await gate.get("/health"))["status"] == "down"
    async with gate.session.get(gate.url + "/v1/models") as answer:
        assert answer.status == 503


async def test_a_call_outlives_its_only_engines_restart(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    gate = await door(engines)
    await engine.kill()
    asked = asyncio.create_task(ask(gate))
    await asyncio.sleep(0.1)
    await engine.start()
    assert (await asked)[0] == 200


@pytest.mark.parametrize("phase", ["queued", "prefill", "whole", "stream"])
async def test_a_client_that_goes_leaves_nothing(farm: Any, door: Any, phase: str) -> None:
    """Upstream closed within 100 ms; line, credit and reservation released (the door fixture checks the counters)."""
    engine, *_ = engines = await farm(1)
    engine.behave = "hang_middle" if phase == "stream" else "hang"
    gate = await door(engines, credit=1)
    body = {"stream": phase in ("stream", "prefill")}
    asked = asyncio.create_task(ask(gate, body))
    await engine.arrived.wait()
    if phase == "queued":
        second = asyncio.create_task(ask(gate))
        await gate.until(lambda: len(gate.policy.line) == 1)
        second.cancel()
        await gate.until(lambda: not len(gate.policy.line), within_s=0.1)
    if phase == "stream":
        await asyncio.sleep(0.05)
    asked.cancel()
    async with asyncio.timeout(0.1):
        await engine.closed.wait()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    assert gate.policy.tally.commands["Abort"] == (2 if phase == "queued" else 1)


@pytest.mark.parametrize(("behave", "streamed"), [("hang", True), ("hang", False)])
async def test_no_first_byte_in_time_is_504(farm: Any, door: Any, behave: str, streamed: bool) -> None:
    engine, *_ = engines = await farm(1)
    engine.behave = behave
    gate = await door(engines, limits={"first_byte_s": 0.1})
    status, body, _ = await ask(gate, {"stream": streamed})
    assert status == 504
    assert "in time" in json.loads(body)["error"]["message"]
    async with asyncio.timeout(0.1):
        await engine.closed.wait()


async def test_a_stream_that_stalls_ends_with_an_error_event(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.behave = "hang_middle"
    gate = await door(engines, limits={"total_s": 0.2})
    status, body, _ = await ask(gate, {"stream": True})
    assert status == 200
    assert "error" in json.loads(body.decode().split("\n\n")[-2].removeprefix("data: "))


async def test_waiting_too_long_is_504(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.behave = "hang"
    gate = await door(engines, credit=1, limits={"total_s": 0.3})
    answers = await asyncio.gather(*(ask(gate) for _ in range(3)))
    assert [status for status, _, _ in answers] == [504] * 3


async def test_a_full_line_is_429_and_a_burst_is_answered_once_each(farm: Any, door: Any) -> None:
    first, second = engines = await farm(2)
    first.delay_s = second.delay_s = 0.02
    gate = await door(engines, credit=2, queue_limit=10)
    answers = await asyncio.gather(*(ask(gate, {"user": str(i)}) for i in range(40)))
    statuses = [status for status, _, _ in answers]
    assert sorted(statuses) == [200] * 14 + [429] * 26
    refused = next(headers for status, _, headers in answers if status == 429)
    assert 1 <= int(refused["Retry-After"]) <= 60
    assert max(first.most_running, second.most_running) == 2, "credit holds"
    assert len(first.seen) + len(second.seen) == 14


async def test_a_body_over_the_limit_is_413(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    gate = await door(engines, limits={"body_bytes": 1000})
    status, body, _ = await ask(gate, b"x" * 1001)
    assert status == 413
    assert "body_bytes" in json.loads(body)["error"]["message"]

    async def pieces() -> Any:
        for _ in range(20):
            yield b"y" * 100

    async with gate.session.post(gate.url + "/v1/messages", data=pieces()) as answer:  # no length named
        assert answer.status == 413
        assert (await answer.json())["error"]["type"] == "request_too_large"
    assert not engine.seen


async def test_a_large_whole_answer_is_let_through_unbuffered(farm: Any, door: Any) -> None:
    engine, *_ = engines = await farm(1)
    engine.answer = json.dumps({"pad": "x" * 300_000, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}).encode()
    gate = await door(engines, limits={"answer_bytes": 1000})
    status, body, headers = await ask(gate)
    assert (status, body) == (200, engine.answer)
    assert (await gate.get(headers["Outrider-Explain"]))["actual"]["output_tokens"] == 2


async def test_a_call_goes_where_its_model_is(farm: Any, door: Any) -> None:
    (first,), (second,) = await farm(1, models=("a",)), await farm(1, models=("b",))
    gate = await door([first, second])
    for model, engine in (("b", second), ("a", first), ("b", second)):
        assert (await ask(gate, {"model": model}))[2]["Outrider-Engine"] == engine.url


async def test_the_journal_replays_and_holds_no_secret(farm: Any, door: Any) -> None:
    """Real traffic with deaths in it: the same commands, byte for byte, and neither keys nor words of a prompt."""
    first, *_ = engines = await farm(2)
    gate = await door(engines, credit=2, memory_attached=True)
    secret = {"Authorization": "Bearer sk-secret-1", "x-api-key": "sk-secret-2", "Outrider-Workflow": "wf"}
    said = [{"role": "user", "content": "the launch code is zq-4711"}]
    for turn in range(3):
        first.behave = ("well", "die_before", "die_middle")[turn]
        headers = {**secret, "Outrider-Role": "coder", "Outrider-Stage": f"code/{turn}"}
        if turn == 2:
            headers["Outrider-Final"] = "true"
        await asyncio.gather(*(ask(gate, {"messages": said, "stream": s}, headers=headers) for s in (True, False)))
        said += [{"role": "assistant", "content": "launch what?"}, {"role": "user", "content": "launch again"}]
    await gate.calm()
    text = gate.journal.read_text()
    assert "wf" in text
    for hidden in ("sk-secret", "launch", "zq-4711"):
        assert hidden not in text
    agreed, difference = journal.replay(
        gate.journal, Event, lambda raw: Policy(msgspec.json.decode(raw, type=GatewaySettings))
    )
    assert difference is None
    assert agreed > 20
    wanted = {want.item for want in gate.wants if want.saved_s > 0}
    withdrawn = {want.item for want in gate.wants if want.saved_s <= 0}
    assert wanted
    assert wanted == withdrawn, "a final call ends every want of its workflow"


async def test_a_journal_that_cannot_be_written_stops_no_call(farm: Any, door: Any, caplog: Any) -> None:
    engines = await farm(1)
    gate = await door(engines)
    gate.gateway.mover._journal._file.close()
    with caplog.at_level(logging.ERROR, "outrider.journal"), FULL.open("wb", buffering=0) as full:  # noqa: ASYNC230
        gate.gateway.mover._journal._file = full
        assert (await ask(gate))[0] == 200
    assert "No space left" in caplog.text


async def test_a_taken_port_and_a_missing_directory_are_said_in_a_sentence(farm: Any, tmp_path: Path) -> None:
    engine, *_ = await farm(1)
    settings = GatewaySettings(engines=(engine.url,), port=engine.port)
    gateway = Gateway(settings)
    with pytest.raises(CallerError, match=rf"port 127\.0\.0\.1:{engine.port} is in use"):
        await gateway.start()
    with pytest.raises(CallerError, match="journal"):
        Gateway(settings, journal=tmp_path / "no")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_within_a_second_though_calls_are_open(number: signal.Signals, tmp_path: Path) -> None:
    """The process itself: exit code 0, no traceback, port free again."""
    with socket.socket() as free, socket.socket() as silent:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # an engine that accepts and says nothing
        code = (
            "from outrider.agents.gateway import serve; from outrider.agents.settings import GatewaySettings as S;"
            f"serve(S(engines=('http://127.0.0.1:{silent.getsockname()[1]}',), port={port}), None, None)"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert child.stderr is not None
            assert "ready on" in child.stderr.readline()
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                time.sleep(0.2)
                began_s = time.monotonic()
                child.send_signal(number)
                child.wait(timeout=5)
                took_s = time.monotonic() - began_s
            assert child.returncode == 0
            assert "Traceback" not in child.stderr.read()
            assert took_s < 1.0
        finally:
            child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


async def test_a_silent_client_is_not_waited_for(farm: Any, door: Any) -> None:
    """A body that never comes holds no line, no credit; the connection's end is noticed."""
    engines = await farm(1)
    gate = await door(engines)
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.gateway.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\nhalf")
    await writer.drain()
    assert (await ask(gate))[0] == 200
    writer.close()
    await writer.wait_closed()
    assert gate.policy.tally.calls == 1
    assert isinstance(gate.session, aiohttp.ClientSession)
    assert reader is not None
