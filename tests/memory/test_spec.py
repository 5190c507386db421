"""`--tiers`: what it means, and one sentence for everything that it cannot mean."""

from pathlib import Path

import pytest

from outrider.errors import CallerError
from outrider.memory import Tiers, parse_tiers
from outrider.memory.tiers.spec import HybridSpec, show_bytes


def test_sizes_and_paths() -> None:
    assert parse_tiers("host=1GiB,disk=8GiB,path=/x") == Tiers(1 << 30, 8 << 30, Path("/x"))
    assert parse_tiers(" host=1.5MiB ") == Tiers(3 << 19)
    assert parse_tiers("host=2097152") == Tiers(2 << 20)
    assert parse_tiers("host=1MiB,disk=1MiB", default_path=Path("/d")).path == Path("/d")


def test_hybrid_devices() -> None:
    whole = parse_tiers("host=1GiB,hybrid=8GiB,cache=512MiB,disk=16GiB,path=/x,profile=ours-22-by-10")
    assert whole == Tiers(1 << 30, 16 << 30, Path("/x"), HybridSpec(8 << 30, 512 << 20, "ours-22-by-10"))
    assert parse_tiers("host=1GiB,hybrid=8GiB,path=/x").hybrid == HybridSpec(8 << 30, 512 << 20)
    dax = parse_tiers("host=1GiB,hybrid=dax:/dev/dax0.0,cache=2GiB")
    assert dax == Tiers(1 << 30, hybrid=HybridSpec(cache_bytes=2 << 30, dax=Path("/dev/dax0.0")))
    assert parse_tiers("host=1GiB,hybrid=numa:2:64GiB").hybrid == HybridSpec(64 << 30, node=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host=1GiB,hbm=2GiB", "'hbm=2GiB' names no tier; known are host, hybrid, cache, profile, disk, path"),
        ("host=1GiB,hybrid=2GiB", "hybrid needs a directory, path is missing"),
        ("host=1GiB,hybrid=2GiB,cache=3GiB,path=/x", "cache is larger than hybrid"),
        ("host=1GiB,cache=1GiB", "cache is given, but no hybrid"),
        ("host=1GiB,profile=ours-22", "profile is given, but no hybrid"),
        ("host=1GiB,hybrid=dax:/dev/dax0.0,profile=ours-22", "slows an emulated hybrid only"),
        ("host=1GiB,hybrid=dax:", r"'dax:' is no device\. Write SIZE, dax:/dev/daxX\.Y or numa:NODE:SIZE"),
        ("host=1GiB,hybrid=numa:1", "is no device"),
        ("host=1GiB,hybrid=dax:/dev/dax0.0,path=/x", "no disk and no emulated hybrid"),
        ("host", "'host' names no tier"),
        ("host=lots", "tiers.host: 'lots' is no size"),
        ("host=-1GiB", "is no size"),
        ("host=10KiB", "less than 1 MiB"),
        ("disk=1GiB,path=/x", "host is missing"),
        ("", "host is missing"),
        ("host=1GiB,host=2GiB", "given twice"),
        ("host=1GiB,disk=1GiB", "path is missing"),
        ("host=1GiB,path=/x", "no disk and no emulated hybrid"),
    ],
)
def test_one_sentence_each(text: str, says: str) -> None:
    with pytest.raises(CallerError, match=says):
        parse_tiers(text)


def test_bytes_for_people() -> None:
    assert [show_bytes(size) for size in (5, 1536, 3 << 30)] == ["5 B", "1.5 KiB", "3 GiB"]
