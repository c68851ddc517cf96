"""Figures and tables of reward and gold utility against KL over many runs, with confidence intervals."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import setting_checks
from rich.table import Table

from rlhf_jax.report import console, plots

_SWEEP_FIGURES = (
    ("gold", "Gold utility"),
    ("reward", "Score of the reward model"),
    ("pretraining_loss", "Loss on pretraining text, nats"),
)
_SWEEP_NOTE = (
    "Dots are runs; crosses are means over seeds with their 95 % intervals. All runs answer the same held-out prompts; "
    "the intervals do not cover the choice of these prompts, nor of the SFT and reward models."
)
Rows = Sequence[Mapping[str, Any]]


def _figure(points: Rows, runs: Rows, key: str, label: str, swept: Sequence[str]) -> str:
    """Returns an SVG of a metric against √KL; dots are runs, and crosses are means with intervals.

    A line connects the means that differ only in the first of the settings ``swept``.
    """
    first, *others = swept

    def line_of(row: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(row[name] for name in others)

    lines = list(dict.fromkeys(map(line_of, points)))
    with plots.axes(height=2.6 + 0.2 * bool(others)) as (svg, (ax,)):
        for place, line in enumerate(lines):
            color = plots.color(LINE_COLORS[place % len(LINE_COLORS)])
            own = [row for row in runs if line_of(row) == line]
            ax.plot([_root(r["kl"]) for r in own], [r[key] for r in own], ".", color=color, alpha=0.35)
            ordered = sorted((p for p in points if line_of(p) == line), key=lambda p: p["kl"][0])
            x, y = [_root(p["kl"][0]) for p in ordered], [p[key][0] for p in ordered]
            name = ", ".join(f"{words(name)} {value:g}" for name, value in zip(others, line))
            ax.plot(x, y, color=color, linewidth=0.8, label=name or None)
            for point in ordered:
                _cross(ax, [_root(v) for v in point["kl"]], point[key], color)
                at = _root(point["kl"][0]), point[key][0]
                ax.annotate(f"{point[first]:g}", at, xytext=(4, -9), textcoords="offset points", fontsize=7)
        ax.set_xlabel(f"√KL to the reference, nats per sequence (labels: {words(first)})")
        ax.set_ylabel(label)
        ax.grid()
        if others:
            ax.legend()
    return svg[0]


def _cross(ax: Any, x: Sequence[float], y: Sequence[float | None], color: str) -> None:
    if y[1] is not None and y[2] is not None:
        ax.plot([x[0], x[0]], y[1:], color=color)
        ax.plot(x[1:], [y[0], y[0]], color=color)


def words(name: str) -> str:
    """Returns the name of a setting as words, such as ``KL coef`` for ``kl_coef``."""
    return name.strip("_").replace("_", " ").replace("kl ", "KL ")


def write_sweep(path: pathlib.Path, points: Rows, runs: Rows, *, swept: Sequence[str], title: str) -> None:
    """Writes a self-contained HTML page with one figure per metric of a sweep over the settings ``swept``."""
    figures = [_figure(points, runs, key, label, swept) for key, label in _SWEEP_FIGURES if key in runs[0]]
    write_page(path, title, figures, _SWEEP_NOTE)


_STYLES = (("ppo", "ppo", "^"), ("ppo-ptx", "ppo_ptx", "v"), ("rloo", "sft", "s"), ("grpo", "other", "D"))
_STYLES += (("expert-iteration", "reward_model", "o"), ("best-of-n", "best_of_n", "P"))


def write_methods(path: pathlib.Path, methods: Rows, *, title: str, note: str) -> None:
    """Writes an HTML page with a plot of each method's gold utility, with intervals, against √KL, and a note."""
    styles = {method: (color, marker) for method, color, marker in _STYLES}
    with plots.axes(height=3.4) as (svg, (ax,)):
        for place, each in enumerate(methods):
            color, marker = styles[each["method"]]
            for run in each["runs"]:
                x = [_root(kl) for kl in run["kl"]]
                ax.plot(x, run["gold"], ".", color=plots.color(color), alpha=0.12, markersize=3)
            points = [(at, *point) for at, point in zip(each["at"], each["gold"]) if point[0] is not None]
            # Methods are shifted slightly so that their intervals do not overlap.
            x = [_root(at) + 0.012 * (place - len(methods) / 2) for at, *_ in points]
            ax.plot(
                x,
                [mean for _, mean, _, _ in points],
                marker=marker,
                markersize=4,
                color=plots.color(color),
                label=each["method"],
            )
            for xi, (_, _, low, high) in zip(x, points):
                if low is not None and high is not None:
                    ax.plot([xi, xi], [low, high], color=plots.color(color))
        ax.set_xlabel("√KL to the SFT model, nats per sequence")
        ax.set_ylabel("Gold utility")
        ax.grid()
        ax.legend()
    tables = html_table(_gold_rows(methods, methods[0]["at"])) + html_table(_cost_rows(methods))
    write_page(
        path, title, svg, f"Dots are evaluations of single runs; lines are means over seeds. {note}", tables=tables
    )


LINE_COLORS = ("ppo", "sft", "ppo_ptx", "best_of_n", "reward_model", "base", "other")
"""Colours of lines without a colour of their own, as names for `plots.color`."""
_MARKERS = "^os^oDv"


def frontier(lines: Rows, *, xlabel: str, ylabel: str) -> str:
    """Returns an SVG of gold utility against √KL; each line connects the points of one method.

    Lines whose ``paler`` is True, which show shifted pairs, are dashed and have hollow markers.
    """
    with plots.axes(height=3.6) as (svg, (ax,)):
        for place, line in enumerate(lines):
            color = plots.color(LINE_COLORS[line["look"] % len(LINE_COLORS)])
            points = sorted(line["points"], key=lambda p: p["kl"][0])
            x, y = ([_root(p["kl"][0]) for p in points], [p["gold"][0] for p in points])
            style, face = ("--", "none") if line["paler"] else ("-", color)
            marker = _MARKERS[place % len(_MARKERS)]
            ax.plot(x, y, style, marker=marker, color=color, mfc=face, markersize=4, label=line["method"])
            for at, point in zip(x, points):
                low, high = point["gold"][1:]
                if low is not None and high is not None:
                    ax.plot([at, at], [low, high], color=color, linewidth=0.8)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid()
        ax.legend()
    return svg[0]


def methods_table(methods: Rows, at: Sequence[float]) -> Table:
    """Returns a table of the gold utility at each KL, with intervals over seeds and one row per method."""
    header, *rows = _gold_rows(methods, at)
    return text_table("gold utility at a KL of", header, rows)


def costs_table(methods: Rows) -> Table:
    """Returns a table of what each method uses: in training and, in the last column, to give an answer afterwards."""
    header, *rows = _cost_rows(methods)
    return text_table("what each method uses in training, and samples per answer afterwards", header, rows)


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal, with all columns but the first aligned on the right."""
    grid = console.NumbersTable(*header, title=title)
    for row in rows:
        grid.add_row(*row)
    return grid


def _gold_rows(methods: Rows, at: Sequence[float]) -> list[list[str]]:
    cells = [["–" if point[0] is None else interval_text(point) for point in each["gold"]] for each in methods]
    return [["", *(f"{kl:g} nats" for kl in at)], *([each["method"], *row] for each, row in zip(methods, cells))]


def _cost_rows(methods: Rows) -> list[list[str]]:
    names = ("answers", "prompts", "steps", "text_rows", "samples_per_answer")
    header = ["", *(name.replace("_", " ") for name in names)]
    return [header, *([each["method"], *(str(each[name]) for name in names)] for each in methods)]


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table of plain text."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def write_page(path: pathlib.Path, title: str, figures: Sequence[str], note: str, *, tables: str = "") -> None:
    """Writes a self-contained HTML page of SVG figures, a note and optional HTML tables."""
    colors = "color:var(--ink);background:var(--paper)"
    style = f"body{{font:15px sans-serif;max-width:76em;margin:2em auto;padding:0 1em;{colors}}}"
    style += "figure,p{max-width:46em}table{display:block;overflow-x:auto}"
    style += "td{padding:.2em .6em;text-align:right;white-space:nowrap}tr:first-child td{white-space:normal}"
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in plots.COLORS.items()) for i in (0, 1))
    head = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{style}</style>"
    body = f"<h1>{html.escape(title)}</h1>" + "".join(f"<figure>{svg}</figure>" for svg in figures)
    body += f"<p>{html.escape(note)}</p>{tables}"
    path.write_text(f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>{head}{body}\n")


def table(points: Sequence[Mapping[str, Any]], *, swept: Sequence[str]) -> Table:
    """Returns a table of means with their intervals over seeds, one row per combination of the settings ``swept``."""
    names = [name for name in points[0] if name not in swept]
    grid = console.NumbersTable(
        " / ".join(setting_checks.flag_name(f"ppo.{name}") for name in swept), *map(words, names)
    )
    for point in points:
        grid.add_row(" / ".join(f"{point[name]:g}" for name in swept), *(interval_text(point[name]) for name in names))
    return grid


def interval_text(estimate: Sequence[float | None]) -> str:
    """Formats a mean and half the width of its interval."""
    mean, low, high = estimate
    # Student's t intervals are symmetric.
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ±{(high - low) / 2:.3f}"


def _root(kl: float | None) -> float:
    return max(kl or 0.0, 0.0) ** 0.5
