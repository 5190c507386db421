"""What a memory policy must be told, and the tiers that this makes. Pure; `server.py` fills it from `--tiers`."""

import msgspec

from outrider.errors import CallerError
from outrider.topology import Link, Place, Topology

PLACES = ("host", "hybrid", "cache", "disk")
BELOW = ("hybrid", "disk")  # where host's blocks are saved to, fastest first
SOURCES = ("cache", "hybrid", "disk")  # where host's blocks come from, fastest first


class Hybrid(msgspec.Struct, frozen=True):
    """A CXL-hybrid device: bytes and bytes/s.

    cache_bytes     of the device's own cache, how much wants may fill ahead of time; 0: none
    pin             whether the device can keep there what was prefetched, until it is told otherwise
    line_bytes      blocks take whole lines of it
    read, hit_read  what it gives on a miss and on a hit of its cache; `write` what it takes
    """

    size_bytes: int
    cache_bytes: int = 0
    pin: bool = True
    line_bytes: int = 1 << 16
    read: float = 1.2e9
    hit_read: float = 8.0e9
    write: float = 1.0e9

    def __post_init__(self) -> None:
        for name in ("size_bytes", "line_bytes", "read", "hit_read", "write"):
            if getattr(self, name) <= 0:
                raise CallerError(f"memory: hybrid.{name} is {getattr(self, name)}. Use a number above 0.")
        if self.cache_bytes < 0:
            raise CallerError(f"memory: hybrid.cache_bytes is {self.cache_bytes}. Use 0 or more.")


class Settings(msgspec.Struct, frozen=True):
    """Bytes, bytes/s and seconds.

    disk_bytes         0: no disk tier
    grain_bytes        every block takes whole grains, and header_bytes more on disk
    disk_read, _write  what the disk moves; measured on a cloud volume: `outrider calibrate` will measure yours
    recompute          KV bytes that an engine's prefill makes a second
    save_bytes         one batch of writes carries about so much
    paths_max          remembered paths, and as many wants
    patience_s         a want so long overdue is given up
    retry_s            rest after a tier refused to write
    hybrid             None: no hybrid tier
    """

    host_bytes: int
    disk_bytes: int = 0
    grain_bytes: int = 4096
    header_bytes: int = 4096
    disk_read: float = 1.2e9
    disk_write: float = 1.0e9
    recompute: float = 1.0e8
    save_bytes: int = 32 << 20
    paths_max: int = 4096
    patience_s: float = 120.0
    retry_s: float = 2.0
    hybrid: Hybrid | None = None

    def __post_init__(self) -> None:
        for name in ("host_bytes", "grain_bytes", "disk_read", "disk_write", "recompute", "save_bytes", "paths_max"):
            if getattr(self, name) <= 0:
                raise CallerError(f"memory: {name} is {getattr(self, name)}. Use a number above 0.")
        for name in ("disk_bytes", "header_bytes", "patience_s", "retry_s"):
            if getattr(self, name) < 0:
                raise CallerError(f"memory: {name} is {getattr(self, name)}. Use 0 or more.")

    def topology(self) -> Topology:
        """Whole grains of each tier that there is, fastest first, and what blocks travel on.

        `cache` is the part of the hybrid device's cache that wants may fill: blocks come to lie there as well as in
        `hybrid`, never instead. Nothing but a prefetch leads there.
        """
        hybrid = self.hybrid
        sizes = {"host": self.host_bytes, "disk": self.disk_bytes}
        speeds = {("disk", "host"): self.disk_read, ("host", "disk"): self.disk_write}
        if hybrid is not None:
            sizes |= {"hybrid": hybrid.size_bytes, "cache": hybrid.cache_bytes}
            speeds |= {
                ("hybrid", "host"): hybrid.read,
                ("cache", "host"): hybrid.hit_read,
                ("hybrid", "cache"): hybrid.read,
                ("host", "hybrid"): hybrid.write,
                ("hybrid", "disk"): self.disk_write,
            }
        whole = {place: size - size % self.grain(place) for place, size in sizes.items()}
        places = tuple(Place(place, whole[place]) for place in PLACES if whole.get(place))
        links = [Link(src, dst, rate) for (src, dst), rate in speeds.items() if whole[src] and whole[dst]]
        return Topology(places, tuple(links))

    def grain(self, place: str) -> int:
        """Every block takes whole grains of so many bytes in `place`."""
        return self.hybrid.line_bytes if self.hybrid is not None and place in ("hybrid", "cache") else self.grain_bytes

    def room_bytes(self, place: str, size_bytes: int) -> int:
        """What a block of `size_bytes` takes in `place`: whole grains, and a header where the tier writes one."""
        grain_bytes = self.grain(place)
        return -(-size_bytes // grain_bytes) * grain_bytes + (self.header_bytes if place == "disk" else 0)

    def read_rate(self, place: str) -> float:
        """Bytes/s at which a block at `place`, a tier below host, comes to host."""
        if self.hybrid is not None and place in ("hybrid", "cache"):
            return self.hybrid.read if place == "hybrid" else self.hybrid.hit_read
        return self.disk_read
