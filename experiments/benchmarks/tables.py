"""The comparisons and the programs as tables, in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

COMPARED = ("row", "ours", "against", "theirs", "ratio", "required", "met")
MEASURED = ("program", "median", "fastest", "slowest", "tok/s", "compile", "memory")


def terminal(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table for rich."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("row", "against", "program") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    rule = ["---" if head in ("row", "against", "program") else "---:" for head in heads]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines)) + "\n"


def compared(comparisons: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each comparison."""
    return [
        [
            found["title"],
            _amount(found["kind"], found["ours"]),
            found["against"],
            _amount(found["kind"], found["theirs"]),
            _ratio(found["kind"], found["ratio"]),
            _asked(found["kind"], found["required"]),
            {True: "yes", False: "no", None: "–"}[found["met"]],
        ]
        for found in comparisons
    ]


def _asked(kind: str, required: float | None) -> str:
    return "–" if required is None else ("≤ " if kind == "times" else "≥ ") + _ratio(kind, required)


def measured(programs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each program."""
    return [
        [
            found["program"],
            _time(found["median_s"]),
            _time(found["min_s"]),
            _time(found["max_s"]),
            f"{found['tokens_per_s']:.0f}" if found["tokens_per_s"] else "–",
            f"{found['compile_s']:.1f} s",
            f"{found['device_mb'] or found['peak_mb']} MB",
        ]
        for found in programs
    ]


def _amount(kind: str, amount: float | str) -> str:
    if isinstance(amount, str):
        return "failed" if amount.startswith("failed") else amount
    return {"speed": f"{amount:.0f} tok/s", "share": f"{amount / 1e9:.0f} GFLOP/s"}.get(kind) or _time(amount)


def _ratio(kind: str, ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{100 * ratio:.0f} %" if kind == "share" else f"{ratio:.2f}x"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
