"""Runs PPO with several KL coefficients and seeds, and plots reward and gold utility against KL.

    python experiments/sweep.py                                    4 coefficients x 3 seeds on the built-in world
    python experiments/sweep.py --kl-coefs 0.02 0.2 --seeds 5
    python experiments/sweep.py --ppo.method rloo --ppo.samples 4  another RL method
    python experiments/sweep.py --preset smoke                     all runs in about a minute, too short to learn much
    python experiments/sweep.py --resume runs/NAME                 resume an interrupted sweep

All runs share one SFT model, one reward model and one compiled program. On a single GPU or TPU, they train together
(``jax.vmap`` over keys and coefficients). On a CPU, where this is not faster, and on a mesh, they train one after
another. The flags of instructgpt.py are accepted too, except those without effect, such as --ppo.kl-coef,
--ppo.ptx-coef and --on-alarm. The run folder contains sweep.json, sweep.html with the figure,
config.json, metrics.jsonl, tensorboard/ and checkpoints/.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import command_line, mesh_settings, process_setup, setting_checks
from launch.setting_checks import require
from launch.settings import PPO, SettingError, Settings


@dataclasses.dataclass(frozen=True)
class Sweep(Settings):
    """Settings of sweep.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "sweep"

    kl_coefs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Coefficients of the KL penalty (in units of reward per nat) or, with grpo and dr-grpo, of the KL loss. Each is
    run with all seeds."""
    seeds: int = 3
    """Number of runs of each coefficient. They share data and initial models; sampling and minibatches are seeded
    separately."""
    together: Literal["auto", "yes", "no"] = "auto"
    """Whether to train all runs together; `auto` does so on a single GPU or TPU. Runs that train together have no
    checkpoints, so resuming repeats them."""


def parse(arguments: list[str]) -> Sweep:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(Sweep, arguments, doc=__doc__, unused=_unused, runs=_runs)
    if not settings.kl_coefs or not all(0 <= coef < math.inf for coef in settings.kl_coefs):
        raise SettingError(f"--kl-coefs is {settings.kl_coefs}; give finite coefficients of at least 0")
    if len(set(settings.kl_coefs)) < len(settings.kl_coefs):
        raise SettingError(f"--kl-coefs is {settings.kl_coefs}; give each coefficient once")
    if settings.together == "yes" and mesh_settings.is_sharded(settings):
        raise SettingError("--together yes requires a single device; leave out --together or --mesh.*")
    require(settings.seeds >= 1, settings, "seeds", "at least 1")
    return settings


def _unused(settings: Sweep) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the sweep, and why."""
    own = ("ppo.kl_coef", f"ppo.{setting_checks.kl_field(settings.ppo)}")
    yield own, "in sweep.py, which uses --kl-coefs instead"
    yield ("on_alarm",), "in sweep.py, which raises no alarms"
    yield ("hosts",), "in sweep.py, which runs on a single host"
    unread = ("best_of", "best_of_prompts", "skills", "pretraining_rows", "transcripts")
    yield [f"evaluation.{name}" for name in unread], "in sweep.py, which only samples one answer to each prompt"
    why = "in sweep.py, which trains without a pretraining loss"
    yield from setting_checks.unused_ppo(_runs(settings), ptx=False, why=why)


def _runs(settings: Sweep) -> list[PPO]:
    return [ppo_settings(settings, coef) for coef in settings.kl_coefs]


def ppo_settings(settings: Sweep, coef: float) -> PPO:
    """Returns the RL settings of the runs with the KL coefficient ``coef``."""
    return dataclasses.replace(settings.ppo, **{setting_checks.kl_field(settings.ppo): coef})


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import time

import jax
from launch import entry_point, run_folder
from recipe import precompile, run_setup
from rich.console import Console
from sweeps import frontier_plot, run_grid


def cells_of(settings: Sweep) -> list[run_grid.Cell]:
    """Returns the runs of a sweep, ordered by coefficient."""
    return [
        run_grid.Cell(f"kl{coef:g}-seed{seed}", ppo_settings(settings, coef), seed)
        for coef in settings.kl_coefs
        for seed in range(settings.seeds)
    ]


def run(settings: Sweep) -> dict[str, Any]:
    """Runs the sweep and returns the contents of sweep.json."""
    out, cells = Console(), cells_of(settings)
    one_device = not mesh_settings.is_sharded(settings)
    has_accelerator = jax.default_backend() != "cpu"
    together = settings.together == "yes" or (settings.together == "auto" and one_device and has_accelerator)
    weights = [(cell.name, 0.9 * settings.ppo.iterations) for cell in cells] + [("evaluate", 3.0 * len(cells))]
    with (
        run_setup.open_run(settings, out, weights=weights) as (folder, job),
        precompile.in_background(job, {} if together else {cell.name: job for cell in cells}),
    ):
        models = run_grid.prepare(job)
        if together:
            policies = run_grid.train_together(job, models, cells)
        else:
            policies = [run_grid.train(job, models, cell, step=job.ppo_step) for cell in cells]
        job.progress.start("evaluate", len(cells))
        baseline = run_grid.sample_answers(job, models, job.task.eval_prompts, models.sft, seed=0)
        measured = []
        for cell, policy in zip(cells, policies, strict=True):
            numbers = run_grid.measure(job, models, job.task.eval_prompts, baseline, policy, seed=1 + cell.seed)
            measured.append((cell, numbers))
            job.progress.update("evaluate", len(measured), len(cells))
        job.progress.finish("evaluate")
    kl_field = setting_checks.kl_field(settings.ppo)
    coef_of = {cell.name: getattr(cell.settings, kl_field) for cell in cells}
    results = {
        "seconds": time.time() - process_setup.START_TIME,
        "together": together,
        "traces": 1 if together else job.ppo_step.traces,
        "points": [
            {"kl_coef": coef}
            | run_grid.mean_over_seeds([numbers for cell, numbers in measured if coef_of[cell.name] == coef])
            for coef in settings.kl_coefs
        ],
        "runs": [
            {"name": cell.name, "kl_coef": coef_of[cell.name], "seed": cell.seed} | numbers
            for cell, numbers in measured
        ],
    }
    results = run_folder.finite(results)
    frontier_plot.write_sweep(folder.path / "sweep.html", results["points"], results["runs"], title="Reward against KL")
    folder.write_json("sweep.json", results)
    out.print(frontier_plot.table(results["points"]))
    run_setup.print_line(out, f"figure: {folder.path / 'sweep.html'}   results: {folder.path / 'sweep.json'}")
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
