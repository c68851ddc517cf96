"""Tables and plots of the statistics on labelers, for the terminal and for an HTML page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich import markup

from rlhf_jax.data import errors
from rlhf_jax.diagnostics import intervals
from rlhf_jax.feedback.labelers import labeler_report
from rlhf_jax.feedback.labelers.labeler_agreement import Rate
from rlhf_jax.report import console, page, plots
from rlhf_jax.report import results as results_lib

UNNAMED = "(none)"
MAX_SECONDS = 120.0
"""Longer times are counted in the last bar of the histogram."""

Cell = tuple[str, str]
"""A number and its interval, formatted."""

ROUGH_MARK = results_lib.ROUGH_MARK
ROUGH_NOTE = f"{ROUGH_MARK} fewer than {results_lib.FEW_CLUSTERS} comparisons or ratings: the interval is rough."


class Table(NamedTuple):
    """Rows of formatted numbers."""

    title: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str


_LABELERS = {
    "agreement with the majority of others (%)": lambda row: row.others,
    "first shown is chosen (%)": lambda row: row.position.first_shown,
    "longer is chosen (%)": lambda row: row.length.longer,
}
_SCREENING = {
    "gold questions (%)": lambda row: row.screening.gold,
    "researchers (%)": lambda row: row.screening.researchers,
    "hidden duplicates (%)": lambda row: row.screening.consistency,
}
_AGREEMENT_NOTE = "Share of comparisons with the same choice; a tie is a choice of its own. Intervals are of 95 %."
_LABELERS_NOTE = (
    "The last column is what differs from chance or from the other labelers, at the 5 % level divided by the number of "
    "labelers, and whether an interval of the screening is below its cut-off."
)


def tables(report: labeler_report.Report) -> list[Table]:
    """Returns the tables of a report; those without rows are left out."""
    rates: dict[str, Rate] = {
        "two labelers": report.agreement,
        "a labeler and one of at least three others": report.modal.one,
        "a labeler and the majority of three others": report.modal.three,
    }
    if (group := report.researchers) is not None:
        rates |= {"two researchers": group.inside, "two others": group.outside}
        rates["a researcher and another"] = group.between
    if (group := report.held_out) is not None:
        rates |= {"two labelers of the training data": group.inside, "two held-out labelers": group.outside}
        rates["one of the training data and one held out"] = group.between
    agreement = _rate_rows(rates)
    if agreement:
        agreement.append(("Fleiss' kappa", [_cell(report.kappa, digits=3), ("", "")]))
    shown = [
        Table("Agreement", ["agreement of", "%", "comparisons"], agreement, _AGREEMENT_NOTE),
        Table(
            "Labelers",
            ["labeler", "judgements", *_LABELERS, "median time (s)", f"under {report.min_seconds:g} s", "check"],
            [
                (
                    row.name,
                    [
                        (str(row.judgements), ""),
                        *(_rate(rate(row)) for rate in _LABELERS.values()),
                        _cell(row.times.median),
                        (str(row.times.fast), ""),
                        (", ".join(row.flags), ""),
                    ],
                )
                for row in report.labelers
            ],
            _LABELERS_NOTE,
        ),
        Table(
            "Screening",
            ["labeler", *_SCREENING, "demonstrations (1 to 7)", "verdict"],
            [
                (
                    row.name,
                    [
                        *(_rate(rate(row)) for rate in _SCREENING.values()),
                        _rate(row.screening.demonstrations, digits=2),
                        (row.screening.verdict, ""),
                    ],
                )
                for row in report.labelers
                if any(each.count for each in row.screening[:4])
            ],
            f"The cut-offs are {100 * report.min_agreement:g} % on gold questions and with researchers, and a mean "
            f"rating of {report.min_score:g} for demonstrations.",
        ),
    ]
    for kind, groups in _disagreement(report).items():
        shown.append(Table(f"Disagreement by {kind}", [kind, "%", "comparisons"], _rate_rows(groups), ""))
    note = f"Scores are relative to {next(iter(report.elo), '')}."
    elo = [(name, [_cell(each if any(each) else 0.0, digits=0)]) for name, each in report.elo.items()]
    shown.append(Table("Policies", ["policy", "Elo"], elo, note))
    return [_with_rough_note(each) for each in shown if each.rows]


def _with_rough_note(table: Table) -> Table:
    marked = any(bounds.endswith(ROUGH_MARK) for _, cells in table.rows for _, bounds in cells)
    return table._replace(note=f"{table.note} {ROUGH_NOTE}".strip()) if marked else table


def _disagreement(report: labeler_report.Report) -> dict[str, dict[str, Rate]]:
    """Returns the rates by category and by domain, except where no prompt has one."""
    kinds = {"category": report.by_category, "domain": report.by_domain}
    return {
        kind: {str(name) or UNNAMED: each for name, each in rates.items()}
        for kind, rates in kinds.items()
        if any(rates)
    }


def _rate_rows(rates: Mapping[str, Rate]) -> list[tuple[str, list[Cell]]]:
    return [(name, [_rate(each), (str(each.count), "")]) for name, each in rates.items() if each.count]


def _rate(rate: Rate, **options: Any) -> Cell:
    """Formats a rate, with a mark if its interval is rough."""
    mean, bounds = _cell(rate.share, **(options or {"percent": True}))
    return mean, bounds + ROUGH_MARK * (bool(bounds) and rate.count < results_lib.FEW_CLUSTERS)


def _cell(value: Any, **options: Any) -> Cell:
    return results_lib.format_parts(results_lib.finite(value), **options)


def console_tables(report: labeler_report.Report) -> list[console.NumbersTable]:
    """Returns the tables for a terminal, with 95 % intervals in parentheses."""
    found = []
    for each in tables(report):
        table = console.NumbersTable(*each.head, title=each.title, title_style="bold", caption=each.note or None)
        for name, cells in each.rows:
            texts = [name, *(f"{text} ({bounds})" if bounds else text for text, bounds in cells)]
            table.add_row(*map(markup.escape, texts))
        found.append(table)
    return found


def headline(report: labeler_report.Report) -> str:
    """Returns the number of labelers, their agreement, and which of them to check, as sentences."""
    mean, bounds = _cell(report.agreement.share, percent=True)
    labelers = f"{len(report.labelers)} labeler{'s' * (len(report.labelers) != 1)}"
    text = f"{labelers} compared {report.pairs} pairs of answers to {report.prompts} prompts."
    if report.agreement.count:
        text += f" Two labelers agree on {mean} % of pairs{f' ({bounds})' if bounds else ''}."
    asked = [f"{row.name} ({', '.join(row.flags)})" for row in report.labelers if row.flags]
    text += f" Check {', '.join(asked)}." if asked else ""
    if 0 < report.prompts < results_lib.FEW_CLUSTERS:
        prompts = errors.counted(report.prompts, "independent prompts")
        text += f" The intervals are rough: they rest on only {prompts} (below {results_lib.FEW_CLUSTERS})."
    return text + (f" The policies have no Elo scores: {report.elo_error}." if report.elo_error else "")


def write_page(path: str | os.PathLike[str], report: labeler_report.Report, *, title: str) -> None:
    """Writes the report as one self-contained HTML page."""
    page.write_report(path, {"headlines": [headline(report)]}, [], title=title, sections=sections(report))


def sections(report: labeler_report.Report) -> list[page.Section]:
    """Returns the sections of the page: each table with its plots."""
    rows = report.labelers
    # The reference has the score 0, and no interval.
    elo = {
        name: each if any(each) else intervals.Estimate(0.0, -math.inf, math.inf) for name, each in report.elo.items()
    }
    figures = {
        "Labelers": [
            (
                _dots({row.name: row.others.share for row in rows}, "Agreement (%)", at=100 * report.min_agreement),
                "Agreement with the majority of the others",
                f"The dashed line is the cut-off of the screening, {100 * report.min_agreement:g} %.",
            ),
            (
                _dots({row.name: row.position.first_shown.share for row in rows}, "First shown is chosen (%)", at=50),
                "Position bias",
                "The order is random, so that a labeler without the bias chooses the first answer half of the time.",
            ),
            (
                _dots({row.name: row.length.longer.share for row in rows}, "Longer is chosen (%)", at=50),
                "Preference for the longer answer",
                "Longer answers are often better; a labeler who differs from the others may judge by length.",
            ),
            (_times(report), "Time per judgement", f"The dashed line is at {report.min_seconds:g} s."),
        ],
        "Policies": [(_dots(elo, "Elo", scale=1), "Elo scores", "Scores of the Bradley-Terry model.")],
    }
    for kind, rates in _disagreement(report).items():
        svg = _dots({name: each.share for name, each in rates.items()}, "Disagreement (%)")
        figures[f"Disagreement by {kind}"] = [(svg, "Disagreement", "Share of comparisons with different choices.")]
    return [
        page.Section(
            each.title,
            [page.Figure(svg, name, text) for svg, name, text in figures.get(each.title, ()) if svg is not None],
            table={
                "head": each.head,
                "rows": [{"name": name, "color": "other", "cells": cells} for name, cells in each.rows],
                "note": each.note,
            },
        )
        for each in tables(report)
    ]


def _dots(
    estimates: Mapping[str, intervals.Estimate], xlabel: str, *, scale: float = 100, at: float | None = None
) -> str | None:
    """Plots estimates with their intervals, and a dashed line ``at`` a value; None without estimates."""
    rows = [(name, value) for name, each in estimates.items() if (value := results_lib.finite(each)) is not None]
    if not rows:
        return None
    with plots.axes(height=0.75 + 0.27 * len(rows)) as (svg, (ax,)):
        if at is not None:
            ax.axvline(at, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        for row, (_, value) in enumerate(rows):
            plots.point(ax, value, row, "other", scale=scale, digits=0)
        if scale == 100:
            ax.set_xlim(-1.5, 101.5)
        plots.label_rows(ax, [name if len(name) <= 24 else name[:23] + "…" for name, _ in rows])
        ax.set_xlabel(xlabel)
    return svg[0]


def _times(report: labeler_report.Report) -> str | None:
    """Plots a histogram of the times of all judgements; None without times."""
    seconds = np.concatenate([row.seconds for row in report.labelers])
    if not len(seconds):
        return None
    most = min(float(seconds.max()), MAX_SECONDS)
    with plots.axes(height=2.3) as (svg, (ax,)):
        ax.hist(np.minimum(seconds, MAX_SECONDS), bins=30, range=(0.0, max(most, 1.0)), color=plots.color("other"))
        ax.axvline(report.min_seconds, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        ax.set(
            xlabel=f"Seconds{f' (at most {MAX_SECONDS:g})' if seconds.max() > MAX_SECONDS else ''}", ylabel="Judgements"
        )
        ax.grid(axis="y")
    return svg[0]
