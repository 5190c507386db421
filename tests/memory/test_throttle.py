"""Device profiles: what a throttled device may move in a time, on a clock of our own and on the real one."""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import CallerError
from outrider.memory.tiers.emulated import Emulated
from outrider.memory.tiers.throttle import PROFILES, Bucket, Profile, Throttle, profile_named

SLOW = Profile("slow", read=100.0, write=50.0, mix=120.0, miss_s=0.5)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-6)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 3)), min_size=1, max_size=30))
def test_no_order_of_transfers_beats_the_rate(transfers: list[tuple[int, float]]) -> None:
    """Between any two moments no more goes through than rate times time, and the burst."""
    bucket, now = Bucket(100.0, burst_bytes=20), 0.0
    ends: list[tuple[float, float, int]] = []
    for size, pause_s in transfers:
        now += pause_s
        ends.append((now, bucket.take(size, now), size))
    for first in range(len(ends)):
        for last in range(first, len(ends)):
            moved = sum(size for _, _, size in ends[first : last + 1])
            assert moved <= 100.0 * (ends[last][1] - ends[first][0]) + 20 + 1e-6
    assert bucket.take(100, now + 1e6) == pytest.approx(now + 1e6 + 0.8)  # rested: the burst is there again


def test_reads_writes_and_both_have_their_rates() -> None:
    clock = Clock()
    throttle = Throttle(SLOW, clock, clock.sleep)
    throttle.end(throttle.begin_read(200))
    assert clock.now == pytest.approx(12.0, abs=1e-3)
    throttle.end(throttle.begin_write(100))
    assert clock.now == pytest.approx(14.0, abs=1e-3)
    read_due_s, write_due_s = throttle.begin_read(120), throttle.begin_write(60)  # at once: 180 bytes at 120/s
    assert read_due_s == pytest.approx(15.2, abs=1e-3) and write_due_s == pytest.approx(15.5, abs=1e-3)


def test_a_miss_has_a_floor_and_a_hit_has_none() -> None:
    clock = Clock()
    throttle = Throttle(SLOW, clock, clock.sleep)
    throttle.end(throttle.begin_read(1))
    assert clock.now < 10.1
    throttle.end(throttle.begin_read(1), missed_at_s=clock.now)
    assert clock.now >= 10.5


def test_a_device_holds_its_profiles_rate_with_two_readers(tmp_path: Path) -> None:
    """On the real clock: never faster than the profile, and, generously, not much slower."""
    profile = Profile("test", read=64e6, write=64e6, mix=64e6, miss_s=1e-3)
    device = Emulated(tmp_path, 4 << 20, 2 << 20, profile)
    for at in range(0, 1 << 20, 1 << 16):
        device.write(at, memoryview(bytes(1 << 16)))

    def read() -> None:
        into = memoryview(bytearray(1 << 17))
        for turn in range(8):
            device.read(turn << 16, into)

    readers = [threading.Thread(target=read) for _ in range(2)]
    began_s = time.monotonic()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    took_s, least_s = time.monotonic() - began_s, 2 * 8 * (1 << 17) / 64e6
    assert least_s * 0.99 <= took_s <= least_s * 3
    into = memoryview(bytearray(4096))
    began_s = time.monotonic()
    device.read(3 << 20, into)
    assert time.monotonic() - began_s >= 1e-3
    device.close()


def test_profiles_are_ours_and_say_when_they_are_scaled() -> None:
    assert list(PROFILES) == ["ours-22", "ours-18", "ours-22-by-10", "ours-18-by-10"]
    assert profile_named("ours-18-by-10").read == pytest.approx(1.8e9)
    assert profile_named("ours-22").read == 22e9
    with pytest.raises(CallerError, match=r"no profile 'theirs'\. Use ours-22, ours-18"):
        profile_named("theirs")
