"""A whole store on an emulated hybrid device: host far too small, the right blocks all the same, and who said where."""

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import outrider.memory as memory
from outrider.errors import CallerError, WorldError
from outrider.journal import read, replay
from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.settings import Settings
from outrider.memory.tiers.emulated import Emulated
from outrider.memory.tiers.hybrid import HybridTier, modelled, open_device
from outrider.memory.tiers.spec import HybridSpec
from outrider.wants import Want

SIZE = 100_000
TIERS = "host=1MiB,hybrid=16MiB,cache=2MiB"


def keys_of(name: str, count: int) -> list[bytes]:
    return memory.KeySpace(model=name, dtype="", layout="", block_tokens=1).chain(range(count))


def put(store: memory.Store, keys: list[bytes], durable: bool = False) -> None:
    """One block at a time, as an engine fills them; each is saved below before the next may push it out."""
    for key in keys:
        slots = store.prepare([key], SIZE)
        assert slots[0] is not None
        slots[0].view[:] = key * (SIZE // 16)
        store.complete(slots, durable)
        until(lambda: not store.stats()["dirty_blocks"])


def check(store: memory.Store, keys: list[bytes]) -> list[bool]:
    """Each block alone: is it there, and right?"""
    there = []
    for key in keys:
        with store.lease([key]) as lease:
            view = lease.views[0]
            there.append(view is not None)
            assert view is None or view == key * (SIZE // 16)
    return there


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    by_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < by_s, "it did not happen in time"
        time.sleep(0.002)


def test_what_is_simulated_is_what_the_device_says_of_itself(tmp_path: Path) -> None:
    for text in ("hybrid=16MiB,cache=3MiB", "hybrid=10MiB,cache=2MiB,profile=ours-22-by-10"):
        spec = memory.parse_tiers(f"host=1MiB,{text},path={tmp_path}").hybrid
        assert spec is not None
        tier = HybridTier(open_device(spec, tmp_path))
        assert tier.settings() == modelled(spec)
        tier.close()
    with pytest.raises(CallerError, match="cannot be simulated"):
        modelled(HybridSpec(dax=Path("/dev/dax0.0")))


@pytest.mark.parametrize("disk", ["", "disk=32MiB,"])
def test_a_tiny_host_serves_what_the_device_holds(tmp_path: Path, disk: str) -> None:
    keys = keys_of("a", 60)  # 6 MB: six times host, three times the device's cache
    with memory.open(f"{TIERS},{disk}path={tmp_path}", journal=tmp_path) as store:
        put(store, keys)
        assert all(check(store, keys)) and all(check(store, keys[::-1]))
        stats = store.stats()
    assert stats["hit_blocks"] == 120 and sum(stats["hit_blocks_by_tier"].values()) == 120
    assert stats["hit_blocks_by_tier"]["hybrid"] >= 90 and "disk" not in stats["hit_blocks_by_tier"]
    assert stats["moved_bytes"]["hybrid->host"] == stats["hit_blocks_by_tier"]["hybrid"] * SIZE
    device = stats["device"]
    assert device["kind"].startswith("emulated") and device["misses"] > 0 and device["hits"] > 0
    assert device["hit_bytes"] + device["miss_bytes"] == stats["moved_bytes"]["hybrid->host"]
    assert stats["tiers"]["hybrid"]["blocks"] == 60
    assert hits_by_tier(tmp_path / "memory.jsonl") == stats["hit_blocks_by_tier"]
    fresh = lambda raw: Policy(msgspec.json.decode(raw, type=Settings))  # noqa: E731
    agreed, difference = replay(tmp_path / "memory.jsonl", ev.Event, fresh)
    assert difference is None and agreed > 200


def hits_by_tier(path: Path) -> dict[str, int]:
    """From the journal alone: the sum of `lay` over all Grants."""
    counts: Counter[str] = Counter()
    for line in read(path)[1]:
        for command in msgspec.json.decode(line.commands):
            if command["type"] == "Grant":
                counts.update(command["lay"])
    return dict(counts)


def test_a_real_server_process_and_two_clients(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start(tmp_path / "s", f"{TIERS},profile=ours-18-by-10")  # files lie beside the socket
    wrong: list[str] = []

    def client(name: str) -> None:
        with memory.connect(tmp_path / "s", name=name) as store:
            keys = keys_of(name, 25)
            put(store, keys)
            for _ in range(2):
                wrong.extend([name] * (not all(check(store, keys))))

    clients = [threading.Thread(target=client, args=(name,)) for name in "ab"]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(30)
    assert not wrong
    with memory.connect(tmp_path / "s") as store:
        assert store.stats()["device"]["profile"] == "ours-18-by-10"
        assert store.lookup(keys_of("a", 25)) == 25
    assert list((tmp_path / "s.blocks").iterdir()) == []  # the device's file has no name


def test_its_contents_end_with_the_server_and_those_of_the_disk_do_not(tmp_path: Path) -> None:
    keys = keys_of("a", 20)
    with memory.open(f"{TIERS},path={tmp_path / 'h'}") as store:
        put(store, keys)
        with pytest.raises(WorldError, match="not on disk"):
            put(store, keys_of("b", 1), durable=True)
    with memory.open(f"{TIERS},path={tmp_path / 'h'}") as store:
        assert store.lookup(keys) == 0
    both = f"{TIERS},disk=16MiB,path={tmp_path / 'd'}"
    with memory.open(both) as store:
        put(store, keys, durable=True)
    with memory.open(both) as store:
        assert all(check(store, keys))
        assert store.stats()["hit_blocks_by_tier"] == {"disk": 20}
        until(lambda: not store.stats()["dirty_blocks"])
        assert all(check(store, keys))  # what came from the disk was saved to the faster tier too
        assert store.stats()["hit_blocks_by_tier"]["hybrid"] >= 8


def test_a_far_want_pins_in_the_devices_cache_and_a_near_one_lifts_to_host(tmp_path: Path) -> None:
    returning, others = keys_of("call", 4), keys_of("other", 30)
    with memory.open(f"{TIERS},path={tmp_path}") as store:
        put(store, returning)
        store.remember("call 1", returning)
        put(store, others)
        before = store.stats()
        store.want(Want("call 1", "host", time.monotonic() + 3.0, 5.0))
        until(lambda: store.stats()["tiers"]["cache"]["blocks"] == 4)
        pinned = store.stats()
        assert pinned["device"]["pinned_bytes"] >= 4 * SIZE and pinned["moved_bytes"]["hybrid->cache"] == 4 * SIZE
        assert pinned["moved_bytes"].get("hybrid->host") == before["moved_bytes"].get("hybrid->host")
        check(store, others)  # a scan of the device, which pins outlive
        misses = store.stats()["device"]["misses"]
        until(lambda: store.stats()["tiers"]["cache"]["blocks"] == 0)  # its time is near: in host now, unpinned
        lifted = store.stats()
        assert lifted["device"]["misses"] == misses and lifted["device"]["pinned"] == 0
        assert all(check(store, returning))
        with store.lease(returning):
            pass
        assert store.stats()["wants_met"] == 1


def test_a_withdrawn_want_unpins(tmp_path: Path) -> None:
    keys = keys_of("call", 4)
    with memory.open(f"{TIERS},path={tmp_path}") as store:
        put(store, keys)
        store.remember("call 1", keys)
        put(store, keys_of("other", 30))
        store.want(Want("call 1", "host", time.monotonic() + 600.0, 5.0))
        until(lambda: store.stats()["device"]["pinned"] > 0 and store.stats()["tiers"]["cache"]["blocks"] == 4)
        store.withdraw("call 1")
        until(lambda: store.stats()["device"]["pinned"] == 0)
        assert store.stats()["tiers"]["cache"]["used_bytes"] == 0


def sabotage(monkeypatch: pytest.MonkeyPatch, bad: dict[str, object]) -> None:
    """The real device, but for reads that `bad` says are wrong: `flip` a bit, or an `errno`."""
    honest = Emulated.read

    def read(self: Emulated, at: int, into: memoryview) -> None:
        if isinstance(code := bad.get("errno"), int):
            raise OSError(code, os.strerror(code))
        honest(self, at, into)
        if bad.get("flip"):
            into[len(into) // 2] ^= 1

    monkeypatch.setattr(Emulated, "read", read)


@pytest.mark.parametrize("fault", [{"flip": True}, {"errno": errno.EIO}])
def test_a_device_that_lies_or_fails_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    """Law 1: a wrong block is a miss, counted; what the disk holds too comes from there."""
    bad: dict[str, object] = {}
    sabotage(monkeypatch, bad)
    keys = keys_of("a", 20)
    with memory.open(f"{TIERS},path={tmp_path / 'h'}") as store:
        put(store, keys)
        bad |= fault
        there = check(store, keys)
        assert not all(there) and there.count(True) <= 10  # host's own blocks only
        stats = store.stats()
        failures = stats["checksum_failures"] if "flip" in fault else stats["hybrid_failures"]["EIO"]
        assert failures == there.count(False) and stats["disk_failures"] == {}
    bad.clear()
    with memory.open(f"{TIERS},disk=16MiB,path={tmp_path / 'd'}") as store:
        put(store, keys, durable=True)
        bad |= fault
        assert all(check(store, keys))
        assert store.stats()["hit_blocks_by_tier"]["hybrid"] > 0  # that is where they lay when they were asked for
        assert store.stats()["moved_bytes"]["disk->host"] > 0


def test_a_full_medium_keeps_blocks_in_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes refused: blocks stay in host or are dropped, the client is served."""

    def refuse(self: Emulated, at: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Emulated, "write", refuse)
    with memory.open(f"{TIERS},path={tmp_path}") as store:
        keys = keys_of("a", 5)
        slots = store.prepare(keys, SIZE)
        for slot in slots:
            assert slot is not None
            slot.view[:] = slot.key * (SIZE // 16)
        store.complete(slots)
        until(lambda: store.stats()["hybrid_failures"].get("ENOSPC", 0) >= 5)
        assert all(check(store, keys))
        assert store.stats()["tiers"]["hybrid"]["used_bytes"] == 0


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("host=1MiB,hybrid=900TiB,cache=1MiB", "tiers.hybrid: 900 TiB asked for"),
        ("host=1MiB,hybrid=900TiB,cache=800TiB", "tiers.host: 1 MiB beside cache=800 TiB asked for, this"),
        ("host=1MiB,hybrid=8MiB,profile=theirs", "no profile 'theirs'"),
        ("host=1MiB,hybrid=dax:/dev/dax7.7", "Name a /dev/daxX.Y"),
        ("host=1MiB,hybrid=numa:4000:1GiB", "NUMA node 4000 has no memory, or is not there"),
    ],
)
def test_a_device_that_cannot_be_had_is_told_in_a_sentence(tmp_path: Path, tiers: str, says: str) -> None:
    where = "" if "dax:" in tiers or "numa:" in tiers else f",path={tmp_path}"
    before = threading.active_count()
    with pytest.raises(CallerError, match=says):
        memory.open(tiers + where)
    assert threading.active_count() == before


def test_host_and_the_devices_cache_must_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large arena gets its pages long after the start: then it is too late to say so."""
    for module in ("arena", "emulated"):
        monkeypatch.setattr(f"outrider.memory.tiers.{module}.available_bytes", lambda: 10 << 20)
    for sizes in ("host=6MiB,hybrid=16MiB,cache=2MiB", "host=2MiB,hybrid=16MiB,cache=6MiB"):
        memory.open(f"{sizes},path={tmp_path}").close()
    with pytest.raises(CallerError, match=r"6 MiB beside cache=6 MiB asked for, .* Lower host=SIZE or cache=SIZE\."):
        memory.open(f"host=6MiB,hybrid=16MiB,cache=6MiB,path={tmp_path}")
