"""How every experiment begins, or goes on: its model checked, its folder made, its job built."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from launch import host_agreement, initial_model, mesh_settings, run_folder
from launch.settings import Settings
from rich.console import Console

from recipe import jobs, tasks
from rlhf_jax.distributed import hosts
from rlhf_jax.report import console

SHARED = (("pretrain", 60.0), ("sft", 15.0), ("sft_mix", 16.0), ("comparisons", 11.0), ("reward_model", 19.0))
"""The stages that every experiment begins with, and the seconds that they are expected to take."""


@contextlib.contextmanager
def opened(
    asked: Settings,
    out: Console,
    *,
    kind: str,
    weights: Sequence[tuple[str, float]],
    shared: Sequence[tuple[str, float]] = SHARED,
    accept: Callable[[tasks.Task], None] = lambda task: None,
) -> Iterator[tuple[run_folder.RunFolder, jobs.Job]]:
    """The folder of a run and its job, with a progress over the stages of ``shared`` and ``weights``.

    A mesh that does not fit the devices, a model or a file that cannot be used, a model that has changed since the run
    began, and a task that ``accept`` raises a SettingError for, are refused before anything is written.
    """
    group = hosts.current()
    out.quiet = not group.first
    spread = mesh_settings.resolved(asked)
    mesh = mesh_settings.make(spread)
    path = pathlib.Path(
        asked.resume or group.broadcast_from_first("path", lambda: str(run_folder.free_path(asked, kind=kind)))
    )
    model_files = initial_model.fingerprint(asked.model) if asked.model else None
    if asked.resume and model_files:
        run_folder.same_model(asked.resume, asked, model_files)
    if asked.resume:
        run_folder.same_data(asked.resume, asked)
    begin = initial_model.load(asked.model, mesh=mesh) if asked.model else None
    task = tasks.make_task(asked, begin)
    if task.comparisons is not None:  # of a file, whose comparisons have just been counted
        n = len(task.comparisons[0].ranks_BK) // (2 if asked.reward_model.heldout else 1)
        mesh_settings.divides(spread.mesh, "--reward-model.batch", min(asked.reward_model.batch, n))
    accept(task)
    folder = _folder(path, asked, model_files)
    say(out, f"writing to {folder.path}; data: {task.dropped.report()}")
    if begin is not None:
        say(out, f"from {begin.path} ({begin.cfg.model_type}); chat template: {begin.fmt.origin}")
    if mesh is not None:
        for line in mesh_settings.told(mesh, jobs.model_of(asked, task, begin)):
            say(out, line)
    second = [("heldout_reward_model", 10.0)] if asked.reward_model.heldout else []
    with folder.log, _progress([*shared, *second, *weights]) as progress:
        folder.say = progress.message
        yield (
            folder,
            jobs.make_job(
                spread,
                task,
                start=begin,
                checkpoints=folder.checkpoints,
                log=folder.log,
                progress=progress,
                mesh=mesh,
                note=folder.note,
            ),
        )


def _folder(path: pathlib.Path, asked: Settings, model_files: str | None) -> run_folder.RunFolder:
    """The run's folder, which the first host makes, and in which it alone writes."""
    if hosts.current().first:
        made = run_folder.RunFolder(path) if asked.resume else run_folder.create(path, asked, model_files=model_files)
        hosts.current().broadcast_from_first("folder", lambda: str(path))
        return made
    hosts.current().broadcast_from_first("folder", str)
    host_agreement.shared(path)
    return run_folder.RunFolder(path, host_agreement.ReadLog(path))


def _progress(weights: Sequence[tuple[str, float]]) -> console.StageProgress:
    if hosts.current().first:
        return console.StageProgress(weights)
    return console.StageProgress(weights, console=Console(quiet=True), live=False)


def say(out: Console, text: str) -> None:
    """Print a line whole, whatever the terminal's width, and its brackets as they are."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)
