"""What `--tiers host=1GiB,hybrid=8GiB,cache=512MiB,disk=16GiB,path=DIR` means. Pure; called by `server.py`.

host=SIZE                  shared memory
hybrid=SIZE                an emulated CXL-hybrid device: a cache of cache=SIZE before a file in path=DIR, at the
                           speed of profile=NAME where one is given
hybrid=dax:/dev/daxX.Y     a real one; hybrid=numa:NODE:SIZE a CPU-less node. cache=SIZE: what it caches, if known
disk=SIZE                  durable, in path=DIR
"""

import re
from pathlib import Path

import msgspec

from outrider.errors import CallerError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
NAMES = ("host", "hybrid", "cache", "profile", "disk", "path")
EXAMPLE = "Write for example host=1GiB,disk=8GiB,path=DIR."
SMALLEST_BYTES = 1 << 20
CACHE_SHARE = 16  # of an emulated device whose cache is not given


class HybridSpec(msgspec.Struct, frozen=True):
    """A CXL-hybrid device: emulated where neither `dax` nor `node` is given. `size_bytes` 0: as large as it is."""

    size_bytes: int = 0
    cache_bytes: int = 0
    profile: str = ""
    dax: Path | None = None
    node: int | None = None


class Tiers(msgspec.Struct, frozen=True):
    """Sizes in bytes; `disk_bytes` 0 and `hybrid` None: no such tier. `path` None: neither needs a directory."""

    host_bytes: int
    disk_bytes: int = 0
    path: Path | None = None
    hybrid: HybridSpec | None = None


def parse_tiers(text: str, default_path: Path | None = None) -> Tiers:
    """Read `tier=SIZE,...`; files lie in path=DIR, else in `default_path`. CallerError, one sentence, else."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in NAMES or not equals:
            raise CallerError(f"tiers: {part!r} names no tier; known are {', '.join(NAMES)}. {EXAMPLE}")
        if name in found:
            raise CallerError(f"tiers: {name} is given twice. {EXAMPLE}")
        found[name] = value
    if "host" not in found:
        raise CallerError(f"tiers: host is missing in {text!r}. {EXAMPLE}")
    host_bytes = parse_size("host", found["host"])
    disk_bytes = parse_size("disk", found["disk"]) if "disk" in found else 0
    hybrid = _parse_hybrid(found)
    filed = [name for name, here in (("disk", disk_bytes), ("hybrid", hybrid and emulated(hybrid))) if here]
    if not filed:
        if "path" in found:
            raise CallerError(f"tiers: path is given, but no disk and no emulated hybrid. {EXAMPLE}")
        return Tiers(host_bytes, hybrid=hybrid)
    path = Path(found["path"]) if found.get("path") else default_path
    if path is None:
        raise CallerError(f"tiers: {filed[0]} needs a directory, path is missing in {text!r}. {EXAMPLE}")
    return Tiers(host_bytes, disk_bytes, path, hybrid)


def emulated(hybrid: HybridSpec) -> bool:
    return hybrid.dax is None and hybrid.node is None


def _parse_hybrid(found: dict[str, str]) -> HybridSpec | None:
    if "hybrid" not in found:
        for name in ("cache", "profile"):
            if name in found:
                raise CallerError(f"tiers: {name} is given, but no hybrid. Add hybrid=SIZE, or leave it out.")
        return None
    kind, colon, rest = found["hybrid"].partition(":")
    cache_bytes = parse_size("cache", found["cache"]) if "cache" in found else 0
    if colon and "profile" in found:
        raise CallerError(f"tiers: profile slows an emulated hybrid only, this is {found['hybrid']}. Leave it out.")
    if kind == "dax" and rest:
        return HybridSpec(cache_bytes=cache_bytes, dax=Path(rest))
    if kind == "numa" and re.fullmatch(r"\d+:.+", rest):
        node, _, size = rest.partition(":")
        return HybridSpec(parse_size("hybrid", size), cache_bytes, node=int(node))
    if colon:
        forms = "SIZE, dax:/dev/daxX.Y or numa:NODE:SIZE"
        raise CallerError(f"tiers.hybrid: {found['hybrid']!r} is no device. Write {forms}.")
    size_bytes = parse_size("hybrid", kind)
    cache_bytes = cache_bytes or max(size_bytes // CACHE_SHARE, SMALLEST_BYTES)
    if cache_bytes > size_bytes:
        raise CallerError("tiers: cache is larger than hybrid, which it stands before. Lower cache=SIZE.")
    return HybridSpec(size_bytes, cache_bytes, found.get("profile", ""))


def parse_size(name: str, text: str) -> int:
    """Bytes of `64MiB`, `1.5GiB` or `1048576`; CallerError that names the tier for anything else or under 1 MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?", text.strip())
    if match is None:
        raise CallerError(f"tiers.{name}: {text!r} is no size. Use a number with {', '.join(UNITS)}, as in 64MiB.")
    size_bytes = int(float(match[1]) * 1024 ** UNITS.index(match[2] or "B"))
    if size_bytes < SMALLEST_BYTES:
        raise CallerError(f"tiers.{name}: {text!r} is less than 1 MiB, which holds no block. Ask for more.")
    return size_bytes


def show_bytes(size_bytes: int) -> str:
    """A size for people: `1.5 GiB`."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {UNITS[unit]}"
