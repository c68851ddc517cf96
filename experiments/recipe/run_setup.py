"""Opens the run of a command: creates the mesh and the run folder, loads the model and data, and builds the job."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

from launch import device_mesh, host_agreement, initial_model, mesh_settings, process_setup, run_folder
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
    group = hosts.current()
    out.quiet = not group.first
    resolved = device_mesh.resolve(settings)
    mesh = device_mesh.make(resolved)
    path = pathlib.Path(
        settings.resume or group.broadcast_from_first("path", lambda: str(run_folder.free_path(settings, kind=kind)))
    )
    model_files = initial_model.fingerprint(settings.model) if settings.model else None
    if settings.resume and model_files:
        run_folder.check_model_unchanged(settings.resume, settings, model_files)
    if settings.resume:
        run_folder.check_data_unchanged(settings.resume, settings)
    model = initial_model.load(settings.model, mesh=mesh, template=settings.template) if settings.model else None
    settings = initial_model.with_date(settings, model)
    task = tasks.make_task(settings, model)
    if task.comparisons is not None:  # the file may have fewer comparisons than a batch
        n = len(task.comparisons[0].ranks_BK) // (2 if settings.reward_model.heldout else 1)
        mesh_settings.check_divides(resolved.mesh, "--reward-model.batch", min(settings.reward_model.batch, n))
    accept(task)
    folder = _open_folder(path, settings, model_files)
    verb = "resuming" if settings.resume else "writing to"
    print_line(out, f"{verb} {folder.path}; data: {task.dropped.report()}")
    for text in task.notes:
        folder.note("data", text)
    if model is not None:
        print_line(out, f"starting from {model.path} ({model.cfg.model_type}); chat template: {model.fmt.origin}")
    cfg = jobs.model_config(settings, task, model)
    print_line(out, describe_dtype(cfg))
    if mesh is not None:
        for line in device_mesh.describe(mesh, cfg):
            print_line(out, line)
    second = [("heldout_reward_model", 10.0)] if settings.reward_model.heldout else []
    with folder.log, _make_progress([*first_stages, *second, *weights]) as progress:
        folder.print_note = progress.message
        yield (
            folder,
            jobs.make_job(
                resolved,
                task,
                model=model,
                checkpoints=folder.checkpoints,
                log=folder.log,
                progress=progress,
                mesh=mesh,
                note=folder.note,
            ),
        )


def _open_folder(path: pathlib.Path, settings: Settings, model_files: str | None) -> run_folder.RunFolder:
    """Opens the run folder, which only the first host creates and writes to."""
    if hosts.current().first:
        if settings.resume:
            folder = run_folder.RunFolder(path)
        else:
            folder = run_folder.create(path, settings, model_files=model_files)
        hosts.current().broadcast_from_first("folder", lambda: str(path))
        return folder
    hosts.current().broadcast_from_first("folder", str)
    host_agreement.check_shared(path)
    return run_folder.RunFolder(path, host_agreement.ReadOnlyLog(path))


def _make_progress(weights: Sequence[tuple[str, float]]) -> console.StageProgress:
    if hosts.current().first:
        return console.StageProgress(weights, elapsed=time.time() - process_setup.START_TIME)
    return console.StageProgress(weights, console=Console(quiet=True), live=False)


def describe_dtype(cfg: lm.LMConfig) -> str:
    """Returns a line that names the dtype in which the models compute."""
    return f"computing in {cfg.dtype}, with parameters in float32 (--compute.dtype)"


def print_line(out: Console, text: str) -> None:
    """Prints a line without wrapping it or interpreting brackets as markup."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)
