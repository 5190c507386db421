"""What a person sees at the end of a simulation: the demo's rows, what filled the prompts, how busy the links were."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outrider.lab.demo.table import ROWS, count, mib, seconds

Figures = dict[str, Any]
ALL = (("calls", "calls", count), *ROWS, ("workflows completed", "workflows", count), ("time", "wall_s", seconds))


def show(out: Console, result: Figures) -> None:
    """Print the whole result; two columns of figures where a baseline was run too."""
    before = result.get("baseline")
    out.print(_figures(result, before))
    out.print(_sources(result))
    if result["links"]:
        out.print(_links(result))
    if "predicted" in result:
        out.print(_prediction(result))
    for line in result["plainly"]:
        out.print(f"- {line}", style="dim", markup=False, highlight=False)


def _figures(result: Figures, before: Figures | None) -> Table:
    order = f"{result['policy']}, {result['routing']}, tiers {result['tiers']}"
    table = Table(
        title=escape(f"Simulated: {result['trace']['source']} ({result['trace']['format']})"), title_justify="left"
    )
    table.add_column("")
    if before is not None:
        table.add_column("fcfs, sticky, tiers none", justify="right")
    table.add_column(order, justify="right")
    if before is not None:
        table.add_column("ratio", justify="right")
    for title, key, unit in ALL:
        now = result[key]
        cells = [unit(now) if now is not None else "-"]
        if before is not None:
            was = before[key]
            ratio = f"{now / was:.2f}" if was and now is not None else "-"
            cells = [unit(was) if was is not None else "-", *cells, ratio]
        table.add_row(title, *cells)
    busy = [engine["busy_share"] for engine in result["engines"].values()]
    cells = [_shares(busy)]
    if before is not None:
        cells = [_shares([engine["busy_share"] for engine in before["engines"].values()]), *cells, ""]
    table.add_row("engines busy", *cells)
    return table


def _shares(shares: list[float]) -> str:
    """Lowest to highest."""
    low, high = min(shares), max(shares)
    return f"{low:.0%}" if round(low, 2) == round(high, 2) else f"{low:.0%} to {high:.0%}"


def _sources(result: Figures) -> Table:
    table = Table(title="Where the prompt tokens came from", title_justify="left")
    table.add_column("")
    table.add_column("tokens", justify="right")
    table.add_column("share", justify="right")
    for source, tokens in result["prompt_tokens_from"].items():
        table.add_row(source, count(tokens), f"{tokens / max(1, result['prompt_tokens']):.1%}")
    return table


def _links(result: Figures) -> Table:
    table = Table(title="Links", title_justify="left")
    for column in ("", "moved", "speed", "busy"):
        table.add_column(column, justify="left" if not column else "right")
    for way, link in result["links"].items():
        table.add_row(way, mib(link["moved_bytes"]), f"{link['bytes_per_s'] / 1e9:g} GB/s", f"{link['busy_share']:.1%}")
    return table


def _prediction(result: Figures) -> Table:
    table = Table(title="Predicted against actual", title_justify="left")
    for column in ("", "predicted", "actual", "error"):
        table.add_column(column, justify="left" if not column else "right")
    for title, name, unit in [row for row in ALL if row[1] in result["predicted"]]:
        came, error = result["actual"][name], result["error"][name]
        told = unit(result["predicted"][name]) if error is not None else "-"
        table.add_row(title.strip(), told, unit(came), f"{error:+.1%}" if error is not None else "-")
    return table
