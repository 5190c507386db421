"""Mapped devices: a memory-backed file stands in for /dev/dax, and the kernel is asked for CPU-less NUMA nodes.

No CXL hardware was seen by these tests. What they prove is the code path, not the device.
"""

import errno
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import outrider.memory as memory
from outrider.errors import CallerError
from outrider.memory.tiers import numa
from outrider.memory.tiers.mapped import Mapped, open_dax, open_node

SIZE = 64 * 4096


@pytest.fixture
def stand_in() -> Iterator[Path]:
    """A memory-backed file, reached by a path, as /dev/dax0.0 would be."""
    fd = os.memfd_create("stands-in-for-dax")
    os.ftruncate(fd, 8 << 20)
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(0, 9000)), max_size=20))
def test_it_is_memory(steps: list[tuple[bool, int, int]]) -> None:
    device, truth = Mapped(mmap.mmap(-1, SIZE), "test"), bytearray(SIZE)
    for number, (write, at, most) in enumerate(steps):
        size = min(most, SIZE - at)
        if write:
            truth[at : at + size] = bytes([number + 1]) * size
            device.write(at, memoryview(truth)[at : at + size])
        else:
            into = bytearray(size)
            device.read(at, memoryview(into))
            assert into == truth[at : at + size]
            assert device.prefetch([(at, size)]).wait(5)
    device.flush()
    device.close()


def test_it_says_what_it_is_and_cannot_pin(stand_in: Path) -> None:
    device = open_dax(stand_in, cache_bytes=1 << 20)
    assert device.stats()["kind"] == f"a file that stands in for a dax device: {stand_in}"
    assert device.size_bytes == 8 << 20
    refused = device.prefetch([(0, 4096)], pin=True)
    assert (refused.errno, refused.why) == (errno.EDQUOT, "this device cannot pin. Prefetch without.")
    assert device.prefetch([(5000, 4096)]).wait(5)
    assert device.stats()["prefetched"] == 2
    device.flush()
    device.close()
    assert device.prefetch([(0, 4096)]).errno == errno.ESHUTDOWN


def test_a_device_serves_one_server_alone(stand_in: Path) -> None:
    """Two would write over each other's blocks."""
    device = open_dax(stand_in, 0)
    with pytest.raises(CallerError, match="belongs to a memory server that runs"):
        open_dax(stand_in, 0)
    device.close()
    open_dax(stand_in, 0).close()


def test_a_store_on_it_serves_what_host_cannot_hold(stand_in: Path) -> None:
    """The same code as above the emulated device: only the tiers string differs."""
    keys = memory.KeySpace(model="m", dtype="", layout="", block_tokens=1).chain(range(40))
    with memory.open(f"host=1MiB,hybrid=dax:{stand_in},cache=2MiB") as store:
        for key in keys:
            slots = store.prepare([key], 100_000)
            assert slots[0] is not None
            slots[0].view[:] = key * 6250
            store.complete(slots)
            while store.stats()["dirty_blocks"]:
                pass
        for key in keys:
            with store.lease([key]) as lease:
                assert lease.views[0] == key * 6250
        stats = store.stats()
        assert stats["hit_blocks_by_tier"]["hybrid"] >= 30
        assert "stands in" in stats["device"]["kind"] and stats["checksum_failures"] == 0


@pytest.mark.parametrize("path", ["/dev/dax9.9", "/dev/null", "/"])
def test_no_such_device(path: str) -> None:
    with pytest.raises(CallerError, match=r"tiers\.hybrid: .*Name a /dev/daxX\.Y"):
        open_dax(Path(path), 0)


def test_a_node_with_cpus_is_no_expander() -> None:
    busy = numa.nodes("has_cpu")
    if not busy:
        pytest.skip("this kernel lists no NUMA nodes")
    with pytest.raises(CallerError, match=rf"NUMA node {busy[0]} has CPUs, so it is ordinary memory; CPU-less nodes"):
        open_node(busy[0], 1 << 20, 0)
    with pytest.raises(CallerError, match="NUMA node 4000 has no memory, or is not there"):
        open_node(4000, 1 << 20, 0)


def test_mbind_works_or_says_why_not() -> None:
    """The system call itself, on a node that every machine has."""
    nodes = numa.nodes("has_memory")
    if not nodes:
        pytest.skip("this kernel lists no NUMA nodes")
    area = mmap.mmap(-1, 1 << 20)
    refused = ""
    try:
        numa.bind(area, nodes[0])
    except CallerError as error:  # a container may forbid it
        refused = str(error)
    if refused:
        pytest.skip(refused)
    area[:] = b"x" * len(area)
    maps = Path("/proc/self/numa_maps")
    if maps.exists():
        assert any(f"bind:{nodes[0]}" in line for line in maps.read_text().splitlines())


FORBID_MBIND = """
import ctypes, mmap, struct, sys
from outrider.errors import CallerError
from outrider.memory.tiers import numa
code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, numa.MBIND["x86_64"])
code += struct.pack("HBBI", 0x06, 0, 0, 0x00050001) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
program = ctypes.create_string_buffer(code, len(code))
filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(program)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter_, 0, 0) == 0, "no seccomp here"
try:
    numa.bind(mmap.mmap(-1, 4096), 0)
except CallerError as error:
    print(error)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter below knows one machine's system calls")
def test_a_container_that_forbids_mbind_is_told_what_to_do() -> None:
    """A child under a filter that answers mbind with EPERM, as container runtimes do."""
    done = subprocess.run([sys.executable, "-c", FORBID_MBIND], capture_output=True, text=True)
    if "no seccomp here" in done.stderr:
        pytest.skip("this kernel lets no filter be set")
    assert done.stdout == (
        "tiers.hybrid: mbind to NUMA node 0 is refused (Operation not permitted). "
        "Give the container CAP_SYS_NICE, or a seccomp profile that allows mbind.\n"
    )


def test_a_node_that_is_not_there_is_refused_by_the_kernel() -> None:
    if not numa.nodes("has_memory"):
        pytest.skip("this kernel lists no NUMA nodes")
    area = mmap.mmap(-1, 1 << 20)
    with pytest.raises(CallerError, match="mbind to NUMA node 900 is refused"):
        numa.bind(area, 900)


def test_cpuless_nodes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "has_cpu").write_text("0-1\n")
    (tmp_path / "has_memory").write_text("0-1,3,5-6\n")
    monkeypatch.setattr(numa, "SYSFS_NODES", tmp_path)
    assert numa.without_cpus() == [3, 5, 6]
    (tmp_path / "node5").mkdir()
    (tmp_path / "node5" / "meminfo").write_text("Node 5 MemTotal:  4096 kB\nNode 5 MemFree:     2048 kB\n")
    numa.check_node(5, 2 << 20)
    with pytest.raises(CallerError, match=r"3 MiB asked for, NUMA node 5 has 2 MiB free\. Ask for less\."):
        numa.check_node(5, 3 << 20)
    with pytest.raises(CallerError, match="CPU-less nodes here: 3, 5, 6"):
        numa.check_node(0, 1 << 20)
