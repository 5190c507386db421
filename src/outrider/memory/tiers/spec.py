"""What `--tiers host=1GiB,disk=8GiB,path=DIR` means. Pure; called by `server.py` and the command line."""

import re
from pathlib import Path

import msgspec

from outrider.errors import CallerError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
EXAMPLE = "Write for example host=1GiB,disk=8GiB,path=DIR."
SMALLEST_BYTES = 1 << 20


class Tiers(msgspec.Struct, frozen=True):
    """Sizes in bytes; `disk_bytes` 0 and `path` None: no disk tier."""

    host_bytes: int
    disk_bytes: int = 0
    path: Path | None = None


def parse_tiers(text: str, default_path: Path | None = None) -> Tiers:
    """Read `tier=SIZE,...`; the disk lies in path=DIR, else in `default_path`. CallerError, one sentence, else."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in ("host", "disk", "path") or not equals:
            raise CallerError(f"tiers: {part!r} names no tier; known are host, disk and path. {EXAMPLE}")
        if name in found:
            raise CallerError(f"tiers: {name} is given twice. {EXAMPLE}")
        found[name] = value
    if "host" not in found:
        raise CallerError(f"tiers: host is missing in {text!r}. {EXAMPLE}")
    host_bytes = parse_size("host", found["host"])
    if "disk" not in found:
        if "path" in found:
            raise CallerError(f"tiers: path is given, but no disk. {EXAMPLE}")
        return Tiers(host_bytes)
    path = Path(found["path"]) if found.get("path") else default_path
    if path is None:
        raise CallerError(f"tiers: disk needs a directory, path is missing in {text!r}. {EXAMPLE}")
    return Tiers(host_bytes, parse_size("disk", found["disk"]), path)


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
