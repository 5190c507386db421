"""Real vLLM servers on a real memory server: blocks survive a reset, a restart and a change of server; words stay.

One scenario, run once, in the order of a day: two servers side by side, one of them without Outrider; then the first
again after kill -9, beside another one; then memory dies and hangs in the middle of loads. Its figures, from vLLM's
metrics and usage and from memory's own counters, are printed and written to build/test-vllm.json.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import vllm
from relay import Relay

from conftest import ROOT
from outrider import memory
from outrider.lab.processes import Child, Children, await_http, await_path, free_port
from outrider.lab.vllm_server import Engine, start
from outrider.wants import Want

BLOCK = 32  # tokens
WORDS = 20  # generated an answer
SOURCES = (textwrap, inspect.getfile, json.dumps, re.compile, urllib.request.urlopen, ThreadPoolExecutor.submit)
START_S = 240.0


def prompts() -> list[str]:
    """Real code, of some 300 to 700 tokens each, that begin differently."""
    return [f"# {i}\n{inspect.getsource(source)[:2200]}\n# In short:" for i, source in enumerate(SOURCES)]


class Served:
    """One vLLM server."""

    def __init__(self, child: Child, url: str) -> None:
        self.child, self.url = child, url

    def ask(self, prompt: str, name: str = "") -> tuple[str, int]:
        """The words, and the prompt tokens that vLLM says it did not compute."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": WORDS, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        call = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(call, timeout=120) as answer:
            said = json.load(answer)
        return said["choices"][0]["text"], said["usage"]["prompt_tokens_details"]["cached_tokens"]

    def metric(self, name: str) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
        return int(sum(float(number) for number in found))

    @property
    def external(self) -> int:
        return self.metric("external_prefix_cache_hits")

    def forget(self) -> None:
        """Its own prefix cache, as soon as no block is in use any more."""
        free = re.compile(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", re.MULTILINE)
        wait_for(lambda: float(free.findall(self._text())[0]) == 0.0)
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST"), timeout=30)

    def _text(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def kill(self) -> None:
        """SIGKILL to all its processes; the shared memory that nobody is left to remove goes too."""
        group, segments = self.child.process.pid, set()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getpgid(process.pid) == group:
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    segments.update(re.findall(r"/dev/shm/\S+", maps))
        os.killpg(group, signal.SIGKILL)
        self.child.process.wait()
        for segment in segments:
            Path(segment).unlink(missing_ok=True)


class Place:
    """Where servers run: a memory server, a relay before it, and engines that reach memory through it."""

    def __init__(self, children: Children, folder: Path, model: Path) -> None:
        self.children, self.folder, self.model = children, folder, model
        self.direct, self.socket = folder / "m.sock", folder / "relay.sock"
        self.server = self.serve_memory("memory")
        self.relay = Relay(self.socket, self.direct)

    def serve_memory(self, name: str) -> Child:
        tiers = f"host=512MiB,disk=1GiB,path={self.folder}/blocks"
        server = self.children.outrider(name, "memory", "serve", "--socket", str(self.direct), "--tiers", tiers)
        await_path(server, self.direct, 30)
        return server

    def serve(self, **servers: bool) -> list[Served]:
        """vLLM servers by name, each on a core of its own; True: with Outrider's connector."""
        started = []
        for core, (name, attached) in enumerate(servers.items()):
            port, cores = free_port(), sorted(os.sched_getaffinity(0))
            socket = self.socket if attached else None
            engine = Engine(Path(sys.executable), self.model, port, cores[core % len(cores)], 4096, socket, BLOCK)
            started.append(Served(start(self.children, name, engine), f"http://127.0.0.1:{port}"))
        for served in started:
            await_http(served.child, f"{served.url}/health", START_S)
        return started

    def store(self) -> memory.Store:
        return memory.connect(self.direct, timeout_s=10, name="test")

    def stats(self) -> dict[str, Any]:
        with self.store() as store:
            return store.stats()

    def flush(self) -> None:
        with self.store() as store:
            store.flush()


@dataclass
class Day:
    """What the scenario left behind."""

    words: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def day(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Day:
    folder = tmp_path_factory.mktemp("v")
    seen, asked, figures = Day(), prompts(), {}
    began_s = time.monotonic()

    def all_of(served: Served, where: str) -> int:
        """Ask one after the other; the prompt tokens that were not computed."""
        since_s = time.monotonic()
        said = [served.ask(prompt, f"{where}-{i}") for i, prompt in enumerate(asked)]
        seen.words[where], seen.seconds[where] = [text for text, _ in said], time.monotonic() - since_s
        return sum(cached for _, cached in said)

    with Children(folder) as children:
        place = Place(children, folder, smollm2)
        first, plain = place.serve(first=True, plain=False)
        with ThreadPoolExecutor() as both:
            without, cold = both.map(all_of, (plain, first), ("plain", "cold"))
        assert (without, cold) == (0, 0)
        place.flush()
        first.forget()
        figures["cached_after_reset"] = all_of(first, "after_reset")
        figures["external_hit_tokens"] = first.external
        first.forget()
        before, loaded = place.relay.leases, first.metric("outrider_loaded_blocks")
        with ThreadPoolExecutor(16) as crowd:
            seen.words["crowd"] = [text for text, _ in crowd.map(first.ask, [asked[0]] * 16)]
        figures["crowd_leases"] = place.relay.leases - before
        figures["crowd_loaded_tokens"] = (first.metric("outrider_loaded_blocks") - loaded) * BLOCK
        vllm_tokens, vllm_loaded = first.external, first.metric("outrider_loaded_blocks")
        for served in (first, plain):
            served.kill()

        again, second = place.serve(again=True, second=True)
        for served, where in ((again, "after_restart"), (second, "second_server")):
            figures[f"cached_{where}"] = all_of(served, where)
            figures[f"{where}_hit_tokens"] = served.external
            vllm_tokens += served.external
            vllm_loaded += served.metric("outrider_loaded_blocks")
        figures["vllm_external_tokens"] = vllm_tokens
        figures["connector_loaded_tokens"] = vllm_loaded * BLOCK
        figures["memory_hit_tokens"] = place.stats()["hit_blocks"] * BLOCK
        met = place.stats()["wants_met"]
        with place.store() as store:  # as the gateway does: by the id of a call that is over
            store.want(Want("second_server-0", "host", time.monotonic() + 30, 5.0))
        second.forget()
        second.ask(asked[0])
        figures["wants_met"] = place.stats()["wants_met"] - met

        for served, where, end in ((second, "killed", signal.SIGKILL), (again, "stopped", signal.SIGSTOP)):
            served.forget()
            place.relay.at_lease = lambda end=end: os.kill(place.server.process.pid, end)
            all_of(served, where)
            figures[f"{where}_failed_tokens"] = served.metric("outrider_failed_blocks") * BLOCK
            assert place.relay.at_lease is None, "nothing was loaded: it did not die in the middle of anything"
            if end == signal.SIGKILL:
                place.server.process.wait()
                place.server = place.serve_memory("memory-again")
            else:
                os.kill(place.server.process.pid, signal.SIGCONT)
            figures[f"back_after_{where}"] = comes_back(served, asked[1])
        place.relay.close()
    expected = seen.words["plain"]
    figures["identical"] = all(
        words == (expected if where != "crowd" else expected[:1] * 16) for where, words in seen.words.items()
    )
    figures |= {"vllm_version": vllm.__version__, "block_tokens": BLOCK, "model": "smollm2, float32, greedy"}
    figures |= {"seconds": seen.seconds, "scenario_s": time.monotonic() - began_s}
    seen.figures = figures
    target = ROOT / "build" / "test-vllm.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(figures, indent=1) + "\n")
    return seen


def comes_back(served: Served, prompt: str) -> bool:
    """Ask until it loads again."""
    loaded, by_s = served.metric("outrider_loaded_blocks"), time.monotonic() + 30
    while served.metric("outrider_loaded_blocks") == loaded and time.monotonic() < by_s:
        served.forget()
        served.ask(prompt)
    return served.metric("outrider_loaded_blocks") > loaded


def wait_for(true: Callable[[], bool], within_s: float = 20.0) -> None:
    by_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < by_s
        time.sleep(0.05)


def test_words_are_the_same_with_and_without_it(day: Day) -> None:
    assert all(len(text) > 10 for text in day.words["plain"])
    for where, words in day.words.items():
        expected = day.words["plain"] if where != "crowd" else day.words["plain"][:1] * 16
        assert words == expected, where
    assert day.figures["identical"]


@pytest.mark.parametrize("where", ["after_reset", "after_restart", "second_server"])
def test_the_same_prompts_are_served_from_outriders_blocks(day: Day, where: str) -> None:
    tokens = day.figures["external_hit_tokens" if where == "after_reset" else f"{where}_hit_tokens"]
    assert tokens == day.figures[f"cached_{where}"], "vLLM's metrics and its usage"
    assert tokens > 6 * 5 * BLOCK and tokens % BLOCK == 0


def test_a_crowd_loads_a_prefix_once(day: Day) -> None:
    assert day.figures["crowd_leases"] == 1
    assert 0 < day.figures["crowd_loaded_tokens"] < 30 * BLOCK


def test_both_sides_count_the_same(day: Day) -> None:
    counted = [day.figures[name] for name in ("vllm_external_tokens", "connector_loaded_tokens", "memory_hit_tokens")]
    assert counted[0] == counted[1] == counted[2] > 0


def test_the_gateways_want_found_the_context(day: Day) -> None:
    assert day.figures["wants_met"] == 2, "the gateway's, and the connector's own at the arrival"


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_memory_server_that_ends_in_mid_load_costs_time_and_no_answer(day: Day, how: str) -> None:
    assert day.figures[f"{how}_failed_tokens"] > 0, "a load was under way"
    assert day.words[how] == day.words["plain"]
    assert day.seconds[how] < 60
    assert day.figures[f"back_after_{how}"], "it comes back by itself"


def test_the_figures_are_written(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads((ROOT / "build" / "test-vllm.json").read_text())
    assert written == json.loads(json.dumps(day.figures))
    with capsys.disabled():
        sys.stdout.write(f"\n{json.dumps(written, indent=1)}\n")
