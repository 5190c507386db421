"""`outrider experts ...`: plan a step from recorded routes, ask whether it pays, convert routing tables. A door."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from outrider.errors import CallerError
from outrider.experts import tables
from outrider.experts.options import (
    Domain,
    Ep,
    Experts,
    Form,
    Json,
    Links,
    Model,
    Nodes,
    Routing,
    Scale,
    Seqs,
    Slots,
    Tokens,
    bars,
    check_writable,
    load_of,
    pair_of,
    study_of,
)

app = typer.Typer(
    help="MoE expert load: plan every micro-step of an RL step from recorded routes.", no_args_is_help=True
)


@app.command(epilog="Example:  outrider experts plan routing.npz --ep 16 --nodes 2 --slots 2 --microbatch-tokens 1024")
def plan(
    options: typer.Context,
    routing: Routing,
    ep: Ep,
    nodes: Nodes = 1,
    slots: Slots = 2,
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
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the plan into this png, svg or pdf: loads before and after, and rivals beside it."),
    ] = None,
    plot_layer: Annotated[
        int | None, typer.Option(help="Layer of the plot's heat maps; default: the fullest at home.", min=0)
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="LAYER,MICROSTEP: why the load there is what it is, in words.")
    ] = None,
    json: Json = False,
) -> None:
    """Plan all micro-steps of one RL step: homes, copies, exact token split; print how close to even they come."""
    import msgspec

    from outrider.experts import draw, front, picture, study
    from outrider.experts.adapters import plans

    where = pair_of(explain) if explain else None
    if plot:
        draw.ready(plot)
    for option, path in (("--out", out), ("--plot", plot)):
        if path:
            check_writable(option, path)
    asked = study_of(options.params)
    with bars(json) as shown:
        bar = shown.add_task("micro-steps planned", total=None)
        found, result = study.run(routing, asked, lambda: shown.advance(bar))
        if where:
            result["explain"] = found.explain(*where)
        if out:
            plans.save(found, out)
        if plot:
            counts_MLRE = picture.counts_of(found)
            told = picture.picture(routing.name, asked, found, counts_MLRE, plot_layer)
            bar = shown.add_task("planners compared", total=len(front.settings(asked)))
            others = front.front(counts_MLRE, asked, found, lambda: shown.advance(bar))
            draw.draw(plot, told, others)
            result["front"] = msgspec.to_builtins(others.points)
    if json:
        sys.stdout.write(jsonlib.dumps(result) + "\n")
        return
    console = Console()
    console.print(tables.planned(result))
    if where:
        console.print(result["explain"], highlight=False, markup=False)
    for words, path in (("Plan", out), ("Plot", plot)):
        if path:
            console.print(f"{words}: {path}", soft_wrap=True, highlight=False)


@app.command(
    epilog="Example:  outrider experts doctor routing.npz --ep 8 --microbatch-seqs 2 --links ib --row-scale 64"
)
def doctor(
    options: typer.Context,
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
    json: Json = False,
) -> None:
    """Say in plain words whether balancing pays, with how many slots, what it saves and what would change that."""
    import msgspec

    from outrider.experts import study
    from outrider.experts.cost import LINKS
    from outrider.experts.doctor import SCALES, SLOTS, advise

    asked = study_of(options.params)
    cost = asked.cost
    counted = study.count(routing, asked)
    with bars(json) as shown:
        bar = shown.add_task("plans made", total=len(SLOTS) + len(LINKS) + len(SCALES))
        advice = advise(counted.counts_MLRE, cost, asked.ranks_per_node, lambda: shown.advance(bar))
    if json:
        sys.stdout.write(msgspec.json.encode(advice).decode() + "\n")
        return
    console = Console()
    for line in advice.words:
        console.print(line, highlight=False)
    console.print(f"[dim]All of it modelled: {model}, {links}, {cost.flop_s / 1e12:.0f} Tflop/s a rank.[/]")


@app.command(epilog="Example:  outrider experts bench --ep 32 --experts 128 --slots 2 --links-out links.toml")
def bench(
    options: typer.Context,
    routing: Annotated[
        Path | None, typer.Argument(help="Routes to count and plan; default: made up here, seeded.")
    ] = None,
    ep: Ep = 32,
    slots: Slots = 2,
    tokens: Annotated[int, typer.Option(help="Tokens in a micro-batch.", min=1)] = 8192,
    regime: Annotated[
        str | None, typer.Option(help="Of made-up routes: mild, skewed or specialised sequences; default: skewed.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Of made-up routes; default: 128.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Of made-up routes; default: 8.", min=1)] = None,
    layers: Annotated[int | None, typer.Option(help="Of made-up routes; default: 8.", min=1)] = None,
    domain: Domain = None,
    format: Form = None,
    model: Model = "qwen3-30b-a3b",
    ranks_live: Annotated[
        int, typer.Option(help="Processes that send experts to each other over loopback; 0: none.", min=0, max=16)
    ] = 2,
    links_out: Annotated[
        Path | None, typer.Option(help="Write the measured links to this TOML file, for --links of plan and doctor.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure this machine, in a minute: counting, planning and its quality, copies, an expert's products, links."""
    from outrider.experts import benchmark

    made_up = load_of(options.params)
    if links_out:
        if not ranks_live:
            raise CallerError("--links-out: --ranks-live 0 leaves links out. Give 2 or more.")
        check_writable("--links-out", links_out)
    asked = benchmark.Asked(
        routing=routing,
        ranks=ep,
        slots=slots,
        tokens=tokens,
        model=model,
        ranks_live=ranks_live,
        format=format,
        domain=domain,
        **made_up,
    )
    with bars(json) as shown:
        bar = shown.add_task("load", total=1 + len(benchmark.SECTIONS))
        result = benchmark.run(asked, lambda name: shown.update(bar, description=name, advance=name != "load"))
    if json:
        sys.stdout.write(jsonlib.dumps(result) + "\n")
    else:
        Console().print(tables.measured(result), highlight=False, soft_wrap=False)
    if links_out:
        links_out.write_text(benchmark.links_toml(result))
        if not json:
            Console().print(f"Links: {links_out}", soft_wrap=True, highlight=False)


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
