"""What a memory policy must be told, and the tiers that this makes. Pure; `server.py` fills it from `--tiers`."""

import msgspec

from outrider.errors import CallerError
from outrider.topology import Link, Place, Topology


class Settings(msgspec.Struct, frozen=True):
    """Bytes, bytes/s and seconds.

    disk_bytes         0: no disk tier
    grain_bytes        every block takes whole grains, and header_bytes more on disk
    disk_read, _write  what the disk moves; measured on a cloud volume: `outrider calibrate` will measure yours
    recompute          KV bytes that an engine's prefill makes a second
    save_bytes         one batch of writes carries about so much
    paths_max          remembered paths, and as many wants
    patience_s         a want so long overdue is given up
    retry_s            rest after the disk refused to write
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

    def __post_init__(self) -> None:
        for name in ("host_bytes", "grain_bytes", "disk_read", "disk_write", "recompute", "save_bytes", "paths_max"):
            if getattr(self, name) <= 0:
                raise CallerError(f"memory: {name} is {getattr(self, name)}. Use a number above 0.")
        for name in ("disk_bytes", "header_bytes", "patience_s", "retry_s"):
            if getattr(self, name) < 0:
                raise CallerError(f"memory: {name} is {getattr(self, name)}. Use 0 or more.")

    def topology(self) -> Topology:
        """Whole grains of each tier, and the two links between them."""
        host = Place("host", self.host_bytes - self.host_bytes % self.grain_bytes)
        if not self.disk_bytes:
            return Topology((host,))
        disk = Place("disk", self.disk_bytes - self.disk_bytes % self.grain_bytes)
        return Topology((host, disk), (Link("disk", "host", self.disk_read), Link("host", "disk", self.disk_write)))
