"""How fast an emulated device may be: token buckets for reads, writes and both together, and a floor under a miss.

Buckets are pure, told the time; `Throttle` reads the clock and waits. The profiles are ours. No figure of the paper's
device was published: 22 and 18 GB/s are the mixed and the pure read rate of a public CXL memory module (17.8 GB/s
read, 23.6 and 27.2 mixed, 250 ns), taken as two plausible devices. Those that end in `-by-10` run at a tenth, for
machines whose memory cannot outrun the full ones.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from outrider.errors import CallerError

SPIN_S = 5e-5  # sleeping is that coarse


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes/s of reads, writes and of both together; seconds that a miss takes at least."""

    name: str
    read: float
    write: float
    mix: float
    miss_s: float

    def by(self, factor: int) -> "Profile":
        """The same device, so many times slower in bandwidth; latencies stay."""
        return Profile(
            f"{self.name}-by-{factor}", self.read / factor, self.write / factor, self.mix / factor, self.miss_s
        )


OURS_22 = Profile("ours-22", read=22e9, write=22e9, mix=27e9, miss_s=60e-6)
OURS_18 = Profile("ours-18", read=18e9, write=18e9, mix=27e9, miss_s=60e-6)
PROFILES: Mapping[str, Profile] = MappingProxyType(
    {profile.name: profile for profile in (OURS_22, OURS_18, OURS_22.by(10), OURS_18.by(10))}
)


def profile_named(name: str) -> Profile:
    """CallerError, one sentence, for one that there is not."""
    if name not in PROFILES:
        raise CallerError(f"tiers.hybrid: no profile {name!r}. Use {', '.join(PROFILES)}, or leave it out.")
    return PROFILES[name]


class Bucket:
    """Tokens of `rate` bytes/s; while idle up to `burst_bytes` of them gather."""

    def __init__(self, rate: float, burst_bytes: int = 0) -> None:
        self._rate, self._burst_s = rate, burst_bytes / rate
        self._free_at_s = float("-inf")

    def take(self, size_bytes: int, now: float) -> float:
        """Take tokens for a transfer that begins at `now`; when it may end at the earliest."""
        self._free_at_s = max(self._free_at_s, now - self._burst_s) + size_bytes / self._rate
        return self._free_at_s


class Throttle:
    """Holds every transfer back to the profile's rates. Thread-safe: transfers at the same time share them."""

    def __init__(
        self, profile: Profile, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.profile = profile
        self._clock, self._sleep = clock, sleep
        self._read, self._write, self._mix = Bucket(profile.read), Bucket(profile.write), Bucket(profile.mix)
        self._lock = threading.Lock()

    def begin_read(self, size_bytes: int) -> float:
        """A read begins; when it may end."""
        return self._begin(self._read, size_bytes)

    def begin_write(self, size_bytes: int) -> float:
        return self._begin(self._write, size_bytes)

    def end(self, due_s: float, missed_at_s: float | None = None) -> None:
        """A transfer is done but for the time it should have taken; a miss that began at `missed_at_s` has a floor."""
        if missed_at_s is not None:
            due_s = max(due_s, missed_at_s + self.profile.miss_s)
        while (rest_s := due_s - self._clock()) > 0:
            self._sleep(rest_s - SPIN_S if rest_s > 2 * SPIN_S else 0)

    def _begin(self, bucket: Bucket, size_bytes: int) -> float:
        with self._lock:
            now = self._clock()
            return max(bucket.take(size_bytes, now), self._mix.take(size_bytes, now))
