"""Runs a command that trains a model of the user's own: its run folder, what it prints, and what it saves."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from launch import initial_model
from recipe import engine, run_setup
from rich.console import Console

from finetune import outcome
from rlhf_jax import types
from rlhf_jax.data import errors


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The model and the data of a command, loaded before its run folder is created."""

    model: initial_model.InitialModel
    """The model to train."""
    inputs: Any
    """Whatever else the command needs."""
    sizes: Mapping[str, int]
    """The sizes of the data, by name."""
    stages: Sequence[tuple[str, float]]
    """The stages with the work of each in any unit, such as forward passes of a row."""
    remark: str = ""
    """A line to print about the data; none if empty."""
    notes: Sequence[str] = ()
    """Warnings about the data, which are printed and saved as incidents."""


class Trained(NamedTuple):
    """What a command has trained and measured."""

    params: types.Params
    results: dict[str, Any]
    """The contents of results.json that are specific to the command."""
    save: Mapping[str, Any] = {}
    """Further arguments of `lm.save`."""


def run(
    settings: Any,
    *,
    counts: errors.DropCount,
    prepare: Callable[[Any, errors.DropCount], Prepared],
    train: Callable[[engine.Engine, pathlib.Path, Prepared], Trained],
    title: str,
    rows: outcome.Rows,
) -> dict[str, Any]:
    """Runs the command, or resumes its run, and returns the contents of results.json.

    Args:
        settings: The settings of the command.
        counts: Counts unusable records.
        prepare: ``(mesh, counts) -> prepared`` loads and checks the model and the data.
        train: ``(job, folder, prepared) -> trained`` trains and evaluates the model in the run folder.
        title: Title of the report.
        rows: Returns the rows of the table that is printed.

    Raises:
        SettingError: The settings do not fit the devices, the model, the data or the run to resume.
        DataError: The data is unusable.
    """
    out = Console()
    if finished := outcome.show_finished(settings, out, rows):
        return finished

    def prepare_folder(resolved: Any, mesh: Any) -> tuple[Any, Prepared]:
        del resolved
        prepared = prepare(mesh, counts)
        return initial_model.with_date(settings, prepared.model), prepared

    stages = lambda prepared: prepared.stages  # noqa: E731
    with run_setup.open_folder(settings, out, stages=stages, prepare=prepare_folder) as opened:
        prepared: Prepared = opened.prepared
        cfg = initial_model.with_compute(prepared.model.cfg, settings.compute)
        job = engine.Engine(cfg=cfg, **opened.engine_fields)
        if prepared.remark:
            run_setup.print_line(out, prepared.remark)
        outcome.describe_data(out, counts, prepared.sizes)
        for text in prepared.notes:
            opened.folder.note("data", text)
        outcome.describe_model(opened, out, prepared.model, cfg)
        trained = train(job, opened.folder.path, prepared)
    results = trained.results | {"dropped": counts.dropped | counts.truncated}
    outcome.save_model(opened.folder, cfg, trained.params, prepared.model.fmt, **trained.save)
    return outcome.finish(opened.folder, settings, results, out, title=title, rows=rows)
