"""Results of `outrider experts` as tables for a terminal. Used by commands.py."""

from pathlib import Path
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
            (
                "planning, us a layer and micro-step",
                f"{result['plan_us_per_layer']:.0f} (all that was tried: {result['search_us_per_layer']:.0f})",
            ),
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


def measured(result: dict[str, Any]) -> Group:
    """What `benchmark.run` found."""
    here, load, expert = result["machine"], result["load"], result["copies"]
    routes = f"synthetic routes, {load['regime']}" if load["synthetic"] else f"routes of {Path(load['file']).name}"
    busy = here["load_average"] > here["cores"] / 2
    return Group(
        f"Measured on {here['name']}: {here['processor']}, {here['cores']} cores; one thread each.",
        f"Load: {routes}; {load['layers']} layers, {load['micro_steps']} micro-steps of"
        f" {load['microbatch_tokens']:,} tokens, top {load['top_k']} of {load['experts']}; EP {load['ranks']},"
        f" {load['slots']} spare slots. Expert: {expert['model']}, {expert['expert_bytes'] / 1e6:.3g} MB.",
        *([f"Others were busy here (load average {here['load_average']:.1f}): times are too long."] if busy else ()),
        _planners(result["planning"]),
        listed(*_rates(result)),
    )


def _planners(planning: dict[str, Any]) -> Table:
    table = Table(caption="us, copies: a layer and micro-step. limit: ceil(mean).", caption_justify="left")
    for column in ("planner", "us", "step, ms", "max/mean", "max/limit", "p95", "copies"):
        table.add_column(column, justify="left" if column == "planner" else "right")
    for name, found in planning["planners"].items():
        if not found["measured"]:
            table.add_row(name, "none")
            continue
        table.add_row(
            name,
            f"{found['us_per_layer']:.0f}",
            f"{1e3 * found['step_s']:.0f}",
            f"{found['imbalance']['mean']:.4f}",
            f"{found['over_bound']['mean']:.4f}",
            f"{found['over_bound']['p95']:.4f}",
            f"{found['copies_per_layer_microstep']:.1f}",
        )
    return table


def _rates(result: dict[str, Any]) -> list[tuple[str, str]]:
    counting, copies, compute, links = (result[name] for name in ("counting", "copies", "compute", "links"))
    placement_us, device = result["planning"]["eplb_placement_us_per_layer"], copies["host_to_device"]
    why_not = [f"{name}: {p['why']}" for name, p in result["planning"]["planners"].items() if not p["measured"]]
    return [
        *[("no plan by", words) for words in why_not],
        (
            "counting, a layer and micro-step",
            f"{counting['us_per_layer']:.1f} us, {counting['ns_per_token_slot']:.2f} ns a token-slot",
        ),
        ("EPLB's placement alone, a layer", f"{placement_us:.1f} us" if placement_us else "none for these numbers"),
        ("memcpy", _gb_s(copies["memcpy_bytes_s"])),
        ("expert, host to slot", _gb_s(copies["host_to_slot_bytes_s"])),
        (
            "expert, pinned host to device",
            _gb_s(device["pinned_bytes_s"]) if device else "not measured: no CUDA device here",
        ),
        (
            f"expert's products, {compute['rows']} rows",
            f"{compute['bfloat16_flop_s'] / 1e9:.0f} Gflop/s bfloat16, {compute['float32_flop_s'] / 1e9:.0f} float32",
        ),
        (
            "links: gloo over loopback",
            f"{_gb_s(links['near_bytes_s'])} a rank of {links['ranks']}, latency {1e6 * links['latency_s']:.0f} us"
            if links["measured"]
            else f"not measured: {links['why']}",
        ),
    ]


def _gb_s(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.3g} GB/s"
