"""Plain and xz files give the same numbered lines; what cannot be read is said in a sentence."""

import lzma
from pathlib import Path

import msgspec
import pytest

from outrider.errors import CallerError
from outrider.lab.traces.source import Source


@pytest.mark.parametrize("packed", [False, True])
def test_lines_are_numbered_as_an_editor_does_and_blank_ones_left_out(tmp_path: Path, packed: bool) -> None:
    text = b"one\n\n  \nfour\r\nfive"
    path = tmp_path / "x"
    path.write_bytes(lzma.compress(text) if packed else text)
    assert list(Source(path).lines()) == [(1, b"one\n"), (4, b"four\r\n"), (5, b"five")]
    assert Source(path).first() == b"one\n"


@pytest.mark.parametrize("packed", [False, True])
def test_progress_rises_to_the_files_size(tmp_path: Path, packed: bool) -> None:
    text = b"".join(b"%d %d\n" % (n, n * n) for n in range(200_000))
    path = tmp_path / "x"
    path.write_bytes(lzma.compress(text) if packed else text)
    seen: list[tuple[int, int]] = []
    assert sum(1 for _ in Source(path, lambda read, total: seen.append((read, total))).lines()) == 200_000
    size = path.stat().st_size
    assert len(seen) > 3
    assert seen == sorted(seen) and seen[-1] == (size, size) and {total for _, total in seen} == {size}


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b"\n \n")
    (tmp_path / "cut").write_bytes(lzma.compress(bytes(range(256)) * 999)[:-40])
    damaged = bytearray(lzma.compress(b"line\n" * 9999))
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged").write_bytes(damaged)
    for name, says in (
        ("empty", "is empty"),
        ("blank", "is empty"),
        ("cut", "damaged or cut short"),
        ("damaged", "damaged or cut short"),
        ("absent", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(CallerError, match=says):
            list(Source(tmp_path / name).lines()) or Source(tmp_path / name).first()


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    decoder = msgspec.json.Decoder(dict[str, int])
    for line in (b"{", b'{"a": "text"}', b"\xff\xfe", b""):
        with pytest.raises(CallerError, match=r"x: line 17: .+--format"):
            Source(tmp_path / "x").decode(17, line, decoder)
