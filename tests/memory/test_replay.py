"""Law 10: the journal of a live server, restarts included, replays through a fresh policy to the same bytes."""

import os
import time
from pathlib import Path

import msgspec
import pytest

import outrider.memory as memory
from outrider.errors import LawBroken
from outrider.journal import read, replay
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings
from outrider.wants import Want

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("memory_*.jsonl"))


def live(folder: Path, tiers: str, names: list[str]) -> None:
    folder.mkdir()
    with memory.open(tiers, journal=folder) as store:
        for name in names:
            keys = memory.KeySpace(model=name, dtype="", layout="", block_tokens=1).chain(range(6))
            slots = store.prepare(keys, 100_000)
            store.complete(slots[:5], durable=name == "a")
            store.abandon(slots[5:])
            store.remember(f"call {name}", keys[:5])
            store.want(Want(f"call {name}", "host", time.monotonic() + 0.05, 0.5))
        for name in names:
            store.lease(memory.KeySpace(model=name, dtype="", layout="", block_tokens=1).chain(range(6))).release()
        store.withdraw(f"call {names[0]}")
        store.flush()


def test_a_live_journal_replays_byte_for_byte(tmp_path: Path) -> None:
    tiers = f"host=1MiB,disk=8MiB,path={tmp_path / 'd'}"
    live(tmp_path / "one", tiers, ["a", "b", "c"])
    live(tmp_path / "two", tiers, ["c", "d", "a"])
    for name in ("one", "two"):
        journal = tmp_path / name / "memory.jsonl"
        header, _ = read(journal)
        assert header.policy == "memory"
        agreed, difference = replay(journal, ev.Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
        assert difference is None and agreed >= 15
    _, lines = read(tmp_path / "two" / "memory.jsonl")
    assert b'"Recovered"' in bytes(next(lines).event)


def rewrite(path: Path) -> None:
    """The same events once more, with what the policy says to them now."""
    header, lines = read(path)
    policy = Policy(msgspec.json.decode(header.settings, type=Settings))
    said = [msgspec.json.encode(header)]
    for line in lines:
        event = msgspec.json.decode(line.event, type=ev.Event)
        commands = policy.handle(event, line.now)
        said.append(msgspec.json.encode({"now": line.now, "event": event, "commands": commands}))
    path.write_bytes(b"\n".join(said) + b"\n")


def test_a_changed_line_is_shown(tmp_path: Path) -> None:
    live(tmp_path / "one", f"host=1MiB,disk=2MiB,path={tmp_path / 'd'}", ["a"])
    journal = tmp_path / "one" / "memory.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"spans":[[0,', b'"spans":[[4096,', 1))
    agreed, difference = replay(journal, ev.Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
    assert difference is not None and (agreed, difference.line) == (1, 3)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_golden_dialogues_are_what_the_policy_still_says(path: Path) -> None:
    if os.environ.get("OUTRIDER_GOLDEN") == "write":
        rewrite(path)
    agreed, difference = replay(path, ev.Event, lambda raw: Policy(msgspec.json.decode(raw, type=Settings)))
    assert difference is None, difference
    assert agreed >= 14


def test_goldens_are_there() -> None:
    assert [path.stem for path in GOLDEN] == [
        "memory_cancelled_and_wanted_again",
        "memory_prefetched_damaged_and_served_from_disk",
    ]


def test_a_broken_law_tells_the_blocks_story() -> None:
    policy = Policy(Settings(64, 512, grain_bytes=8, header_bytes=8))
    item = "0" * 32
    policy.handle(ev.Prepared(1, 1, (item,), 8), 1.0)
    policy.handle(ev.Completed(1, 2, (item,), (5,), False), 2.0)
    policy.handle(ev.Copied((1,)), 3.0)
    with pytest.raises(LawBroken, match="copy 1 ended, but is not in flight"):
        policy.handle(ev.Copied((1,)), 4.0)
    block = policy.residency.blocks[item]
    with pytest.raises(
        LawBroken, match="Story: host prepare 1, host complete 2, disk start 2, disk land 3, host land 5"
    ):
        policy.residency.turn(block, "host", "land", 5.0)
