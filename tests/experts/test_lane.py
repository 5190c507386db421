"""The lane: in order, beside the caller, and what goes wrong on it is heard where somebody waits."""

import gc
import threading
import time
import weakref
from itertools import pairwise

import pytest
import torch

from outrider.errors import WorldError
from outrider.experts.lane import Lane, Span

CPU = torch.device("cpu")


def test_jobs_run_in_order_beside_the_caller() -> None:
    spans: list[Span] = []
    lane, gate, done = Lane(CPU, 10.0, spans), threading.Event(), []

    def first() -> None:
        assert gate.wait(10)
        done.append(1)

    lane.put("first", first)
    ticket = lane.put("second", lambda: done.append(2))
    third = lane.put("third", lambda: done.append(3))
    assert done == [], "the caller waited"
    gate.set()
    lane.wait(ticket)
    assert done[:2] == [1, 2]
    lane.wait(third)
    lane.wait(0)
    lane.drain()
    lane.close()
    assert done == [1, 2, 3]
    assert [span.what for span in spans] == ["first", "second", "third"]
    assert all(a.end_s <= b.begin_s for a, b in pairwise(spans))


def test_what_a_job_raises_is_raised_to_all_who_wait_or_put() -> None:
    lane = Lane(CPU, 10.0)
    ran: list[int] = []

    def fail() -> None:
        raise WorldError("a rank died")

    ticket = lane.put("fails", fail)
    with pytest.raises(WorldError, match="a rank died"):
        lane.wait(ticket)
    with pytest.raises(WorldError, match="a rank died"):
        lane.put("never runs", lambda: ran.append(1))
    with pytest.raises(WorldError, match="a rank died"):
        lane.drain()
    lane.close()
    assert not ran


def test_the_watchdog_says_where_the_lane_is() -> None:
    lane, gate = Lane(CPU, 0.2), threading.Event()
    lane.put("weights, rank to rank", lambda: gate.wait(30) and None)
    begin_s = time.monotonic()
    with pytest.raises(WorldError, match=r"did not end within .* the lane is at weights, rank to rank"):
        lane.drain()
    assert time.monotonic() - begin_s < 10
    gate.set()
    lane.close()


def test_a_lane_that_nobody_holds_ends_and_keeps_nothing() -> None:
    class Weights:
        def job(self) -> None: ...

    lane, held = Lane(CPU, 10.0), Weights()
    lane.wait(lane.put("a job", held.job))
    thread, there = lane._thread, weakref.ref(held)
    assert thread is not None
    del lane, held
    gc.collect()
    thread.join(timeout=10.0)
    assert not thread.is_alive()
    assert there() is None
