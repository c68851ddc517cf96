"""Formats comparisons and programs as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

COMPARISON_COLUMNS = ("row", "ours", "against", "theirs", "ratio", "required", "met")
PROGRAM_COLUMNS = ("program", "median", "fastest", "slowest", "tok/s", "compile", "memory")


def terminal_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal."""
    from rlhf_jax.report import console  # imports JAX, which --help does not need

    table = console.NumbersTable(*columns, title=title, title_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    rule = ["---" if column in ("row", "against", "program") else "---:" for column in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows)) + "\n"


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns a table row for each comparison."""
    return [
        [
            each["title"],
            _amount(each["kind"], each["ours"]),
            each["against"],
            _amount(each["kind"], each["theirs"]),
            _ratio(each["kind"], each["ratio"]),
            _required(each["kind"], each["required"]),
            {True: "yes", False: "no", None: "–"}[each["met"]],
        ]
        for each in comparisons
    ]


def _required(kind: str, required: float | None) -> str:
    return "–" if required is None else ("≤ " if kind == "times" else "≥ ") + _ratio(kind, required)


def program_rows(programs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns a table row for each program."""
    return [
        [
            each["program"],
            *(_time(each[name]) for name in ("median_s", "min_s", "max_s")),
            f"{each['tokens_per_s']:.0f}" if each["tokens_per_s"] else "–",
            f"{each['compile_s']:.1f} s",
            f"{each['device_mb'] or each['peak_mb']} MB",
        ]
        for each in programs
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
