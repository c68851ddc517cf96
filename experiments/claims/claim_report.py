"""Writes the report of the claims: a table with verdicts and intervals, and the plot of each claim."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

COLORS = {"shown": "#1a7f37", "not shown": "#9a6700", "refuted": "#cf222e"}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .3rem .6rem }
tr { border-bottom: 1px solid #d0d7de } svg { max-width: 100%; height: auto }"""


def interval_text(part: dict[str, Any]) -> str:
    """Returns the value of a statistic with its interval, such as ``0.12 (0.03 to 0.21)``."""
    lo, hi = part["ci"]
    return f"{part['value']:.3g}" + ("" if lo is None else f" ({lo:.3g} to {hi:.3g})")


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns the table for the terminal, one row per statistic."""
    shown = Table(box=box.SIMPLE_HEAD)
    for name in ("id", "verdict", "statistic", "value (95 % interval)"):
        shown.add_column(name, no_wrap=name in ("id", "value (95 % interval)"))
    for each in results:
        for number, part in enumerate(each["parts"]):
            first = [each["id"], each["verdict"]] if number == 0 else ["", ""]
            shown.add_row(*first, part["statistic"], interval_text(part))
    return shown


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Returns the table in Markdown, one row per statistic, with the dates and commits of the results."""
    lines = ["| claim | verdict | statistic | value (95 % interval) | the paper |", "|---|---|---|---|---|"]
    for each in results:
        for number, part in enumerate(each["parts"]):
            claim, verdict, published = f"{each['id']}: {each['claim']}", each["verdict"], each["published"]
            first = (claim, verdict, published) if number == 0 else ("", "", "")
            mark = "" if part["verdict"] == each["verdict"] else f" ({part['verdict']})"
            lines.append(
                f"| {first[0]} | {first[1]} | {part['statistic']}{mark} | {interval_text(part)} | {first[2]} |"
            )
    return "\n".join([*lines, "", f"{origin(results)}\n"])


def compact(results: Sequence[dict[str, Any]]) -> str:
    """Returns a table in Markdown with one row per verdict."""
    lines = ["| verdict | claims |", "|---|---|"]
    for verdict in COLORS:
        if ids := [each["id"] for each in results if each["verdict"] == verdict]:
            lines.append(f"| {verdict} | {len(ids)}: {', '.join(ids)} |")
    return "\n".join([*lines, "", f"{origin(results)}\n"])


def origin(results: Sequence[dict[str, Any]]) -> str:
    """Returns the seeds, dates and commits of results, in a sentence."""
    seeds, dates, commits = (
        ", ".join(sorted({str(of(each)) for each in results}))
        for of in (
            lambda each: f"{each['seeds'][0]} to {each['seeds'][-1]}",
            lambda each: each["date"],
            lambda each: each["commit"],
        )
    )
    return f"Seeds {seeds}; {dates}; commit {commits}."


def write(folder: pathlib.Path, results: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes report.html, table.md and compact.md; returns the path of the report."""
    (folder / "table.md").write_text(markdown(results))
    (folder / "compact.md").write_text(compact(results))
    path = folder / "report.html"
    path.write_text(_page(folder, results))
    return path


def _page(folder: pathlib.Path, results: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td><a href="#{each["id"]}">{each["id"]}</a></td><td>{html.escape(each["claim"])}</td>'
        f"<td>{_colored(each['verdict'])}</td><td>{html.escape(interval_text(each))}</td>"
        f"<td>{html.escape(each['published'])}</td></tr>"
        for each in results
    )
    n, shown = len(results), sum(each["verdict"] == "shown" for each in results)
    quick = any(each["settings"]["quick"] for each in results)
    note = "Some of these results were made with --quick; their verdicts mean nothing. " if quick else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Published claims</title>
<style>{STYLE}</style>
<h1>Published claims at a small scale</h1>
<p>{note}{shown} of {n} claims are shown. A claim is shown if the 95 % interval of each of its statistics, over the
seeds, is in the range that the claim states. Of {n} claims that were all false, about {0.025 * n:.1f} would be shown by
chance if each had one statistic.</p>
<table><tr><th>id<th>claim<th>verdict<th>effect (95 % interval)<th>the paper's numbers</tr>{rows}</table>
{"".join(_section(folder, each) for each in results)}</html>
"""


def _colored(verdict: str) -> str:
    return f'<span style="color: {COLORS[verdict]}">{verdict}</span>'


def _section(folder: pathlib.Path, each: dict[str, Any]) -> str:
    svg = folder / f"{each['id']}.svg"
    parts = "".join(
        f"<tr><td>{html.escape(part['statistic'])}</td><td>{html.escape(interval_text(part))}</td>"
        f"<td>{_colored(part['verdict'])}</td></tr>"
        for part in each["parts"]
    )
    seeds, took = ", ".join(map(str, each["seeds"])), ""
    if each["seconds"] is not None:
        own, shared = each["seconds"] / 60, each["shared_seconds"] / 60
        took = f" {own:.1f} minutes of one core, and {shared:.1f} for shared stages;"
    return f"""<h2 id="{each["id"]}">{each["id"]}: {html.escape(each["claim"])}</h2>
<p>{html.escape(each["paper"])}. The paper: {html.escape(each["published"])}.</p>
{svg.read_text() if svg.exists() else ""}
<table><tr><th>statistic<th>value (95 % interval)<th>verdict</tr>{parts}</table>
<p>{html.escape(each["differs"])}</p>
<p><small>Seeds {seeds}; {each["n_prompts"]} held-out prompts per seed;{took} {each["date"]}, commit
{each["commit"]}.</small></p>
"""
