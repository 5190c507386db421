"""What memory counts, and under which names `Store.stats` reports it. Pure; owned by `policy.py`.

hit_blocks, miss_blocks      blocks of leases that were granted, and that were not
hit_blocks_by_tier           the granted ones by where they lay when they were asked for: host, hybrid, disk
moved_bytes                  by way: "engine->host" saved, "host->engine" leased, "host->disk", "hybrid->cache", ...
evictions                    copies that left a tier to make room; those of `cache` lie in `hybrid` still
checksum_failures            copies that were not what was stored: dropped, never served
disk_failures                other failures of the disk tier, by reason: ENOSPC, EIO, ...; hybrid_failures likewise
refused_blocks               blocks that found no room in host; unsaved_blocks: not worth a place in a tier below
wants_met, wants_late        wants whose context came back with every block in host, or not
wants_expired, wasted_bytes  wants given up; bytes lifted for wants and never leased
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outrider.memory.residency import Residency

DAMAGE = ("checksum", "stale", "short")


@dataclass(slots=True)
class Tally:
    """Counters since the start of the policy object."""

    hit_blocks: int = 0
    miss_blocks: int = 0
    refused_blocks: int = 0
    unsaved_blocks: int = 0
    recovered_blocks: int = 0
    checksum_failures: int = 0
    wants_met: int = 0
    wants_late: int = 0
    wants_expired: int = 0
    wasted_bytes: int = 0
    moved_bytes: dict[str, int] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    disk_failures: dict[str, int] = field(default_factory=dict)
    hybrid_failures: dict[str, int] = field(default_factory=dict)
    hit_blocks_by_tier: dict[str, int] = field(default_factory=dict)

    def granted(self, hits: int, misses: int, lay: Mapping[str, int]) -> None:
        self.hit_blocks += hits
        self.miss_blocks += misses
        for place, count in lay.items():
            self.hit_blocks_by_tier[place] = self.hit_blocks_by_tier.get(place, 0) + count

    def moved(self, src: str, dst: str, size_bytes: int) -> None:
        way = f"{src}->{dst}"
        self.moved_bytes[way] = self.moved_bytes.get(way, 0) + size_bytes

    def evicted(self, place: str) -> None:
        self.evictions[place] = self.evictions.get(place, 0) + 1

    def failure(self, reason: str, tier: str) -> None:
        if reason in DAMAGE:
            self.checksum_failures += 1
        else:
            failures = self.hybrid_failures if tier == "hybrid" else self.disk_failures
            failures[reason] = failures.get(reason, 0) + 1

    def report(self, residency: Residency, **extra: int) -> dict[str, Any]:
        """Counters, and what each tier holds now."""
        counters: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        tiers: dict[str, dict[str, int]] = {}
        for place in residency.places:
            tiers[place] = {
                "capacity_bytes": residency.ledger.capacity_bytes(place),
                "used_bytes": residency.ledger.used_bytes[place],
                "free_bytes": residency.ledger.free_bytes(place),
                "blocks": residency.here[place],
            }
        return counters | extra | {"tiers": tiers}
