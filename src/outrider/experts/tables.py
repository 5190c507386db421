"""Results of `outrider experts` as tables for a terminal. Used by commands.py."""

from typing import Any

from rich.console import Group
from rich.table import Table


def planned(result: dict[str, Any]) -> Group:
    """What `study.run` found."""
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
    tiers = ", ".join(f"{name} {count}" for name, count in result["tiers"].items() if count)
    return Group(
        table,
        listed(
            ("copies moved, a layer and micro-step", f"{result['copies_per_layer_microstep']:.2f}"),
            ("planning, us a layer and micro-step", f"{result['plan_us_per_layer']:.0f}"),
            ("modelled seconds (even gate)", f"{result['modelled_s']:.3f} ({result['force_balanced_s']:.3f})"),
            ("modelled seconds exposed by copies", f"{result['exposed_s']:.4f}"),
            ("tiers", tiers),
        ),
    )


def listed(*rows: tuple[str, str]) -> Table:
    """Words and what they are, in two columns."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table
