"""How every experiment begins, or goes on: its model checked, its folder made, its job built."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from rlhf_jax import console

from . import rundir, stages, start, tasks
from .settings import Settings

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
) -> Iterator[tuple[rundir.RunFolder, stages.Job]]:
    """The folder of a run and its job, with a progress over the stages of ``shared`` and ``weights``.

    A model or a file that cannot be used, a model that has changed since the run began, and a task that ``accept``
    raises a SettingError for, are refused before anything is written.
    """
    path = pathlib.Path(asked.resume) if asked.resume else rundir.free_path(asked, kind=kind)
    model_files = start.fingerprint(asked.model) if asked.model else None
    if asked.resume and model_files:
        rundir.same_model(asked.resume, asked, model_files)
    if asked.resume:
        rundir.same_data(asked.resume, asked)
    begin = start.load(asked.model) if asked.model else None
    task = tasks.make_task(asked, begin)
    accept(task)
    folder = rundir.RunFolder(path) if asked.resume else rundir.create(path, asked, model_files=model_files)
    say(out, f"writing to {folder.path}; data: {task.dropped.report()}")
    if begin is not None:
        say(out, f"from {begin.path} ({begin.cfg.model_type}); chat template: {begin.fmt.origin}")
    second = [("heldout_reward_model", 10.0)] if asked.reward_model.heldout else []
    with folder.log, console.StageProgress([*shared, *second, *weights]) as progress:
        folder.say = progress.tell
        yield (
            folder,
            stages.make_job(
                asked,
                task,
                start=begin,
                checkpoints=folder.checkpoints,
                log=folder.log,
                progress=progress,
                note=folder.note,
            ),
        )


def say(out: Console, text: str) -> None:
    """Print a line whole, whatever the terminal's width, and its brackets as they are."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)
