"""The command line. Parses, calls one function, prints; a mistake becomes one sentence and exit code 2.

Doors are imported inside their commands: `outrider --help` must not load torch.
"""

import errno
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import outrider
from outrider.errors import LawBroken, OutriderError
from outrider.experts.commands import app as experts_app

SAID_WRONG = 2  # exit code: the caller can mend it
WENT_WRONG = 1  # exit code: it ran, and the answer is no
INTERRUPTED = 130
MENDS = {  # what the operating system may refuse, and what a person can do about it
    errno.ENOSPC: "Free some space there, or name another place (TMPDIR, --keep, --journal, path=).",
    errno.EDQUOT: "Free some of your quota there, or name another place (TMPDIR, --keep, --journal, path=).",
    errno.EACCES: "Give this user the right to it, or name another place.",
    errno.EROFS: "Name a place that can be written.",
}

app = typer.Typer(
    name="outrider",
    help="Rides ahead of an LLM: moves KV cache, experts and requests to where they will be needed.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
memory_app = typer.Typer(
    help="KV blocks beyond the engine: a host tier in shared memory, a disk tier behind it.", no_args_is_help=True
)
app.add_typer(memory_app, name="memory")
app.add_typer(experts_app, name="experts")

Port = Annotated[int, typer.Option(help="TCP port to listen on.", min=1, max=65535)]
Host = Annotated[str, typer.Option(help="Address to bind; anything but 127.0.0.1 is reachable from outside.")]
JournalDir = Annotated[
    Path | None, typer.Option("--journal", help="Existing directory to write this policy's journal into.")
]

ReportFile = Annotated[
    Path,
    typer.Option(
        "--report", help="Write the HTML page to this file, and a trace for Perfetto beside it; none: neither."
    ),
]


class Order(StrEnum):
    """How the gateway orders waiting calls."""

    fcfs = "fcfs"
    srtf = "srtf"


class Engine(StrEnum):
    """What the demo runs its agents on."""

    embedded = "embedded"
    vllm = "vllm"


class Routing(StrEnum):
    """How the gateway chooses an engine."""

    sticky = "sticky"
    residency = "residency"


@app.command(epilog="Example:  outrider engine --model smollm2 --port 8001 --kv-tokens 4096")
def engine(
    model: Annotated[
        str, typer.Option(help="smollm2 (real weights), tiny-moe (random weights), or a local model directory.")
    ],
    port: Port,
    kv_tokens: Annotated[int, typer.Option(help="Size of the paged KV cache, in tokens.", min=32)],
    memory: Annotated[
        Path | None, typer.Option(help="Socket of `outrider memory serve`: blocks are loaded and saved there.")
    ] = None,
    host: Host = "127.0.0.1",
    dtype: Annotated[str, typer.Option(help="float32 (exact) or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads of the forward pass.", min=1)] = 1,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step at most; longer prompts are chunked.", min=16)
    ] = 512,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in one step at most.", min=1)] = 8,
    block_tokens: Annotated[int, typer.Option(help="Tokens in a KV block.", min=1)] = 16,
    salt: Annotated[str, typer.Option(help="Tenant: blocks are shared only under the same salt.")] = "",
) -> None:
    """The embedded CPU engine: small, readable, for laptops and tests. It is not the product."""
    from outrider.lab.engine.server import serve

    serve(
        model,
        port,
        kv_tokens,
        memory,
        host=host,
        dtype=dtype,
        threads=threads,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        block_tokens=block_tokens,
        salt=salt,
    )


@memory_app.command(
    "serve",
    epilog="Example:  outrider memory serve --socket /run/outrider.sock --tiers host=1GiB,disk=8GiB,path=/data/kv",
)
def memory_serve(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on (mode 0600).")],
    tiers: Annotated[
        str,
        typer.Option(
            help="Tiers and sizes: host=SIZE, then hybrid=SIZE,cache=SIZE (an emulated CXL-hybrid device, with "
            "profile=NAME at its speed; or hybrid=dax:/dev/daxX.Y, hybrid=numa:NODE:SIZE), disk=SIZE; path=DIR."
        ),
    ],
    journal: JournalDir = None,
) -> None:
    """Own the KV blocks of all engines on this machine, until SIGTERM."""
    from outrider.memory.server import serve

    serve(socket, tiers, journal)


@app.command(
    epilog="Example:  outrider serve --engine http://127.0.0.1:8001 --engine http://127.0.0.1:8002 --port 8000"
)
def serve(
    engine: Annotated[
        list[str] | None, typer.Option(help="URL of an OpenAI-compatible engine; repeat for several.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on.", min=1, max=65535)] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind; anything but 127.0.0.1 is reachable from outside.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file; docs/outrider.toml is an example. Options win over it.")
    ] = None,
    memory: Annotated[Path | None, typer.Option(help="Socket of `outrider memory serve`: wants go there.")] = None,
    policy: Annotated[
        Order | None, typer.Option(help="fcfs, or srtf: least predicted remaining workflow first.")
    ] = None,
    routing: Annotated[
        Routing | None, typer.Option(help="sticky: by session; residency: by cached prefix and load.")
    ] = None,
    journal: JournalDir = None,
) -> None:
    """The gateway: OpenAI-compatible, before one or more engines; orders, routes and foresees agent calls."""
    from outrider import settings, stack
    from outrider.agents.settings import GatewaySettings

    overrides = {
        "engines": engine,
        "port": port,
        "host": host,
        "memory_attached": True if memory else None,
        "policy": policy and policy.value,
        "routing": routing and routing.value,
    }
    stack.serve_gateway(settings.read(config, "agents", GatewaySettings, overrides), memory, journal)


@app.command(epilog="Example:  outrider replay run/agents.jsonl")
def replay(
    journal: Annotated[Path, typer.Argument(help="A NAME.jsonl that a live or simulated run wrote.")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Run a journal through a fresh policy object and compare the commands, byte for byte."""
    import msgspec

    from outrider import metrics, stack

    agreed, difference = stack.replay(journal)
    if json:
        result = {
            "lines": agreed,
            "same": difference is None,
            "difference": difference,
            "tally": metrics.tally(journal),
        }
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    elif difference is None:
        Console().print(f"{journal}: {agreed} events, the same commands, byte for byte.")
    else:
        out = Console(soft_wrap=True, highlight=False)
        out.print(f"{journal}: line {difference.line} differs, {agreed} events before it agree.", markup=False)
        out.print(
            f"  event     {difference.event}\n  recorded  {difference.recorded}\n  replayed  {difference.replayed}",
            markup=False,
        )
    if difference is not None:
        raise typer.Exit(WENT_WRONG)


@app.command(epilog="Example:  outrider demo --repo ~/src/flask --json demo.json")
def demo(
    repo: Annotated[
        Path | None, typer.Option(help="Source tree to review; default: the standard library's asyncio and json.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="2 workflows on tiny-moe (random weights), under a minute: for tests.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Existing directory for journals and logs; default: deleted at the end.")
    ] = None,
    report: ReportFile = Path("outrider-report.html"),
    engine: Annotated[
        Engine, typer.Option(help="embedded, or vllm: two vLLM CPU servers, one core each (`make .venv-vllm`).")
    ] = Engine.embedded,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has vLLM and outrider; default: .venv-vllm of this checkout, or the PATH."),
    ] = None,
) -> None:
    """The main job: a multi-agent code review, live, without and with Outrider; then one RL step on 2 ranks."""
    from outrider.lab.demo import run

    run.run(
        run.Options(
            repo=repo,
            quick=quick,
            json=json,
            keep=keep,
            report=_wanted(report),
            engine=engine.value,
            vllm_python=vllm_python,
        )
    )


@app.command(epilog="Example:  outrider report kept/outrider-1a2b3c4d")
def report(
    run: Annotated[Path, typer.Argument(help="The directory of one run, which demo or simulate left below --keep.")],
    report: ReportFile = Path("outrider-report.html"),
) -> None:
    """Draw the report and the trace of a kept run once more."""
    from outrider.lab import report as reports

    told = reports.kept(run)
    if (path := _wanted(report)) is not None:
        reports.check(path)
        reports.write(path, told)
        Console().print(f"Report: {path}, trace: {reports.trace_path(path)}", soft_wrap=True, highlight=False)


def _wanted(report: Path) -> Path | None:
    return None if report == Path("none") else report


@app.command(
    epilog="Example:  outrider simulate conversation_trace.jsonl.xz --limit 500 --tiers host=64GiB,disk=1TiB --compare"
)
def simulate(
    trace: Annotated[
        Path,
        typer.Argument(help="claude-code, chatdev, tau2, mooncake or azure trace, plain or .xz; or an agents.jsonl."),
    ],
    policy: Annotated[
        Order, typer.Option(help="fcfs, or srtf: least predicted remaining workflow first.")
    ] = Order.srtf,
    routing: Annotated[
        Routing, typer.Option(help="sticky: by workflow; residency: by cached prefix and load.")
    ] = Routing.residency,
    tiers: Annotated[
        str, typer.Option(help="Memory's tiers and sizes, as for `outrider memory serve`; none: no memory server.")
    ] = "none",
    engines: Annotated[
        int | None, typer.Option(help="Number of engines. Default: 2, or as many as the journal had.", min=1)
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="KV cache of each engine, tokens. Default: the profile's, or the journal's.", min=1),
    ] = None,
    credit: Annotated[
        int | None,
        typer.Option(help="Calls in flight per engine. Default: its batch's seats, or the journal's.", min=1),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="A modelled engine by name: rtxpro6000-llama-3.1-8b (default), rtxpro6000-qwen3-30b-a3b, smollm2-cpu."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="agents.jsonl of a live run: engines as fast as its. Default of --profile: smollm2-cpu."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="claude-code, chatdev, tau2, mooncake, azure or outrider; default: recognised by the trace's content."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many workflows.", min=1)] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Workflows per second. Default: the trace's own, or 1 a minute where it has none."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Draws arrivals that a trace does not have. Same seed, same bytes out.")
    ] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the same calls under fcfs, sticky, no memory beside it.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, nothing else.")] = False,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Existing directory; the run's journals go into a new one below it, for `outrider replay` and "
            "`outrider report`. Default: deleted at the end."
        ),
    ] = None,
    report: ReportFile = Path("outrider-report.html"),
) -> None:
    """What a cluster would do with a trace: the policies that run live, modelled engines and links, a virtual clock."""
    from outrider.lab.simulate import run

    run.run(
        run.Options(
            trace=trace,
            policy=policy.value,
            routing=routing.value,
            tiers=tiers,
            engines=engines,
            kv_tokens=kv_tokens,
            credit=credit,
            profile=profile,
            calibrate=calibrate,
            format=format,
            limit=limit,
            rate=rate,
            seed=seed,
            compare=compare,
            json=json,
            keep=keep,
            report=_wanted(report),
        )
    )


def _version(show: bool) -> None:
    if show:
        Console().print(f"outrider {outrider.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the whole command line."""


def main() -> None:
    """Run the command line: one sentence and exit 2 for the caller's or the world's fault, a traceback for ours."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        app(standalone_mode=True)
    except LawBroken:
        raise  # our fault: whoever reports it needs the whole traceback
    except OutriderError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        _fail(f"{missing} is not installed. Run: pip install 'outrider[all]' -c constraints.txt")
    except OSError as error:
        if error.errno not in MENDS:
            raise
        _fail(f"{error.filename or 'a file that is being written'}: {error.strerror}. {MENDS[error.errno]}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"outrider: {sentence}", markup=False)
    sys.exit(SAID_WRONG)


def _as_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
