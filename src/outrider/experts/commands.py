"""`outrider experts ...`: plan a step from recorded routes, ask whether it pays, convert routing tables. A door."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from outrider.errors import CallerError

app = typer.Typer(
    help="MoE expert load: plan every micro-step of an RL step from recorded routes.", no_args_is_help=True
)

Routing = Annotated[Path, typer.Argument(help="Routes: veRL, vLLM, SGLang, Megatron, npz; told by content.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert-parallel ranks.", min=1)]
Nodes = Annotated[int, typer.Option(help="Nodes that the ranks lie in; links between them are the slow ones.", min=1)]
Tokens = Annotated[int | None, typer.Option("--microbatch-tokens", help="Tokens in a micro-batch.", min=1)]
Seqs = Annotated[int | None, typer.Option("--microbatch-seqs", help="Whole sequences in a micro-batch.", min=1)]
Domain = Annotated[str | None, typer.Option(help="Only this domain of the table.")]
Form = Annotated[str | None, typer.Option("--format", help="Of the routes, where content does not tell.")]
Experts = Annotated[int | None, typer.Option(help="Experts of a layer; default: the largest id plus one.", min=1)]
Links = Annotated[str, typer.Option(help="nvlink, pcie, ib, or a TOML file of rates: for modelled seconds.")]
Model = Annotated[str, typer.Option(help="Shape of an expert: a known model, or HIDDENxINNER.")]
Scale = Annotated[int, typer.Option(help="Real token-slots that a counted one stands for, in modelled time.", min=1)]


@app.command(epilog="Example:  outrider experts plan routing.npz --ep 16 --nodes 2 --slots 2 --microbatch-tokens 1024")
def plan(
    routing: Routing,
    ep: Ep,
    nodes: Nodes = 1,
    slots: Annotated[int, typer.Option(help="Spare expert slots of a rank and layer.", min=0)] = 2,
    microbatch_tokens: Tokens = None,
    microbatch_seqs: Seqs = None,
    domain: Domain = None,
    planner: Annotated[
        str, typer.Option(help="foresight, or a rival: static, eplb, eplb-oracle, split, lplb-like, ...")
    ] = "foresight",
    objective: Annotated[
        str, typer.Option(help="balance: least largest load, then few copies. time: least modelled seconds.")
    ] = "balance",
    links: Links = "nvlink",
    model: Model = "qwen3-30b-a3b",
    row_scale: Scale = 1,
    exclude: Annotated[list[int] | None, typer.Option(help="Rank that holds no expert; repeat for several.")] = None,
    experts: Experts = None,
    format: Form = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this npz.")] = None,
    explain: Annotated[
        str | None, typer.Option(help="LAYER,MICROSTEP: why the load there is what it is, in words.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Plan all micro-steps of one RL step: homes, copies, exact token split; print how close to even they come."""
    from outrider.experts import study
    from outrider.experts.adapters import plans

    where = _pair(explain) if explain else None
    if out:
        _writable(out)
    asked = study.Study(
        ranks=ep,
        ranks_per_node=_in_nodes(ep, nodes),
        slots=slots,
        microbatch_tokens=microbatch_tokens,
        microbatch_seqs=microbatch_seqs,
        format=format,
        domain=domain,
        experts=experts,
        planner=planner,
        objective=objective,
        links=links,
        model=model,
        row_scale=row_scale,
        excluded=tuple(exclude or ()),
    )
    with Progress(console=Console(stderr=True), transient=True, disable=json) as bars:
        bar = bars.add_task("micro-steps planned", total=None)
        found, result = study.run(routing, asked, lambda: bars.advance(bar))
    if out:
        plans.save(found, out)
    if json:
        sys.stdout.write(jsonlib.dumps(result) + "\n")
        return
    console = Console()
    console.print(_scored(result))
    if where:
        console.print(found.explain(*where), highlight=False, markup=False)
    if out:
        console.print(f"Plan: {out}", soft_wrap=True, highlight=False)


@app.command(
    epilog="Example:  outrider experts doctor routing.npz --ep 8 --microbatch-seqs 2 --links ib --row-scale 64"
)
def doctor(
    routing: Routing,
    ep: Ep,
    nodes: Nodes = 1,
    microbatch_tokens: Tokens = None,
    microbatch_seqs: Seqs = None,
    domain: Domain = None,
    links: Links = "nvlink",
    model: Model = "qwen3-30b-a3b",
    row_scale: Scale = 1,
    experts: Experts = None,
    format: Form = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Say in plain words whether balancing pays, with how many slots, what it saves and what would change that."""
    import msgspec

    from outrider.experts import study
    from outrider.experts.cost import LINKS
    from outrider.experts.doctor import SCALES, SLOTS, advise

    asked = study.Study(
        ranks=ep,
        ranks_per_node=_in_nodes(ep, nodes),
        microbatch_tokens=microbatch_tokens,
        microbatch_seqs=microbatch_seqs,
        format=format,
        domain=domain,
        experts=experts,
        links=links,
        model=model,
        row_scale=row_scale,
    )
    cost = asked.cost
    counted = study.count(routing, asked)
    with Progress(console=Console(stderr=True), transient=True, disable=json) as bars:
        bar = bars.add_task("plans made", total=len(SLOTS) + len(LINKS) + len(SCALES))
        advice = advise(counted.counts_MLRE, cost, asked.ranks_per_node, lambda: bars.advance(bar))
    if json:
        sys.stdout.write(msgspec.json.encode(advice).decode() + "\n")
        return
    console = Console()
    for line in advice.words:
        console.print(line, highlight=False)
    console.print(f"[dim]All of it modelled: {model}, {links}, {cost.flop_s / 1e12:.0f} Tflop/s a rank.[/]")


@app.command(epilog="Example:  outrider experts convert verl_batch.npz routing.npz --to outrider")
def convert(
    routing: Routing,
    out: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[
        str, typer.Option(help="outrider, domains, dump, verl, vllm, engine, sglang, megatron.")
    ] = "outrider",
    format: Form = None,
    domain: Domain = None,
    experts: Experts = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers, where the file does not say.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token, where the file does not say.", min=1)] = None,
    pipeline: Annotated[int, typer.Option(help="Pipeline stages of a Megatron trace.", min=1)] = 1,
    step: Annotated[int | None, typer.Option(help="RL step of a trace that holds several.", min=0)] = None,
) -> None:
    """Write a routing table in another format."""
    from outrider.experts.adapters import Ask
    from outrider.experts.adapters import convert as write

    ask = Ask(experts=experts, layers=layers, top_k=top_k, pipeline=pipeline, step=step)
    table = write(routing, out, to=to, format=format, domain=domain, ask=ask)
    words = f"Routes: {out}, {table.tokens} tokens, {table.layers} layers, top {table.top_k} of {table.experts}"
    Console().print(words, soft_wrap=True, highlight=False)


def _in_nodes(ranks: int, nodes: int) -> int:
    if ranks % nodes:
        raise CallerError(
            f"--ep {ranks} --nodes {nodes}: ranks do not divide. Give a number of nodes that divides them."
        )
    return ranks // nodes


def _pair(text: str) -> tuple[int, int]:
    layer, _, step = text.partition(",")
    if not (layer.isdecimal() and step.isdecimal()):
        raise CallerError(f"--explain {text}: give LAYER,MICROSTEP, as 3,0.")
    return int(layer), int(step)


def _writable(path: Path) -> None:
    """What would fail at the end fails now."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise CallerError(f"--out {path}: {error.strerror}. Name a file that can be written.") from error


def _scored(result: dict[str, Any]) -> Table:
    title = f"{result['planner']}: {result['layers']} layers, {result['micro_steps']} micro-steps, EP {result['ranks']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "mean", "p50", "p95", "max"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("largest / mean rank load, homes only", "imbalance_at_home"),
        ("largest / mean rank load, planned", "imbalance"),
        ("largest / least that integers allow", "over_bound"),
    )
    for words, key in rows:
        table.add_row(words, *(f"{result[key][name]:.4f}" for name in ("mean", "p50", "p95", "max")))
    table.add_section()
    table.add_row("copies moved, a layer and micro-step", f"{result['copies_per_layer_microstep']:.2f}")
    table.add_row("planning, us a layer and micro-step", f"{result['plan_us_per_layer']:.0f}")
    table.add_row("modelled seconds (even gate)", f"{result['modelled_s']:.3f} ({result['force_balanced_s']:.3f})")
    table.add_row("modelled seconds exposed by copies", f"{result['exposed_s']:.4f}")
    table.add_row("tiers", ", ".join(f"{name} {count}" for name, count in result["tiers"].items() if count))
    return table
