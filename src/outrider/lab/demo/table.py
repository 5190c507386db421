"""What a person sees at the end of the demo: the figures side by side, what they mean, and what the agents wrote."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Figures = dict[str, Any]

SHOWN_CHARS = 240  # of one answer


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


def mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("calls answered", "answered", count),
    ("TTFT p50", "ttft_p50_s", seconds),
    ("TTFT p95", "ttft_p95_s", seconds),
    ("TTFT p50, returning turns", "returning_ttft_p50_s", seconds),
    ("TTFT p95, returning turns", "returning_ttft_p95_s", seconds),
    ("workflow completion, mean", "workflow_completion_mean_s", seconds),
    ("prompt tokens", "prompt_tokens", count),
    ("prompt tokens computed", "prompt_tokens_computed", count),
    ("prompt tokens reused", "prompt_tokens_reused", count),
    ("  of them from memory", "prompt_tokens_from_memory", count),
    ("output tokens", "output_tokens", count),
    ("preemptions", "preemptions", count),
)


def show(out: Console, result: Figures, sample: Sequence[str]) -> None:
    """Print the whole result; `sample` names the agents' turns whose words are shown."""
    baseline, outrider, experts = result["baseline"], result["outrider"], result["experts"]
    out.print(_arms(baseline, outrider))
    out.print(_moved(outrider))
    out.print(_experts(experts))
    out.print(f"[bold]What the agents wrote[/] ({result['machine']['model']}):")
    for call in sample:
        out.print(f"  [cyan]{call}[/]  {escape(outrider['answers'].get(call, '').strip()[:SHOWN_CHARS])}")
    same = result["outrider"]["same_answers"]
    out.print(f"Both arms gave the same words in {same} of {outrider['calls']} calls.")
    for line in result["machine"]["plainly"]:
        out.print(f"[dim]- {line}[/]")


def _arms(baseline: Figures, outrider: Figures) -> Table:
    table = Table(title="One workload, two ways of serving it", title_justify="left")
    for column in ("", "baseline", "Outrider", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for title, key, unit in ROWS:
        before, after = baseline[key], outrider[key]
        table.add_row(title, unit(before), unit(after), f"{after / before:.2f}" if before else "-")
    table.add_section()
    before_kv, after_kv = baseline["kv"], outrider["kv"]
    table.add_row("KV tokens used", count(before_kv["used_tokens"]), count(after_kv["used_tokens"]), "")
    table.add_row("KV tokens reserved", count(before_kv["reserved_tokens"]), count(after_kv["reserved_tokens"]), "")
    table.add_row(
        "  by prompt + max_tokens",
        count(before_kv["reserved_by_max_tokens"]),
        count(after_kv["reserved_by_max_tokens"]),
        "",
    )
    return table


def _moved(outrider: Figures) -> Table:
    table = Table(title="Bytes that memory moved", title_justify="left")
    table.add_column("from -> to")
    table.add_column("bytes", justify="right")
    for hop, moved in outrider["bytes_moved"].items():
        table.add_row(hop, mib(moved))
    return table


def _experts(experts: Figures) -> Table:
    table = Table(title="One RL step of the tiny MoE on 2 ranks", title_justify="left")
    for column in ("", "unbalanced", "balanced"):
        table.add_column(column, justify="left" if not column else "right")
    static, balanced = experts["max_over_mean_static"], experts["max_over_mean_balanced"]
    table.add_row("expert load, max / mean rank", f"{static:.3f}", f"{balanced:.3f}")
    table.add_row("loss", f"{experts['loss_static']:.6f}", f"{experts['loss_balanced']:.6f}")
    table.add_row("loss difference", "", f"{experts['loss_difference']:.1e}")
    table.add_row("gradient difference, max |a-b| / max |b|", "", f"{experts['gradient_difference']:.1e}")
    return table
