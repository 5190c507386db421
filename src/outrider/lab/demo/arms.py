"""One arm of the demo: starts the processes, plays the workload, and sums up what it cost.

baseline   the same two engines with their own prefix cache, FCFS, session-sticky routing, no memory
outrider   remaining work first, routing by residency and load, KV blocks in memory, wants for returning turns
"""

import asyncio
import contextlib
import json
import os
import re
import statistics
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from outrider import journal, memory
from outrider.lab import vllm_server
from outrider.lab.demo import caller
from outrider.lab.demo.workload import Workflow
from outrider.lab.processes import Child, Children, await_http, await_path, free_port
from outrider.lab.report.totals import prompt_tokens_from

ENDINGS = ("Settle", "Reject", "Relay", "Break", "Abort")  # the gateway's terminal commands, one a call
START_S = 120.0  # an engine loads its weights, and the first one converts them


@dataclass(frozen=True)
class Vllm:
    """Where vLLM's interpreter and the model's files are."""

    python: Path
    folder: Path


@dataclass(frozen=True)
class Fleet:
    """What both arms run on. `tiers` is used by the outrider arm alone; `vllm` None: the embedded engine."""

    model: str
    kv_tokens: int  # of each engine
    tiers: str
    engines: int = 2
    max_num_seqs: int = 8
    vllm: Vllm | None = None


@dataclass
class Running:
    """The processes of one arm, as tests that kill some of them see them."""

    gateway_url: str
    engine_urls: list[str]
    engines: list[Child]
    gateway: Child
    memory: Child | None
    socket: Path | None
    journal: Path  # the gateway's


@contextlib.contextmanager
def running(name: str, fleet: Fleet, run_dir: Path) -> Iterator[Running]:
    """Start one arm's processes in `run_dir/NAME`, where their journals and logs go; end them all on leaving."""
    own = run_dir / name
    own.mkdir()
    # a socket's path may have 107 bytes: it gets a short directory of its own, wherever the run is kept
    with tempfile.TemporaryDirectory(prefix="outrider-", dir="/tmp") as short, Children(own) as children:
        server, socket = None, None
        if name == "outrider":
            socket = Path(short) / "memory.sock"
            server = children.outrider(
                "memory",
                "memory",
                "serve",
                "--socket",
                str(socket),
                "--tiers",
                f"{fleet.tiers},path={own / 'blocks'}",
                "--journal",
                str(own),
            )
            await_path(server, socket, START_S)
        ports = [free_port() for _ in range(fleet.engines)]
        attach = ["--memory", str(socket)] if socket else []
        engines = [_engine(children, fleet, number, port, socket) for number, port in enumerate(ports)]
        for engine, port in zip(engines, ports, strict=True):
            await_http(engine, f"http://127.0.0.1:{port}/health", START_S)
        gateway_port = free_port()
        engine_urls = [f"http://127.0.0.1:{port}" for port in ports]
        urls = [argument for url in engine_urls for argument in ("--engine", url)]
        order = (
            ["--policy", "srtf", "--routing", "residency"] if socket else ["--policy", "fcfs", "--routing", "sticky"]
        )
        gateway = children.outrider(
            "gateway", "serve", *urls, "--port", str(gateway_port), *order, *attach, "--journal", str(own)
        )
        url = f"http://127.0.0.1:{gateway_port}"
        await_http(gateway, f"{url}/health", START_S)
        yield Running(url, engine_urls, engines, gateway, server, socket, own / "agents.jsonl")


def _engine(children: Children, fleet: Fleet, number: int, port: int, socket: Path | None) -> Child:
    """Start one engine, on a core of its own where it is vLLM."""
    name = f"engine-{number}"
    if fleet.vllm is None:
        options = ["--model", fleet.model, "--port", str(port), "--kv-tokens", str(fleet.kv_tokens)]
        options += ["--max-num-seqs", str(fleet.max_num_seqs)]
        return children.outrider(name, "engine", *options, *(["--memory", str(socket)] if socket else []))
    cores = sorted(os.sched_getaffinity(0))
    engine = vllm_server.Engine(
        fleet.vllm.python,
        fleet.vllm.folder,
        port,
        cores[number % len(cores)],
        fleet.kv_tokens,
        socket,
        max_num_seqs=fleet.max_num_seqs,
        name=fleet.model,
    )
    return vllm_server.start(children, name, engine)


def play(
    arm: Running, model: str, workflows: list[Workflow], on_answer: Callable[[caller.Answer], None]
) -> dict[str, Any]:
    """Play the workload against a running arm; its figures and answers, as the JSON has them."""
    record = asyncio.run(caller.play(arm.gateway_url, model, workflows, on_answer))
    gateway = gateway_stats(arm)
    moved: dict[str, int] = {}
    stats: dict[str, Any] = {}
    if arm.socket and arm.memory and arm.memory.running:
        with contextlib.closing(memory.connect(arm.socket, timeout_s=10, name="demo")) as store:
            stats = store.stats()
        moved = stats["moved_bytes"]
    alive = [url for url, engine in zip(arm.engine_urls, arm.engines, strict=True) if engine.running]
    figures = _figures(record, workflows)
    # vLLM's usage does not tell memory's part of the cached tokens, its metrics do
    told = figures["prompt_tokens_from_memory"] or sum(map(_external_tokens, alive))
    figures["prompt_tokens_from_memory"] = min(told, figures["prompt_tokens_reused"])
    return {
        **figures,
        "prompt_tokens_from": _sources(figures, stats.get("hit_blocks_by_tier", {})),
        **_ledger_of_calls(arm.journal),
        "preemptions": sum(map(_preemptions, alive)),
        "failed_attempts": gateway["failed_attempts"],
        "kv": _kv(gateway),
        "bytes_moved": moved,
        "memory": stats,
        "answers": _texts(record),
    }


def gateway_stats(arm: Running) -> dict[str, Any]:
    """The gateway's /v1/outrider/stats at this moment."""
    with urllib.request.urlopen(f"{arm.gateway_url}/v1/outrider/stats", timeout=10) as answer:
        stats: dict[str, Any] = json.load(answer)
    return stats


class _Arrival(msgspec.Struct):
    id: str


class _Said(msgspec.Struct):
    """An event or a command, as far as it matters here: what it is, and of which call."""

    type: str
    call: _Arrival | str = ""


def _ledger_of_calls(path: Path) -> dict[str, int]:
    """From the gateway's journal, not the client: calls that arrived, and that did not end exactly once (law 8)."""
    endings: dict[str, int] = {}
    _, lines = journal.read(path)
    for line in lines:
        event = msgspec.json.decode(line.event, type=_Said)
        if event.type == "Arrived" and isinstance(event.call, _Arrival):
            endings[event.call.id] = 0
        for command in msgspec.json.decode(line.commands, type=list[_Said]):
            if command.type in ENDINGS and isinstance(command.call, str):
                endings[command.call] += 1
    return {
        "arrivals": len(endings),
        "duplicates": sum(count > 1 for count in endings.values()),
        "unended": sum(count == 0 for count in endings.values()),
    }


def _preemptions(url: str) -> int:
    """Requests whose blocks were taken and which computed again, as the engine counts them."""
    return _counted(url, r"num_preemptions_total\S*")


def _external_tokens(url: str) -> int:
    """Prompt tokens that came through a KV connector, as vLLM counts them; 0 of an engine that has no such word."""
    return _counted(url, r'prompt_tokens_by_source_total\{[^}]*source="external_kv_transfer"[^}]*\}')


def _counted(url: str, series: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found = re.search(rf"^vllm:{series} (\S+)$", answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


def _figures(record: caller.Record, workflows: list[Workflow]) -> dict[str, Any]:
    answers = record.answers
    returning = [answer.ttft_s for answer in answers if answer.returning]
    all_s = [answer.ttft_s for answer in answers]
    prompt = sum(answer.prompt_tokens for answer in answers)
    reused = sum(answer.reused_tokens for answer in answers)
    return {
        "calls": sum(workflow.calls for workflow in workflows),
        "answered": len({(answer.agent, answer.turn) for answer in answers}),
        "sends": sum(answer.sends for answer in answers),
        "workflows": len(record.completions_s),
        "prompt_tokens": prompt,
        "output_tokens": sum(answer.output_tokens for answer in answers),
        "prompt_tokens_computed": prompt - reused,
        "prompt_tokens_reused": reused,
        "prompt_tokens_from_memory": sum(answer.external_tokens for answer in answers),
        "ttft_p50_s": quantile(all_s, 0.5),
        "ttft_p95_s": quantile(all_s, 0.95),
        "returning_ttft_p50_s": quantile(returning, 0.5),
        "returning_ttft_p95_s": quantile(returning, 0.95),
        "workflow_completion_mean_s": statistics.fmean(record.completions_s.values()),
        "wall_s": record.wall_s,
        "open_context_tokens_peak": record.open_tokens_peak,
    }


def _sources(figures: dict[str, Any], hit_blocks: dict[str, int]) -> dict[str, int]:
    prompt, reused = figures["prompt_tokens"], figures["prompt_tokens_reused"]
    return prompt_tokens_from(prompt, reused, figures["prompt_tokens_from_memory"], hit_blocks)


def _kv(gateway: dict[str, Any]) -> dict[str, int]:
    """KV tokens over all calls: reserved by the gateway's forecast, by prompt + max_tokens, and really used."""
    return {
        "reserved_tokens": gateway["reserved_tokens"],
        "reserved_by_max_tokens": gateway["max_tokens_reserved"],
        "used_tokens": gateway["used_tokens"],
    }


def _texts(record: caller.Record) -> dict[str, str]:
    return {
        f"{answer.agent}/{answer.turn}": answer.text
        for answer in sorted(record.answers, key=lambda a: (a.agent, a.turn))
    }


def quantile(values: list[float], share: float) -> float:
    """Nearest-rank quantile: a value that was really seen."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
