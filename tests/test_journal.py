"""Law 10: a journal replays to the same commands, byte for byte, and shows the first line that differs."""

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outrider import journal, metrics
from outrider.errors import CallerError


class Added(msgspec.Struct, frozen=True, tag=True):
    values: np.ndarray


class Asked(msgspec.Struct, frozen=True, tag=True):
    pass


class Said(msgspec.Struct, frozen=True, tag=True):
    total: float
    seen: np.ndarray


class Settings(msgspec.Struct, frozen=True):
    scale: float = 1.0


class Sum:
    """A policy as small as can be: adds up arrays, says the sum when asked."""

    def __init__(self, settings: Settings) -> None:
        self.scale = settings.scale
        self.total = 0.0
        self.last = np.zeros(0)

    def handle(self, event: Added | Asked, now: float) -> list[Said]:
        if isinstance(event, Added):
            self.last = event.values
            self.total += self.scale * float(event.values.sum())
            return []
        return [Said(self.total, self.last)]


def write(path: Path, settings: Settings = Settings(2.0)) -> None:  # noqa: B008  # frozen
    policy, log = Sum(settings), journal.Journal(path, "sum", settings)
    for now, event in enumerate([Added(np.arange(4)), Asked(), Added(np.ones((2, 2))), Asked()]):
        log.write(float(now), event, policy.handle(event, now))
    log.close()


def replay(path: Path) -> tuple[int, journal.Difference | None]:
    return journal.replay(path, Added | Asked, lambda raw: Sum(msgspec.json.decode(raw, type=Settings)))


def test_replays_to_the_same_commands(tmp_path: Path) -> None:
    write(tmp_path / "sum.jsonl")
    assert replay(tmp_path / "sum.jsonl") == (4, None)
    assert len(list((tmp_path / "sum.arrays").iterdir())) == 2, "an array is stored once, under its content"
    tally = metrics.tally(tmp_path / "sum.jsonl")
    assert (tally.lines, tally.events, tally.commands) == (4, {"Added": 2, "Asked": 2}, {"Said": 2})
    assert tally.span_s == 3.0


def test_shows_the_first_line_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "sum.jsonl"
    write(path)
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"total":12.0', '"total":13.0')
    path.write_text("\n".join(lines) + "\n")
    agreed, difference = replay(path)
    assert agreed == 1
    assert difference is not None
    assert difference.line == 3
    assert '"total":13.0' in difference.recorded and '"total":12.0' in difference.replayed


def test_a_policy_that_says_nothing_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sum.jsonl")
    monkeypatch.setattr(Sum, "handle", lambda self, event, now: [])
    assert replay(tmp_path / "sum.jsonl")[1] is not None


def test_a_torn_last_line_is_ignored_and_a_torn_array_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sum.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert replay(path) == (3, None)
    array = next((tmp_path / "sum.arrays").iterdir())
    np.save(array, np.zeros(3))
    with pytest.raises(CallerError, match="is not the array that was written"):
        replay(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not json\n", b'{"now":1}\n', b'{"journal":9,"policy":"x","rank":0,"settings":{},"outrider":"9"}\n'],
)
def test_what_is_no_journal_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(CallerError, match=r"^journal .*x\.jsonl: "):
        journal.read(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="No such file or directory"):
        journal.Journal(tmp_path / "no" / "x.jsonl", "sum", Settings())
    with pytest.raises(CallerError, match="No such file or directory"):
        journal.read(tmp_path / "no.jsonl")


def test_a_restart_keeps_the_journal_of_the_run_before(tmp_path: Path) -> None:
    path = tmp_path / "sum.jsonl"
    write(path, Settings(2.0))
    write(path, Settings(3.0))
    write(path, Settings(5.0))
    for name, scale in (("sum.1.jsonl", 2.0), ("sum.2.jsonl", 3.0), ("sum.jsonl", 5.0)):
        header, _ = journal.read(tmp_path / name)
        assert msgspec.json.decode(header.settings, type=Settings).scale == scale
        assert replay(tmp_path / name) == (4, None)


def test_a_full_disk_ends_the_journal_at_a_whole_line_and_stops_no_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Filling(journal.FileIO):
        room = 700

        def write(self, data: Any) -> int:  # type: ignore[override]
            if self.tell() >= self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[: self.room - self.tell()])

    monkeypatch.setattr(journal, "FileIO", Filling)
    path = tmp_path / "sum.jsonl"
    policy, log = Sum(Settings()), journal.Journal(path, "sum", Settings())
    for now in range(40):
        log.write(float(now), Asked(), policy.handle(Asked(), now))
    assert caplog.text.count("No space left on device. It ends here") == 1
    assert path.read_bytes().endswith(b"\n")
    agreed, difference = replay(path)
    assert difference is None
    assert 0 < agreed < 40


def test_damage_is_the_callers_to_mend_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "sum.jsonl"
    write(path)
    whole = path.read_text()
    path.write_text(whole.replace('{"now":1.0', '{now":1.0'))
    with pytest.raises(CallerError, match="line 3 is damaged"):
        replay(path)
    path.write_text(whole.replace('"type":"Asked"', '"type":"Sung"'))
    with pytest.raises(CallerError, match="line 3: this version knows no such event"):
        replay(path)
    path.write_text(whole)
    for array in (tmp_path / "sum.arrays").iterdir():
        array.unlink()
    with pytest.raises(CallerError, match="Restore the sidecar"):
        replay(path)
