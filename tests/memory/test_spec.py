"""`--tiers`: what it means, and one sentence for everything that it cannot mean."""

from pathlib import Path

import pytest

from outrider.errors import CallerError
from outrider.memory import Tiers, parse_tiers
from outrider.memory.tiers.spec import show_bytes


def test_sizes_and_paths() -> None:
    assert parse_tiers("host=1GiB,disk=8GiB,path=/x") == Tiers(1 << 30, 8 << 30, Path("/x"))
    assert parse_tiers(" host=1.5MiB ") == Tiers(3 << 19)
    assert parse_tiers("host=2097152") == Tiers(2 << 20)
    assert parse_tiers("host=1MiB,disk=1MiB", default_path=Path("/d")).path == Path("/d")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host=1GiB,hybrid=2GiB", "'hybrid=2GiB' names no tier"),
        ("host", "'host' names no tier"),
        ("host=lots", "tiers.host: 'lots' is no size"),
        ("host=-1GiB", "is no size"),
        ("host=10KiB", "less than 1 MiB"),
        ("disk=1GiB,path=/x", "host is missing"),
        ("", "host is missing"),
        ("host=1GiB,host=2GiB", "given twice"),
        ("host=1GiB,disk=1GiB", "path is missing"),
        ("host=1GiB,path=/x", "but no disk"),
    ],
)
def test_one_sentence_each(text: str, says: str) -> None:
    with pytest.raises(CallerError, match=says):
        parse_tiers(text)


def test_bytes_for_people() -> None:
    assert [show_bytes(size) for size in (5, 1536, 3 << 30)] == ["5 B", "1.5 KiB", "3 GiB"]
