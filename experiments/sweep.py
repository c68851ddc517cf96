"""Runs PPO with several values of its settings and several seeds, and plots reward and gold utility against KL.

    python experiments/sweep.py                                    4 KL coefficients x 3 seeds on the built-in world
    python experiments/sweep.py --over ppo.kl-coef=0,0.02,0.2 ppo.ptx-coef=0,1,4 --seeds 3
    python experiments/sweep.py --from-run runs/NAME --over ppo.clip=0.1,0.2,0.4    with the models of another run
    python experiments/sweep.py --ppo.method rloo --ppo.samples 4  another RL method
    python experiments/sweep.py --preset smoke                     all runs in about a minute, too short to learn much
    python experiments/sweep.py --resume runs/NAME                 resume an interrupted sweep

All runs share one SFT model, one reward model and one compiled program. On a single GPU or TPU, they train together
(``jax.vmap`` over keys and settings). On a CPU, where this is not faster, and on a mesh, they train one after another.
The flags of instructgpt.py are accepted too, except those without effect, such as --ppo.kl-coef, if it is swept,
and --on-alarm. The run folder contains sweep.json, sweep.html with the figures, config.json, metrics.jsonl,
tensorboard/ and checkpoints/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import command_line, mesh_settings, process_setup, setting_checks
from launch import settings as settings_lib
from launch.setting_checks import require
from launch.settings import PPO, SettingError, Settings
from sweeps import grids


@dataclasses.dataclass(frozen=True)
class Sweep(Settings):
    """Settings of sweep.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "sweep"

    over: tuple[str, ...] = ()
    """Settings to vary and their values, such as ppo.kl-coef=0,0.02,0.2; all combinations are run. Any number that the
    compiled step takes as an input can be varied. If empty, the coefficient of the KL penalty (or, with grpo and
    dr-grpo, of the KL loss) is 0.01, 0.03, 0.1 and 0.3."""
    seeds: int = 3
    """Number of runs of each combination. They share data and initial models; sampling and minibatches are seeded
    separately."""
    from_run: str | None = None
    """Folder of a run of instructgpt.py, sweep.py or compare.py whose SFT model and reward model, and whose settings
    of everything before RL, are used. None trains new ones."""
    together: Literal["auto", "yes", "no"] = "auto"
    """Whether to train all runs together; `auto` does so on a single GPU or TPU. Runs that train together have no
    checkpoints, so resuming repeats them."""


def parse(arguments: list[str]) -> Sweep:
    """Parses the command line; raises SettingError for invalid settings."""
    source = None if settings_lib.peek(arguments, "--resume") else settings_lib.peek(arguments, "--from-run")
    given = {} if source is None else grids.settings_of(source)
    given |= {"out": None, "resume": None} if given else {}

    def adjust(preset: Sweep) -> Sweep:
        return dataclasses.replace(preset, **given)

    settings = command_line.parse(Sweep, arguments, doc=__doc__, adjust=adjust, unused=_unused, runs=_runs)
    if source is not None:
        why = "with --from-run, which uses the models of that run"
        setting_checks.refuse_changed(settings, dataclasses.replace(settings, **given), [(grids.SHARED_SETTINGS, why)])
    if settings.together == "yes" and mesh_settings.is_sharded(settings):
        raise SettingError("--together yes requires a single device; leave out --together or --mesh.*")
    require(settings.seeds >= 1, settings, "seeds", "at least 1")
    for ppo in _runs(settings):
        setting_checks.check(dataclasses.replace(settings, ppo=ppo))
    return settings


def _unused(settings: Sweep) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the sweep, and why."""
    swept = list(grids.points(settings.over, settings.ppo)[0].values)
    if setting_checks.kl_field(settings.ppo) == "kl_loss_coef":
        swept.append("kl_coef")
    yield [f"ppo.{name}" for name in swept], "in sweep.py, which uses the values in --over instead"
    yield ("on_alarm",), "in sweep.py, which raises no alarms"
    yield ("hosts",), "in sweep.py, which runs on a single host"
    unread = ["best_of", "best_of_prompts", "skills", "transcripts"]
    unread += [] if "ptx_coef" in swept else ["pretraining_rows"]
    yield [f"evaluation.{name}" for name in unread], "in sweep.py, which only samples one answer to each prompt"
    why = "in sweep.py, which trains without a pretraining loss; add ppo.ptx-coef to --over"
    yield from setting_checks.unused_ppo(_runs(settings), ptx="ptx_coef" in swept, why=why)


def _runs(settings: Sweep) -> list[PPO]:
    return [point.applied_to(settings.ppo, ptx_coef=0.0) for point in grids.points(settings.over, settings.ppo)]


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib

import jax
from launch import entry_point, run_folder
from recipe import evaluation, jobs, precompile, run_setup
from rich.console import Console
from sweeps import frontier_plot, run_grid

from rlhf_jax.data import errors


def cells_of(settings: Sweep) -> list[run_grid.Cell]:
    """Returns the runs of a sweep, ordered by combination."""
    return [
        run_grid.Cell(f"{point.name}-seed{seed}", ppo, seed, ptx_coef=ppo.ptx_coef)
        for point, ppo in zip(grids.points(settings.over, settings.ppo), _runs(settings), strict=True)
        for seed in range(settings.seeds)
    ]


def run(settings: Sweep) -> dict[str, Any]:
    """Runs the sweep and returns the contents of sweep.json."""
    out, cells = Console(), cells_of(settings)
    points = grids.points(settings.over, settings.ppo)
    one_device = not mesh_settings.is_sharded(settings)
    has_accelerator = jax.default_backend() != "cpu"
    together = settings.together == "yes" or (settings.together == "auto" and one_device and has_accelerator)
    weights = [(cell.name, 0.9 * settings.ppo.iterations) for cell in cells] + [("evaluate", 3.0 * len(cells))]
    with run_setup.open_run(settings, out, weights=weights) as (folder, job):
        if settings.from_run is not None:
            run_grid.copy_stages(pathlib.Path(settings.from_run), folder.path)
        shared = run_grid.with_settings(job, run_grid.widest([cell.settings for cell in cells]))
        with precompile.in_background(job, {} if together else {cell.name: shared for cell in cells}):
            measured = _run_all(job, shared, cells, together=together)
    results = {
        "seconds": folder.elapsed.total,
        "together": together,
        "traces": 1 if together else shared.ppo_step.traces,
        "points": [
            point.values | run_grid.mean_over_seeds([numbers for cell, numbers in measured if _is_at(cell, point)])
            for point in points
        ],
        "runs": [
            {"name": cell.name, "seed": cell.seed}
            | next(point.values for point in points if _is_at(cell, point))
            | numbers
            for cell, numbers in measured
        ],
    }
    results = run_folder.finite(results)
    swept = list(points[0].values)
    frontier_plot.write_sweep(
        folder.path / "sweep.html", results["points"], results["runs"], swept=swept, title="Reward against KL"
    )
    folder.write_json("sweep.json", results)
    out.print(frontier_plot.table(results["points"], swept=swept))
    run_setup.print_line(
        out,
        f"Means over {errors.counted(settings.seeds, 'seeds')} ± half the width of their 95 % intervals. The win rate "
        "is by gold utility, against the SFT model.",
    )
    run_setup.print_line(out, f"figure: {folder.path / 'sweep.html'}   results: {folder.path / 'sweep.json'}")
    return results


def _is_at(cell: run_grid.Cell, point: grids.Point) -> bool:
    return cell.name == f"{point.name}-seed{cell.seed}"


def _run_all(
    job: jobs.Job, shared: jobs.Job, cells: Sequence[run_grid.Cell], *, together: bool
) -> list[tuple[run_grid.Cell, dict[str, float]]]:
    """Trains and measures all runs; ``shared`` has the step that all of them call."""
    models = run_grid.prepare(job)
    if together:
        policies = run_grid.train_together(shared, models, cells)
    else:
        policies = [run_grid.train(job, models, cell, step=shared.ppo_step) for cell in cells]
    job.progress.start("evaluate", len(cells))
    baseline = run_grid.sample_answers(job, models, job.task.eval_prompts, models.sft, seed=0)
    # The loss on pretraining text shows the alignment tax, which PPO-ptx avoids.
    probe = evaluation.make_probe(job) if any(cell.ptx_coef for cell in cells) else lambda policy: {}
    measured = []
    for cell, policy in zip(cells, policies, strict=True):
        numbers = run_grid.measure(job, models, job.task.eval_prompts, baseline, policy, seed=1 + cell.seed)
        numbers |= {name: value[0] for name, value in probe(policy).items() if name == "pretraining_loss"}
        measured.append((cell, numbers))
        job.progress.update("evaluate", len(measured), len(cells))
    job.progress.finish("evaluate")
    return measured


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
