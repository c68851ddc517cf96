"""Reward against KL: PPO at several KL coefficients and seeds, from one SFT model and one reward model.

    python experiments/sweep.py                                   the recipe up to the reward model, then 4 x 3 runs
    python experiments/sweep.py --kl-coefs 0.02 0.2 --seeds 5
    python experiments/sweep.py --ppo.method rloo --ppo.samples 4  the same of another method
    python experiments/sweep.py --preset smoke                    all of it in about a minute, too short to learn much
    python experiments/sweep.py --resume runs/NAME                go on with a sweep that was stopped or killed

One compiled program serves every coefficient and every seed. On a GPU or TPU all runs are one program (``jax.vmap``
over keys and coefficients); on a CPU, where that is no faster, they come one after the other. All settings of
instructgpt.py are settings here too. Writes below ``--out``: sweep.json, sweep.html with the figure, config.json,
metrics.jsonl, tensorboard/, checkpoints/.
"""

from __future__ import annotations

from launch import process_setup

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import math
import time
from typing import Any, Literal

import jax
from launch import command_line, mesh_settings, run_folder, settings
from recipe import precompile, session
from rich.console import Console
from sweeps import frontier_plot, run_grid


@dataclasses.dataclass(frozen=True)
class Sweep(settings.Settings):
    """KL coefficients by seeds, with every setting of the main job."""

    kl_coefs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Reward per nat; each is run with every seed."""
    seeds: int = 3
    """Runs of each coefficient: keys of sampling and of minibatches; data and models are the same."""
    together: Literal["auto", "yes", "no"] = "auto"
    """All runs as one program; `auto`: where there is an accelerator. Such a sweep goes on from its stages alone."""


def parse(arguments: list[str]) -> Sweep:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = command_line.parse(Sweep, arguments, prog="sweep.py", doc=__doc__)
    if not asked.kl_coefs or not all(0 <= coef < math.inf for coef in asked.kl_coefs):
        raise settings.SettingError(f"--kl-coefs is {asked.kl_coefs}; each must be at least 0 and finite")
    if len(set(asked.kl_coefs)) < len(asked.kl_coefs):
        raise settings.SettingError(f"--kl-coefs is {asked.kl_coefs}; each may be there once")
    if asked.together == "yes" and mesh_settings.asked_for(asked):
        raise settings.SettingError("--together yes is for one device; leave it or --mesh.* out")
    if asked.seeds < 1:
        raise settings.SettingError(f"--seeds is {asked.seeds}; it must be at least 1")
    return asked


def cells_of(asked: Sweep) -> list[run_grid.Cell]:
    """The runs of a sweep, coefficient by coefficient."""
    return [
        run_grid.Cell(f"kl{coef:g}-seed{seed}", dataclasses.replace(asked.ppo, kl_coef=coef), seed)
        for coef in asked.kl_coefs
        for seed in range(asked.seeds)
    ]


def run(asked: Sweep) -> dict[str, Any]:
    """The whole sweep; returns what sweep.json holds."""
    out, wanted = Console(), cells_of(asked)
    spread = mesh_settings.asked_for(asked)
    together = asked.together == "yes" or (asked.together == "auto" and not spread and jax.default_backend() != "cpu")
    weights = [(cell.name, 0.9 * asked.ppo.iterations) for cell in wanted] + [("evaluate", 3.0 * len(wanted))]
    with (
        session.opened(asked, out, kind="sweep", weights=weights) as (folder, job),
        precompile.compiling(job, {} if together else {cell.name: job for cell in wanted}),
    ):
        shared = run_grid.prepare(job)
        if together:
            policies = run_grid.train_together(job, shared, wanted)
        else:
            policies = [run_grid.train(job, shared, cell, step=job.ppo_step) for cell in wanted]
        job.progress.start("evaluate", len(wanted))
        against = run_grid.answers(job, shared, job.task.eval_prompts, shared.sft, seed=0)
        found = []
        for cell, policy in zip(wanted, policies, strict=True):
            numbers = run_grid.measure(job, shared, job.task.eval_prompts, against, policy, seed=1 + cell.seed)
            found.append({"name": cell.name, "kl_coef": cell.settings.kl_coef, "seed": cell.seed} | numbers)
            job.progress.update("evaluate", len(found), len(wanted))
        job.progress.finish("evaluate")
    results = {
        "seconds": time.time() - process_setup.BEGAN,
        "together": together,
        "traces": 1 if together else job.ppo_step.traces,
        "points": [
            {"kl_coef": coef} | run_grid.over_seeds([_numbers(f) for f in found if f["kl_coef"] == coef])
            for coef in asked.kl_coefs
        ],
        "runs": found,
    }
    results = run_folder.finite(results)
    frontier_plot.write(folder.path / "sweep.html", results["points"], results["runs"], title="Reward against KL")
    folder.write_json("sweep.json", results)
    out.print(frontier_plot.table(results["points"]))
    session.say(out, f"figure: {folder.path / 'sweep.html'}   numbers: {folder.path / 'sweep.json'}")
    return results


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name not in ("name", "kl_coef", "seed")}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command_line.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
