"""Bad input and Ctrl-C: one clear sentence and exit code 2, or a clean end within 2 seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

OUTRIDER = [sys.executable, "-m", "outrider"]


def outrider(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*OUTRIDER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that names the thing and says how to mend it."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("outrider: ")]
    assert len(lines) == 1, done.stderr
    for words in says:
        assert words in lines[0], lines[0]


@pytest.fixture
def taken_port():  # type: ignore[no-untyped-def]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_port_in_use(taken_port: str) -> None:
    assert_one_sentence(outrider("serve", "--engine", "http://127.0.0.1:9", "--port", taken_port), taken_port, "--port")
    assert_one_sentence(
        outrider("engine", "--model", "tiny-moe", "--port", taken_port, "--kv-tokens", "1024"), taken_port, "--port"
    )


def test_missing_directory(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "memory.sock")
    assert_one_sentence(outrider("memory", "serve", "--socket", missing, "--tiers", "host=16MiB"), str(tmp_path / "no"))
    assert_one_sentence(outrider("demo", "--repo", str(tmp_path / "no")), str(tmp_path / "no"), "--repo")
    assert_one_sentence(outrider("demo", "--json", missing), "--json", str(tmp_path / "no"))
    assert_one_sentence(outrider("demo", "--json", str(tmp_path)), "--json", "directory")
    assert_one_sentence(outrider("demo", "--report", missing), "--report", str(tmp_path / "no"), "--report none")
    assert_one_sentence(outrider("simulate", str(tmp_path), "--report", missing), "--report", str(tmp_path / "no"))
    assert_one_sentence(outrider("report", str(tmp_path)), str(tmp_path), "--keep")
    assert_one_sentence(outrider("replay", str(tmp_path / "no.jsonl")), "no.jsonl")


def test_a_tree_without_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert_one_sentence(outrider("demo", "--repo", str(tmp_path)), "pieces of source", "--repo")


def test_broken_toml_and_unknown_key(tmp_path: Path) -> None:
    config = tmp_path / "outrider.toml"
    config.write_text("[agents\n")
    assert_one_sentence(outrider("serve", "--config", str(config)), "outrider.toml", "broken TOML")
    config.write_text("[agents]\nprot = 8000\n")
    assert_one_sentence(
        outrider("serve", "--config", str(config)), "line 2", "'prot'", "Did you mean 'port' in [agents]?"
    )


def test_engines_are_needed_and_must_be_urls() -> None:
    assert_one_sentence(outrider("serve", "--port", "8000"), "--engine")
    assert_one_sentence(outrider("serve", "--engine", "not a url", "--port", "8000"), "not a url")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    arguments = ("--port", "1025", "--kv-tokens", "1024")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    named = {
        str(tmp_path): str(tmp_path),
        str(tmp_path / "no"): str(tmp_path / "no"),
        str(tmp_path / "bert"): "BertModel",
    }
    with ThreadPoolExecutor() as side_by_side:
        said = side_by_side.map(lambda model: outrider("engine", "--model", model, *arguments), named)
        for done, name in zip(said, named.values(), strict=True):
            assert_one_sentence(done, name)


def test_wrong_tiers(tmp_path: Path) -> None:
    def serve(tiers: str) -> subprocess.CompletedProcess[str]:
        return outrider("memory", "serve", "--socket", str(tmp_path / "s"), "--tiers", tiers)

    assert_one_sentence(serve("hots=1GiB"), "hots")
    assert_one_sentence(serve("host=1Gib"), "1Gib")
    assert_one_sentence(serve("host=16MiB,disk=900TiB"), "disk", "free")


def test_usage_errors_exit_with_2() -> None:
    done = outrider("engine", "--model", "tiny-moe")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "act", "children"),
    [
        (signal.SIGTERM, "outrider/agents.jsonl", 4),  # two engines, a gateway and a memory server
        (signal.SIGINT, "experts/rollout-engine.log", 1),
        (signal.SIGINT, "experts/static/experts.0.jsonl", 0),
    ],
)
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, signum: signal.Signals, act: str, children: int) -> None:
    """Ctrl-C in mid-run: every child gone within 2 seconds; no process, file, socket or shared-memory segment."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        [*OUTRIDER, "demo", "--quick"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,  # where its report would go
    )
    by_s = time.monotonic() + 60
    while time.monotonic() < by_s and not list(tmp_path.glob(f"outrider-*/{act}")):
        assert demo.poll() is None, demo.stderr and demo.stderr.read()
        time.sleep(0.1)
    time.sleep(1.0)
    running = psutil.Process(demo.pid).children(recursive=True)
    assert len(running) >= children
    began_s = time.monotonic()
    demo.send_signal(signum)
    demo.wait(timeout=10)
    took_s = time.monotonic() - began_s
    assert demo.stderr is not None
    said = demo.stderr.read()
    demo.stderr.close()
    assert took_s < 2.5, f"{took_s:.1f} s; 2 is the promise, half a second is the test's own"
    assert "Traceback" not in said, said
    assert demo.returncode not in {0, None}
    assert not [child for child in running if child.is_running()]
    assert not list(tmp_path.iterdir())
    assert not [name for name in os.listdir("/dev/shm") if "outrider" in name]
