"""Options that commands of `outrider experts` share, and what is checked before any work. Used by commands.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from outrider.errors import CallerError

Routing = Annotated[Path, typer.Argument(help="Routes: veRL, vLLM, SGLang, Megatron, npz; told by content.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert-parallel ranks.", min=1)]
Nodes = Annotated[int, typer.Option(help="Nodes that the ranks lie in; links between them are the slow ones.", min=1)]
Slots = Annotated[int, typer.Option(help="Spare expert slots of a rank and layer.", min=0)]
Tokens = Annotated[int | None, typer.Option("--microbatch-tokens", help="Tokens in a micro-batch.", min=1)]
Seqs = Annotated[int | None, typer.Option("--microbatch-seqs", help="Whole sequences in a micro-batch.", min=1)]
Domain = Annotated[str | None, typer.Option(help="Only this domain of the table.")]
Form = Annotated[str | None, typer.Option("--format", help="Of the routes, where content does not tell.")]
Experts = Annotated[int | None, typer.Option(help="Experts of a layer; default: the largest id plus one.", min=1)]
Links = Annotated[str, typer.Option(help="nvlink, pcie, ib, or a TOML file of rates: for modelled seconds.")]
Model = Annotated[str, typer.Option(help="Shape of an expert: a known model, or HIDDENxINNER.")]
Scale = Annotated[int, typer.Option(help="Real token-slots that a counted one stands for, in modelled time.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


def study_of(options: Mapping[str, Any]) -> Any:
    """The `Study` that the options of `plan` or `doctor` ask for: each that Study knows enters it under its name."""
    from outrider.experts.study import Study

    ranks, nodes = options["ep"], options["nodes"]
    if ranks % nodes:
        raise CallerError(
            f"--ep {ranks} --nodes {nodes}: ranks do not divide. Give a number of nodes that divides them."
        )
    named = {name: options[name] for name in Study.__struct_fields__ if name in options}
    return Study(
        ranks=ranks, ranks_per_node=ranks // nodes, excluded=tuple(sorted(set(options.get("exclude") or ()))), **named
    )


def pair_of(text: str) -> tuple[int, int]:
    """`3,0` of --explain."""
    layer, _, step = text.partition(",")
    if not (layer.isdecimal() and step.isdecimal()):
        raise CallerError(f"--explain {text}: give LAYER,MICROSTEP, as 3,0.")
    return int(layer), int(step)


def check_writable(option: str, path: Path) -> None:
    """What would fail at the end fails now; no file is left behind, and one that is there stays as it is."""
    there = path.exists()
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise CallerError(f"{option} {path}: {error.strerror}. Name a file that can be written.") from error


def load_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of bench's options that shape made-up routes and were given. CallerError where they, or those that shape a
    file's, do not go with what is measured."""
    given = {name: options[name] for name in ("regime", "experts", "top_k", "layers") if options[name] is not None}
    if given and options["routing"]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CallerError(f"{flags}: {options['routing']} has its own. Leave out either the file or these.")
    if not options["routing"] and (options["domain"] or options["format"]):
        raise CallerError("--domain, --format: made-up routes have none. Name a file of routes, or leave them out.")
    return given


def bars(quiet: bool) -> Progress:
    """Progress bars on stderr, gone when done; none where nobody looks."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
