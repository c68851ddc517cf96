"""Groups of finished or running runs that differ only in their seed: their settings, results and curves."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from launch import config_file, run_folder, setting_checks
from launch.settings import SettingError

from rlhf_jax import diagnostics, metrics
from rlhf_jax.data import errors
from rlhf_jax.report import metric_display, plots
from rlhf_jax.report import results as results_lib
from sweeps import frontier_plot

_NOT_COMPARED = ("seed", "out", "resume", "hosts", "version", run_folder.INPUTS)
_DIGEST = " (digest)"

Key = tuple[str, str]
"""A stage and a metric."""
Table = list[list[str]]
"""Rows of text, of which the first is the header."""


class Run(NamedTuple):
    """A run folder; ``settings`` have dotted names, and ``curves[stage, metric]`` maps steps to values."""

    path: str
    seed: int | None
    settings: dict[str, Any]
    results: dict[str, Any] | None
    """Numbers in results.json with dotted names, or None if the run is not finished."""
    curves: dict[Key, dict[int, float]]


class Group(NamedTuple):
    """Runs that differ only in their seed."""

    label: str
    runs: list[Run]


def read(path: str) -> Run:
    """Reads a run folder; raises SettingError if it is not one or a file is damaged."""
    config = config_file.read(path, flag="RUN")
    try:
        records, results = metrics.read(path), run_folder.finished_results(path)
    except ValueError as error:
        raise SettingError(f"RUN {path}: a file is damaged ({error}); restore it or leave the run out") from error
    digests = {f"{name}{_DIGEST}": str(digest)[:8] for name, digest in (config.get(run_folder.INPUTS) or {}).items()}
    curves: dict[Key, dict[int, float]] = {}
    for record in records:
        for name in record.keys() - {"stage", "step"}:
            if isinstance(record[name], int | float) and results_lib.finite(record[name]):
                curves.setdefault((record["stage"], name), {})[record["step"]] = record[name]
    settings = flatten({name: value for name, value in config.items() if name not in _NOT_COMPARED}) | digests
    return Run(path, config.get("seed"), settings, None if results is None else flatten(results), curves)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts with dotted names.

    Example:
        >>> from sweeps import run_comparison
        >>> run_comparison.flatten({"seed": 1, "ppo": {"kl_coef": 0.2}})
        {'seed': 1, 'ppo.kl_coef': 0.2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def share_stages(runs: Sequence[Run]) -> list[Run]:
    """Gives the stages ``ppo`` and ``ppo_ptx``, ``dpo`` and ``ipo``, and the like one name, so that they are compared.

    Stages of which a run has several keep their names.
    """
    first: dict[str, str] = {}
    shared = {stage: first.setdefault(title, stage) for stage, title in metric_display.STAGES.items()}
    for run in runs:
        own = [shared.get(stage) for stage in dict.fromkeys(stage for stage, _ in run.curves)]
        shared = {stage: name for stage, name in shared.items() if own.count(name) < 2}
    return [
        run._replace(curves={(shared.get(stage, stage), name): c for (stage, name), c in run.curves.items()})
        for run in runs
    ]


def group(runs: Sequence[Run], labels: Sequence[str] = ()) -> list[Group]:
    """Groups runs whose settings are the same except for the seed, in order of appearance.

    Args:
        runs: Runs.
        labels: One label per group; by default, a label consists of the settings that differ or, if more than two
            differ, of the folder of the group's first run.

    Returns:
        The groups.

    Raises:
        SettingError: Two runs have the same settings and seed, or the number of labels is wrong.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        others = found.setdefault(json.dumps(run.settings, sort_keys=True), [])
        for other in others:
            if other.seed == run.seed:
                raise SettingError(
                    f"RUN {other.path} and {run.path} have the same settings and the same seed, so they are not "
                    "independent; leave one out"
                )
        others.append(run)
    groups = [Group(each[0].path, each) for each in found.values()]
    if labels and len(labels) != len(groups):
        first = ", ".join(each.runs[0].path for each in groups)
        raise SettingError(
            f"--labels names {len(labels)} instead of {errors.counted(len(groups), 'groups')} of runs that differ only "
            f"in the seed; give one label per group, in the order of their first runs: {first}"
        )
    differ = differences(groups)
    if not labels and 1 <= len(differ) <= 2:
        rows = [(_shown(name), values) for name, values in differ.items()]
        labels = [", ".join(f"{name} {values[i]}" for name, values in rows) for i in range(len(groups))]
    elif not labels:
        names = [pathlib.Path(each.label).name for each in groups]
        labels = [name if names.count(name) == 1 else each.label for name, each in zip(names, groups)]
    return [Group(label, each.runs) for label, each in zip(labels, groups)]


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Returns the settings that all groups have and that differ, with one value per group.

    Digests of input files are included where the file's name is the same but its content is not.
    """
    settings = [each.runs[0].settings for each in groups]
    common = [name for name in settings[0] if all(name in each for each in settings)]
    table = {name: [each[name] for each in settings] for name in common}
    differ = {name: values for name, values in table.items() if any(value != values[0] for value in values)}
    new_files = {name for name in differ if name.endswith(_DIGEST) and name.removesuffix(_DIGEST) in differ}
    return {name: values for name, values in differ.items() if name not in new_files}


def settings_table(groups: Sequence[Group]) -> Table:
    """Returns the differences between the groups' settings, one column per group."""
    rows = [[_shown(name), *map(str, values)] for name, values in differences(groups).items()]
    return [["", *(each.label for each in groups)], *rows]


def _shown(name: str) -> str:
    """Returns the flag of a setting; the command has none."""
    file = name.removesuffix(_DIGEST)
    return name if name == "command" else setting_checks.flag_name(file) + name.removeprefix(file)


def results(group: Group) -> dict[str, results_lib.Interval]:
    """Returns the results that all finished runs of a group have.

    Those of a single run have the run's own intervals; those of several have Student's t interval over the runs.
    """
    runs = [each.results for each in group.runs if each.results is not None]
    found = {}
    for name in runs[0] if runs else ():
        values = [value for each in runs if (value := _estimate(each.get(name)))]
        if len(values) == len(runs) and name != "seed":
            over_runs = diagnostics.mean_interval([value.mean for value in values])
            found[name] = values[0] if len(runs) == 1 else results_lib.Interval(*over_runs)
    return found


def _estimate(value: Any) -> results_lib.Interval | None:
    """Returns a number or ``[mean, low, high]`` as an interval; None for other lists of three numbers."""
    found = results_lib.finite(value)
    if found is None:
        return None
    low, high = (found.mean if end is None else end for end in found[1:])
    tolerance = 1e-9 * abs(found.mean)
    return found if low - tolerance <= found.mean <= high + tolerance else None


def results_table(groups: Sequence[Group]) -> Table:
    """Returns the results that all groups with finished runs have, one column per group; [] if there are none."""
    finished = [(each, results(each)) for each in groups if any(run.results is not None for run in each.runs)]
    names = [name for name in finished[0][1] if all(name in found for _, found in finished)] if finished else []
    counts = [str(sum(run.results is not None for run in each.runs)) for each, _ in finished]
    rows = [[name, *(_text(found[name]) for _, found in finished)] for name in names]
    return [["", *(each.label for each, _ in finished)], ["finished runs", *counts], *rows] if rows else []


def _text(value: results_lib.Interval) -> str:
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"

    mean, low, high = (number(x, digits) for x, digits in zip(value, (4, 3, 3)))
    return f"{mean} ({low} to {high})" if low and high and value.low != value.high else mean


def choose(runs: Sequence[Run], *, names: Sequence[str] = (), stages: Sequence[str] = ()) -> list[Key]:
    """Returns the stages and metrics to plot, in the order of the report.

    Only metrics that every command among the runs logs are plotted. A run that has not reached a stage is ignored.

    Args:
        runs: Runs.
        names: Metrics; by default, those that the report plots.
        stages: Stages; by default, all.

    Returns:
        Pairs of a stage and a metric.

    Raises:
        SettingError: A metric or a stage does not exist, or none of the metrics exists in the stages.
    """
    commands: dict[str, set[Key]] = {}
    for run in runs:
        commands.setdefault(run.settings["command"], set()).update(run.curves)
    common = set.intersection(*commands.values())
    known_stages, known = (sorted({key[i] for key in common}) for i in range(2))
    for flag, given, existing in (("--stages", stages, known_stages), ("--metrics", names, known)):
        if unknown := [name for name in given if name not in existing]:
            have = f"choose from {', '.join(existing)}" if existing else "the runs have no metrics in common"
            raise SettingError(f"{flag} {unknown[0]} is not logged by all commands of these runs; {have}")
    stage_order, name_order = [*metric_display.STAGES, *known_stages], [*(names or metric_display.METRICS)]
    pairs = [
        (stage, name)
        for stage in dict.fromkeys(stage_order)
        for name in dict.fromkeys(name_order)
        if (stage, name) in common and (not stages or stage in stages)
    ]
    if names and not pairs:
        raise SettingError(f"--metrics {' '.join(names)} is not logged in --stages {' '.join(stages)}; choose others")
    return pairs


def curve(group: Group, key: Key) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the steps, ``[S]``, and the values, ``[runs, S]``, at the steps that all runs with the metric have.

    At most `plots.MAX_POINTS` points are returned, each the average of neighbouring steps; None if there are none.
    """
    series = [each.curves[key] for each in group.runs if key in each.curves]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return None
    rows = [plots.downsample(np.array([each[step] for step in steps], dtype=float)) for each in series]
    return plots.downsample(np.array(steps, dtype=float)), np.stack(rows)


def figure(groups: Sequence[Group], key: Key) -> str | None:
    """Returns an SVG of a metric over the steps of a stage: one line per group, with a 95 % band over several runs.

    Returns None if no group has a curve, as when its runs have no step in common.
    """
    stage, name = key
    words = frontier_plot.words(name)
    metric = metric_display.METRICS.get(name, metric_display.Metric(words, words, ""))
    drawn = [(place, *found) for place, each in enumerate(groups) if (found := curve(each, key))]
    if not drawn:
        return None
    columns = 3 if all(len(each.label) <= 16 for each in groups) else 1
    with plots.axes(height=2.5 + 0.16 * math.ceil(len(groups) / columns)) as (svg, (ax,)):
        for place, x, values_RS in drawn:
            line, color = divmod(place, len(frontier_plot.LINE_COLORS))
            color = plots.color(frontier_plot.LINE_COLORS[color])
            style = {"linestyle": ("-", "--", ":")[line % 3], "marker": "o" if len(x) == 1 else None}
            ax.plot(x, values_RS.mean(axis=0), color=color, label=groups[place].label, **style)
            if len(values_RS) > 1:
                _, low, high = zip(*(diagnostics.mean_interval(column) for column in values_RS.T))
                ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        values = np.concatenate([values_RS.ravel() for *_, values_RS in drawn])
        pad = 0.05 * float(np.ptp(values)) or 0.05 * abs(float(values[0])) or 1.0
        ax.set_ylim(float(values.min()) - pad, float(values.max()) + pad)  # wide bands of few runs are cut off
        title = f"{metric.name}, {metric_display.STAGES.get(stage, stage).lower()}"
        ax.figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
        ax.set(xlabel="Step", ylabel=metric.ylabel)
        ax.locator_params(axis="x", integer=True)
        ax.grid(axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
    return svg[0]
