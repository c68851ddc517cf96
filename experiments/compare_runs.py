"""Compares finished or running runs of the other commands: their settings, results and training curves.

    python experiments/compare_runs.py runs/a runs/b runs/c
    python experiments/compare_runs.py runs/a runs/b --metrics reward kl --stages ppo --labels "KL 0.02" "KL 0.2"

RUN is the output folder of a command. Runs whose settings differ only in --seed are one group: its curves and numbers
are means over its runs with 95 % intervals. The command prints the settings in which the groups differ and the numbers
that all of them have in results.json. It writes both to compare.html, with a figure for each metric and stage.
Of different commands, only the settings, results and metrics that they share are compared.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from launch import command_line
from launch.settings import SettingError
from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True)
class CompareRunsSettings:
    """Settings of compare_runs.py."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders to compare."""
    out: str | None = None
    """Output folder. None uses runs/compare-runs-TIME."""
    metrics: tuple[str, ...] = ()
    """Metrics in metrics.jsonl to plot. Empty plots those that the reports of the runs show."""
    stages: tuple[str, ...] = ()
    """Stages to plot, such as ppo. Empty plots all."""
    labels: tuple[str, ...] = ()
    """One label per group, in the order of the groups' first runs. Empty uses the settings that differ."""


def parse(arguments: list[str]) -> CompareRunsSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(CompareRunsSettings, arguments, prog="compare_runs.py", doc=__doc__)
    if not settings.runs:
        raise SettingError("no run folder is given; name at least one, as in compare_runs.py runs/a runs/b")
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)

import html
from collections.abc import Sequence

from launch import entry_point, run_folder
from recipe import run_setup
from rich.console import Console
from rich.markup import escape
from sweeps import frontier_plot, run_comparison

from rlhf_jax.report import results as results_lib

_INTERVALS = (
    "Intervals are 95 % intervals. Those of a single run are its own and cover the held-out data only; those of "
    "several runs are Student's t intervals over the runs. Curves of several runs have only the steps that all runs "
    "with the metric have; bands that exceed the range of the curves are cut off."
)


def run(settings: CompareRunsSettings) -> list[run_comparison.Group]:
    """Prints the tables, writes compare.html and returns the groups."""
    out = Console()
    path = run_folder.free_folder(settings.out, kind="compare-runs")
    runs = run_comparison.share_stages([run_comparison.read(each) for each in settings.runs])
    groups = run_comparison.group(runs, settings.labels)
    keys = run_comparison.choose(runs, names=settings.metrics, stages=settings.stages)
    tables = {
        "Settings that differ": run_comparison.settings_table(groups),
        "Results": run_comparison.results_table(groups),
    }
    tables = {title: rows for title, rows in tables.items() if len(rows) > 1}
    figures = [svg for key in keys if (svg := run_comparison.figure(groups, key))]
    notes = _notes(groups, tables=tables, figures=len(figures))
    run_folder.create_folder(path, dataclasses.asdict(settings) | {"command": "compare_runs"})
    page = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    for title, rows in tables.items():
        page += f"<h2>{title}</h2><div style='overflow-x:auto'>{frontier_plot.html_table(rows)}</div>"
        header, *lines = [[escape(cell) for cell in row] for row in rows]
        out.print(frontier_plot.text_table(title.lower(), header, lines))
        out.print()
    frontier_plot.write_page(path / "compare.html", "Comparison of runs", figures, _INTERVALS, tables=page)
    for line in (*notes, f"figures: {path / 'compare.html'}"):
        run_setup.print_line(out, line)
    return groups


def _notes(
    groups: Sequence[run_comparison.Group], *, tables: dict[str, run_comparison.Table], figures: int
) -> list[str]:
    """Returns the runs of each group and what is not compared."""
    notes = [f"{each.label}: {', '.join(f'{run.path} (seed {run.seed})' for run in each.runs)}" for each in groups]
    for each in (run for group in groups for run in group.runs if run.results is None):
        notes.append(f"{each.path} has no results.json, so it is not finished: its curves are shown, but no results")
    for each in (run for group in groups for run in group.runs if run.results is not None):
        found = each.results or {}
        clusters = {name.removeprefix("clusters."): n for name, n in found.items() if name.startswith("clusters.")}
        clusters |= {
            "evaluation": found.get("held_out.asked"),
            "reward model": found.get("reward_model.held_out_asked"),
        }
        notes += [f"{each.path}: {text}" for text in results_lib.rough_intervals({"clusters": clusters})]
    settings = [set(group.runs[0].settings) for group in groups]
    if partial := len(set.union(*settings) - set.intersection(*settings)):
        notes.append(f"settings that only some of the groups have are left out ({partial})")
    if len(groups) > 1 and "Settings that differ" not in tables:
        notes.append("no setting that all groups have differs")
    if "Results" not in tables:
        notes.append("there are no results that all groups have")
    if not figures:
        notes.append("there are no figures, because the runs have no metrics in common")
    return notes


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
