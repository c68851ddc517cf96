"""Methods beside each other at equal KL: PPO, PPO-ptx, RLOO, GRPO, expert iteration and best-of-n, over seeds.

    python experiments/compare.py                                 six methods with five seeds each
    python experiments/compare.py --methods ppo rloo --seeds 3
    python experiments/compare.py --preset smoke                  all of it in two minutes, too short to learn much
    python experiments/compare.py --resume runs/NAME              go on with a comparison that was stopped or killed

All begin with one SFT model and one reward model. The answers that a method trains on show, at every iteration, how far
it has gone from the SFT model (KL) and what the gold utility says of it; each seed's curve of gold against KL is read
at the same KLs. Best-of-n's KL is known: log n - (n - 1) / n. All settings of instructgpt.py are settings here too.

Writes below ``--out``: compare.json, compare.html with the figure, config.json, metrics.jsonl, checkpoints/.

Hardware: two CPU cores, 2 GB. Time: 14 minutes. To expect at a KL of 1 nat, where SFT has a gold utility of 0.78:
best-of-n 0.90, expert iteration 0.88, RLOO, PPO and PPO-ptx 0.87, GRPO as published 0.86, each to within 0.007; at 2
nats expert iteration and RLOO 0.89, PPO and PPO-ptx 0.89, GRPO 0.88.
"""

from __future__ import annotations

from launch import process_setup
from recipe import jobs

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np
from launch import command_line, mesh_settings, run_folder, settings
from recipe import precompile, session
from rich.console import Console
from sweeps import expert_iteration, frontier_plot, run_grid

from rlhf_jax import diagnostics, metrics

Method = Literal["ppo", "ppo-ptx", "rloo", "grpo", "expert-iteration", "best-of-n"]
EVERY: tuple[Method, ...] = ("ppo", "ppo-ptx", "rloo", "grpo", "expert-iteration", "best-of-n")


@dataclasses.dataclass(frozen=True)
class Compare(settings.Settings):
    """Methods by seeds, with every setting of the main job."""

    methods: tuple[Method, ...] = EVERY
    """Which to run."""
    seeds: int = 5
    """Runs of each method: keys of sampling and of minibatches; data and models are the same."""
    at: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """KL to the SFT model, in nats a sequence, at which gold is read."""
    group: int = 4
    """Answers to each prompt in rloo and grpo, and of which expert iteration keeps one."""
    rounds: int = 4
    """Of expert iteration, on half of the prompts that the other methods get."""


def settings_of(asked: Compare, method: Method) -> settings.PPO:
    """What a method changes: estimator, reduction and where the KL stands; batch, rates and iterations are the same."""
    plain = dataclasses.replace(asked.ppo, method="ppo", samples=1)
    if method == "rloo":
        return dataclasses.replace(plain, method="rloo", samples=asked.group)
    if method == "grpo":
        return dataclasses.replace(plain, method="grpo", samples=asked.group, kl_coef=0.0, kl_loss_coef=0.04)
    return plain


def run(asked: Compare) -> dict[str, Any]:
    """The whole comparison; returns what compare.json holds."""
    out = Console()
    learning: list[Method] = [m for m in asked.methods if m in ("ppo", "ppo-ptx", "rloo", "grpo")]
    wanted: dict[Method, list[run_grid.Cell]] = {
        method: [
            run_grid.Cell(
                f"{method}-seed{seed}",
                settings_of(asked, method),
                seed,
                asked.ppo.ptx_coef if method == "ppo-ptx" else 0.0,
            )
            for seed in range(asked.seeds)
        ]
        for method in learning
    }
    every = [cell for each in wanted.values() for cell in each]
    weights = [(cell.name, 0.9 * asked.ppo.iterations) for cell in every]
    weights += [("expert-iteration", 20.0 * asked.seeds), ("best-of-n", 5.0 * asked.seeds)]
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    with session.opened(asked, out, kind="compare", weights=weights) as (folder, job):
        # PPO and PPO-ptx have the same settings, and so are one program.
        jobs = {each: run_grid.with_settings(job, each) for each in dict.fromkeys(cell.settings for cell in every)}
        with precompile.compiling(job, {cell.name: jobs[cell.settings] for cell in every}):
            shared = run_grid.prepare(job)
            for cell in every:
                run_grid.train(job, shared, cell, step=jobs[cell.settings].ppo_step)
        if "expert-iteration" in asked.methods:
            curves["expert-iteration"] = _expert(job, shared, asked)
        if "best-of-n" in asked.methods:
            curves["best-of-n"] = _best_of_n(job, shared, asked)
    rows = metrics.read(folder.path)
    for method, each in wanted.items():
        curves[method] = [_curve(rows, cell.name) for cell in each]
    results = summary(asked, curves) | {"seconds": time.time() - process_setup.BEGAN}
    results = run_folder.finite(results)
    frontier_plot.write_methods(folder.path / "compare.html", results["methods"], title="Gold utility at equal KL")
    folder.write_json("compare.json", results)
    out.print(frontier_plot.methods_table(results["methods"], asked.at))
    session.say(out, f"figure: {folder.path / 'compare.html'}   numbers: {folder.path / 'compare.json'}")
    return results


def _curve(rows: list[dict[str, Any]], stage: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and gold at every iteration of a run."""
    mine = [row for row in rows if row["stage"] == stage]
    return tuple(np.array([row[name] for row in mine]) for name in ("kl", "gold"))  # type: ignore[return-value]


def _expert(job: jobs.Job, shared: run_grid.Prepared, asked: Compare) -> list[tuple[np.ndarray, np.ndarray]]:
    job.progress.start("expert-iteration", asked.seeds)
    found = []
    for seed in range(asked.seeds):
        policy, rounds = expert_iteration.iterate(
            job,
            shared,
            job.task.rl_prompts.take(len(job.task.rl_prompts) // 2),
            name=f"expert-seed{seed}",
            seed=seed,
            rounds=asked.rounds,
            samples=asked.group,
            epochs=2,
            learning_rate=asked.sft.learning_rate / 4,
        )
        last = run_grid.answers(job, shared, job.task.eval_prompts, policy, seed=seed)
        found.append(
            (
                np.array([r.kl for r in rounds] + [float(np.mean(last.kl_B))]),
                np.array([r.gold for r in rounds] + [float(np.mean(last.gold.total))]),
            )
        )
        job.progress.update("expert-iteration", seed + 1, asked.seeds)
    job.progress.finish("expert-iteration")
    return found


def _best_of_n(job: jobs.Job, shared: run_grid.Prepared, asked: Compare) -> list[tuple[np.ndarray, np.ndarray]]:
    job.progress.start("best-of-n", asked.seeds)
    how, found = asked.evaluation, []
    N, sizes = min(how.best_of_prompts, len(job.task.eval_prompts)), [1, 2, 4, 8, 16]
    prompts = job.task.eval_prompts.take(N).at(np.repeat(np.arange(N), sizes[-1]))
    for seed in range(asked.seeds):
        key = jax.random.fold_in(job.key("evaluate"), 1000 + seed)
        pool = job.sampler(shared.start, shared.start, shared.reward, prompts, key)
        pairs = zip(pool.scores_B.reshape(N, -1), np.asarray(pool.gold.total).reshape(N, -1))
        gold_n = np.mean([diagnostics.best_of_n_mean(proxy, gold, sizes) for proxy, gold in pairs], axis=0)
        found.append((np.array([diagnostics.best_of_n_kl(n) for n in sizes]), gold_n))
        job.progress.update("best-of-n", seed + 1, asked.seeds)
    job.progress.finish("best-of-n")
    return found


def summary(asked: Compare, curves: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, Any]:
    """Gold at the asked KLs: mean and 95 % interval over seeds, null where a seed's curve does not get so far."""
    methods = []
    for method in asked.methods:
        read = [[gold_at(*curve, at=kl) for kl in asked.at] for curve in curves[method]]
        points: list[list[float | None]] = []
        for numbers in zip(*read):
            all_there = all(number is not None for number in numbers)
            points.append(list(diagnostics.mean_interval(list(numbers))) if all_there else [None, None, None])
        seeds = [{"kl": kl.tolist(), "gold": gold.tolist()} for kl, gold in curves[method]]
        methods.append({"method": method, "at": list(asked.at), "gold": points, "runs": seeds})
    return {"methods": methods}


def gold_at(kl: np.ndarray, gold: np.ndarray, *, at: float, width: float = 0.35) -> float | None:
    """A run's gold utility where its KL is ``at``: a local line through the points near it, in the root of the KL.

    Nearness is weighed by a bell of ``width`` root nats. None where the run has not been as far.
    """
    x, goal = np.sqrt(np.maximum(kl, 0.0)), at**0.5
    if len(x) < 2 or x.max() < goal or x.min() > goal:
        return None
    weight = np.exp(-0.5 * ((x - goal) / width) ** 2)
    slope = np.cov(x, gold, aweights=weight)
    mean_x, mean_y = np.average(x, weights=weight), np.average(gold, weights=weight)
    tilt = slope[0, 1] / slope[0, 0] if slope[0, 0] > 1e-12 else 0.0
    return float(mean_y + tilt * (goal - mean_x))


def _short(preset: settings.Settings) -> settings.Settings:
    """Twenty runs are made shorter, with less to hold them back, so that they still go some way from the SFT model."""
    if preset.preset != "default":
        return preset
    return dataclasses.replace(preset, ppo=dataclasses.replace(preset.ppo, iterations=18, kl_coef=0.03))


def parse(arguments: list[str]) -> Compare:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = command_line.parse(Compare, arguments, prog="compare.py", doc=__doc__, adjust=_short)
    if asked.data.path is not None:
        raise settings.SettingError("--data.path has no gold utility to compare methods by; leave it out")
    for name, least in (("seeds", 1), ("group", 2), ("rounds", 1)):
        if getattr(asked, name) < least:
            raise settings.SettingError(f"--{name} is {getattr(asked, name)}; it must be at least {least}")
    if asked.ppo.batch % asked.group:
        raise settings.SettingError(f"--group is {asked.group}; it must divide --ppo.batch {asked.ppo.batch}")
    mesh_settings.divides(
        asked.mesh, f"--ppo.batch {asked.ppo.batch} by --group {asked.group}", asked.ppo.batch // asked.group
    )
    if not asked.methods or not asked.at or min(asked.at) < 0:
        raise settings.SettingError("--methods and --at must name something, and --at nothing below 0")
    return asked


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command_line.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
