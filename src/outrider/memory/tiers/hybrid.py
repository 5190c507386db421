"""The hybrid tier: blocks on a CXL-hybrid device, whichever device that is. Live; carries bytes, decides nothing.

Volatile: what lies here is gone with the server, as no index is kept; `disk` is the durable tier. Every block is
verified on arrival (law 1): a device can corrupt what it holds, an emulated one can lose it to its medium.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from outrider.errors import CallerError
from outrider.memory.events import Copy, Span
from outrider.memory.settings import Hybrid
from outrider.memory.tiers import mapped
from outrider.memory.tiers.device import HybridDevice, Ticket
from outrider.memory.tiers.emulated import LINE_BYTES, MEMORY_RATE, Emulated, expected_rates
from outrider.memory.tiers.mapped import open_dax, open_node
from outrider.memory.tiers.spec import HybridSpec
from outrider.memory.tiers.throttle import profile_named
from outrider.memory.tiers.tier import name_of, verify


def open_device(spec: HybridSpec, directory: Path | None) -> HybridDevice:
    """The device that `--tiers` asks for. CallerError, one sentence, where it cannot be had."""
    if spec.dax is not None:
        return open_dax(spec.dax, spec.cache_bytes)
    if spec.node is not None:
        return open_node(spec.node, spec.size_bytes, spec.cache_bytes)
    assert directory is not None  # spec.py asks for one
    profile = profile_named(spec.profile) if spec.profile else None
    return Emulated(directory, spec.size_bytes, spec.cache_bytes, profile)


def modelled(spec: HybridSpec) -> Hybrid:
    """What the policy would be told of this device, were it opened: for simulations. CallerError for a dax device."""
    if spec.dax is not None:
        raise CallerError(f"tiers.hybrid: {spec.dax} cannot be simulated. Use hybrid=SIZE,cache=SIZE.")
    if spec.node is not None:
        rates, line_bytes, pinned_bytes = (MEMORY_RATE,) * 3, mapped.LINE_BYTES, 0
    else:
        rates = expected_rates(profile_named(spec.profile) if spec.profile else None)
        line_bytes = LINE_BYTES
        pinned_bytes = spec.cache_bytes // line_bytes // 2 * line_bytes
    hit, miss, write = rates
    cache_bytes = pinned_bytes or spec.cache_bytes // 2
    return Hybrid(spec.size_bytes, cache_bytes, pinned_bytes > 0, line_bytes, read=miss, hit_read=hit, write=write)


class HybridTier:
    """A device as `move.py` wants it."""

    def __init__(self, device: HybridDevice) -> None:
        self.device = device

    @property
    def where(self) -> str:
        return self.device.kind

    def settings(self) -> Hybrid:
        """What the policy must know of it: wants may fill what can be pinned, or half of a cache that cannot pin."""
        device = self.device
        return Hybrid(
            device.size_bytes,
            cache_bytes=device.pin_bytes or device.cache_bytes // 2,
            pin=device.pin_bytes > 0,
            line_bytes=device.line_bytes,
            read=device.miss_rate,
            hit_read=device.hit_rate,
            write=device.write_rate,
        )

    def read(self, copy: Copy, padded: memoryview) -> None:
        block = padded[: copy.size_bytes]
        self.device.read(copy.src_at, block)
        verify(copy, block)

    def write(self, copy: Copy, padded: memoryview) -> None:
        self.device.write(copy.dst_at, padded[: copy.size_bytes])

    def commit(self, copies: Iterable[Copy]) -> None:
        """What was written can be read: more is not promised."""

    def prefetch(self, copies: Iterable[Copy], pin: bool, done: Callable[[Copy, str], None]) -> None:
        for copy in copies:

            def end(ticket: Ticket, copy: Copy = copy) -> None:
                done(copy, name_of(ticket.errno) if ticket.why else "")

            self.device.prefetch([(copy.src_at, copy.size_bytes)], pin, end)

    def unpin(self, spans: Iterable[Span]) -> None:
        self.device.unpin([(span.at, span.size_bytes) for span in spans])

    def stats(self) -> dict[str, Any]:
        return self.device.stats()

    def close(self) -> None:
        self.device.close()
