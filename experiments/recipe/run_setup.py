"""Opens the run of a command: creates the mesh and the run folder, loads the model and data, and builds the job."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from launch import device_mesh, elapsed_time, host_agreement, initial_model, mesh_settings, run_folder
from launch.run_settings import RunSettings
from launch.settings import Settings
from rich.console import Console

from recipe import jobs, tasks
from rlhf_jax import lm
from rlhf_jax.distributed import hosts
from rlhf_jax.report import console

FIRST_STAGES = (("pretrain", 60.0), ("sft", 15.0), ("sft_mix", 16.0), ("comparisons", 11.0), ("reward_model", 19.0))
"""The stages before RL, which most commands share, with their durations in seconds at the default settings."""


@contextlib.contextmanager
def open_run(
    settings: Settings,
    out: Console,
    *,
    weights: Sequence[tuple[str, float]],
    first_stages: Sequence[tuple[str, float]] = FIRST_STAGES,
    kind: str | None = None,
    accept: Callable[[tasks.Task], None] = lambda task: None,
) -> Iterator[tuple[run_folder.RunFolder, jobs.Job]]:
    """Opens a new run, or the run to resume, and shows its progress while the block runs.

    Nothing is written until all checks have passed: the mesh fits the devices, the model and the data are usable, and
    neither has changed since the run to resume was started.

    Args:
        settings: The settings of the command.
        out: The console to print to. It is silenced on all hosts except the first.
        weights: The stages that are specific to the command, each with its expected duration in seconds.
        first_stages: The stages that precede them, also with durations.
        kind: Prefix of the run folder's default name; None uses the name of the command.
        accept: Raises SettingError for a task that the command cannot use.

    Yields:
        The run folder and the job.

    Raises:
        SettingError: The settings do not fit the devices, the model, the data or the run to resume.
        DataError: The data is unusable.
    """

    def prepare(resolved: Settings, mesh: Any) -> tuple[Settings, Any]:
        path = settings.given_model
        model = initial_model.load(path, mesh=mesh, template=settings.template) if path else None
        dated = initial_model.with_date(settings, model)
        task = tasks.make_task(dated, model)
        if task.comparisons is not None:  # the file may have fewer comparisons than a batch
            n = len(task.comparisons[0].ranks_BK) // (2 if settings.reward_model.heldout else 1)
            mesh_settings.check_divides(resolved.mesh, "--reward-model.batch", min(settings.reward_model.batch, n))
        jobs.model_config(settings, task, model)
        accept(task)
        return dated, (model, task)

    second = [("heldout_reward_model", 10.0)] if settings.reward_model.heldout else []
    with open_folder(settings, out, stages=[*first_stages, *second, *weights], kind=kind, prepare=prepare) as run:
        model, task = run.prepared
        print_line(out, f"data: {task.dropped.report()}")
        for text in task.notes:
            run.folder.note("data", text)
        if settings.data.path is None and settings.model is not None:
            print_line(out, "without --data.path, the data is that of the built-in world")
        if model is not None:
            print_line(out, f"starting from {model.path} ({model.cfg.model_type}); chat template: {model.fmt.origin}")
        cfg = jobs.model_config(settings, task, model)
        describe(run, cfg, out)
        yield run.folder, jobs.make_job(task=task, model=model, **run.engine_fields)


P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run folder whose progress is shown, and what was prepared before it was created."""

    settings: Any
    """The settings with the sizes of the mesh."""
    folder: run_folder.RunFolder
    progress: console.StageProgress
    mesh: Any
    prepared: Any

    @property
    def engine_fields(self) -> dict[str, Any]:
        """The arguments of `engine.Engine` except ``cfg``."""
        folder = self.folder
        shared = {"settings": self.settings, "progress": self.progress, "mesh": self.mesh, "note": folder.note}
        return shared | {"checkpoints": folder.checkpoints, "log": folder.log}


@contextlib.contextmanager
def open_folder(
    settings: Any,
    out: Console,
    *,
    stages: Sequence[tuple[str, float]] | Callable[[Any], Sequence[tuple[str, float]]],
    prepare: Callable[[Any, Any], tuple[RunSettings, Any]],
    kind: str | None = None,
) -> Iterator[OpenRun]:
    """Opens the folder of a new run, or of the run to resume, and shows its progress while the block runs.

    Nothing is written until all checks have passed: the mesh fits the devices, ``prepare`` accepts the inputs, and they
    have not changed since the run to resume was started.

    Args:
        settings: The settings of the command.
        out: The console to print to. It is silenced on all hosts except the first.
        stages: The stages of the run, each with its expected duration in any unit, or a function that returns them
            for the second value of ``prepare``.
        prepare: ``prepare(settings, mesh)`` loads the model and the data and returns the settings to save and whatever
            the command needs. Its ``settings`` have the sizes of the mesh.
        kind: Prefix of the run folder's default name; None uses the name of the command.

    Raises:
        SettingError: The settings do not fit the devices, the inputs or the run to resume.
        DataError: The data is unusable.
    """
    group = hosts.current()
    out.quiet = not group.first
    resolved = device_mesh.resolve(settings)
    mesh = device_mesh.make(resolved)
    path = pathlib.Path(
        settings.resume or group.broadcast_from_first("path", lambda: str(run_folder.free_path(settings, kind=kind)))
    )
    if settings.resume:
        if group.first:
            run_folder.lock(f"--resume {path}", path)
        run_folder.check_inputs_unchanged(settings.resume, settings)
    saved, prepared = prepare(resolved, mesh)
    folder = _open_folder(path, saved)
    print_line(out, f"{'resuming' if settings.resume else 'writing to'} {folder.path}")
    weights = stages(prepared) if callable(stages) else stages
    try:
        with folder.log, make_progress(weights, folder) as progress:
            folder.print_note = progress.message
            yield OpenRun(resolved, folder, progress, mesh, prepared)
    finally:
        if group.first:
            folder.elapsed.save()


def describe(run: OpenRun, cfg: lm.LMConfig, out: Console) -> None:
    """Prints the number format and the mesh of a run."""
    print_line(out, describe_dtype(cfg))
    for line in [] if run.mesh is None else device_mesh.describe(run.mesh, cfg):
        print_line(out, line)


def _open_folder(path: pathlib.Path, settings: RunSettings) -> run_folder.RunFolder:
    """Opens the run folder, which only the first host creates and writes to."""
    if hosts.current().first:
        if settings.resume:
            folder = run_folder.resume(path, settings)
        else:
            folder = run_folder.create(path, settings)
        hosts.current().broadcast_from_first("folder", lambda: str(path))
        return folder
    hosts.current().broadcast_from_first("folder", str)
    host_agreement.check_shared(path)
    return run_folder.RunFolder(path, host_agreement.ReadOnlyLog(path))


class _TimedProgress(console.StageProgress):
    """Shows the progress of a run and saves the time that its processes have taken."""

    def __init__(self, stages: Sequence[tuple[str, float]], elapsed: elapsed_time.ElapsedTime) -> None:
        super().__init__(stages, elapsed=elapsed.total)
        self._time = elapsed
        elapsed.save()

    def update(self, stage: str, done: int, total: int, metrics: Mapping[str, Any] | None = None) -> None:
        super().update(stage, done, total, metrics)
        self._time.tick()


def make_progress(weights: Sequence[tuple[str, float]], folder: run_folder.RunFolder) -> console.StageProgress:
    """Returns the progress display of a run, which only the first host shows."""
    if hosts.current().first:
        return _TimedProgress(weights, folder.elapsed)
    return console.StageProgress(weights, console=Console(quiet=True), live=False)


def describe_dtype(cfg: lm.LMConfig) -> str:
    """Returns a line that names the dtype in which the models compute."""
    return f"computing in {cfg.dtype}, with parameters in float32 (--compute.dtype)"


def print_line(out: Console, text: str) -> None:
    """Prints a line without wrapping it or interpreting brackets as markup."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)
