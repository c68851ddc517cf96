"""Compares PPO, PPO-ptx, RLOO, GRPO, expert iteration and best-of-n at equal KL, over several seeds.

    python experiments/compare.py                                 six methods with five seeds each
    python experiments/compare.py --methods ppo rloo --seeds 3
    python experiments/compare.py --preset smoke                  all runs within two minutes, too short to learn much
    python experiments/compare.py --resume runs/NAME              resume an interrupted comparison

All methods start from the same SFT model and use the same reward model. The KL to the SFT model and the gold utility
are measured on the answers sampled in each iteration (in expert iteration, each round). Every seed gives a curve of
gold utility against KL, and the curves are compared at the KLs of --at. GRPO penalises the KL in the loss, as
published, instead of in the reward. Best-of-n trains nothing and is measured on held-out prompts; its KL is
log n - (n - 1) / n. The flags of instructgpt.py are accepted too, except those without effect, such as
--ppo.method and --on-alarm.

The run folder contains compare.json, compare.html with the figure, config.json, metrics.jsonl, tensorboard/ and
checkpoints/.

The comparison takes 14 minutes and 2 GB on two CPU cores. The expected gold utilities, to within about 0.007, are:

    SFT model           0.78
    KL of 1 nat         0.90 for best-of-n, 0.88 for expert iteration, 0.87 for RLOO, PPO and PPO-ptx, 0.86 for GRPO
    KL of 2 nats        0.89 for expert iteration, RLOO, PPO and PPO-ptx, 0.88 for GRPO
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import command_line, mesh_settings, process_setup, setting_checks
from launch.setting_checks import require, require_divides
from launch.settings import PPO, SettingError, Settings

Method = Literal["ppo", "ppo-ptx", "rloo", "grpo", "expert-iteration", "best-of-n"]
METHODS: tuple[Method, ...] = ("ppo", "ppo-ptx", "rloo", "grpo", "expert-iteration", "best-of-n")


@dataclasses.dataclass(frozen=True)
class Compare(Settings):
    """Settings of compare.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "compare"

    methods: tuple[Method, ...] = METHODS
    """Methods to compare."""
    seeds: int = 5
    """Number of runs of each method. They share data and initial models; sampling and minibatches are seeded
    separately."""
    at: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """KLs to the SFT model, in nats per answer, at which the gold utilities are compared."""
    group: int = 4
    """Number of answers to each prompt in rloo, grpo and expert iteration (which trains on the best of them)."""
    rounds: int = 4
    """Number of rounds of expert iteration. All rounds together use half of the prompts that PPO uses."""


def parse(arguments: list[str]) -> Compare:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(Compare, arguments, doc=__doc__, adjust=_shorten, unused=_unused)
    if settings.data.path is not None:
        raise SettingError(
            "--data.path is not supported, because the methods are compared by gold utility, which only the built-in "
            "world provides; leave it out"
        )
    for name, least in (("seeds", 1), ("group", 2), ("rounds", 1)):
        require(getattr(settings, name) >= least, settings, name, f"at least {least}")
    ppo = settings.ppo
    require_divides(settings, "group", ppo.batch, f"--ppo.batch {ppo.batch}")
    prompts = f"--ppo.batch {ppo.batch} divided by --group {settings.group}"
    mesh_settings.check_divides(settings.mesh, prompts, ppo.batch // settings.group)
    if not settings.methods:
        raise SettingError("--methods is empty; give at least one method")
    if not settings.at or min(settings.at) < 0:
        raise SettingError(f"--at is {settings.at}; give KLs of at least 0")
    return settings


def ppo_settings(settings: Compare, method: Method) -> PPO:
    """Returns the PPO settings of a method. Batch, learning rates and iterations are the same for all methods."""
    ppo = dataclasses.replace(settings.ppo, method="ppo", samples=1)
    if method == "rloo":
        return dataclasses.replace(ppo, method="rloo", samples=settings.group)
    if method == "grpo":
        return dataclasses.replace(ppo, method="grpo", samples=settings.group)
    return ppo


def _unused(settings: Compare) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the methods to compare, and why."""
    methods = set(settings.methods)
    chosen = f"with --methods {' '.join(settings.methods)}"
    rl = [ppo_settings(settings, method) for method in RL_METHODS if method in methods]
    yield ("ppo.method", "ppo.samples"), "on compare.py; use --methods and --group"
    yield ("on_alarm",), "on compare.py, which raises no alarms"
    yield ("hosts",), "on compare.py, which runs on a single host"
    yield _EVALUATED_ELSEWHERE, "on compare.py, which only samples answers and computes their gold utility"
    if rl:
        why = f"{chosen}, none of which has a pretraining loss"
        yield from setting_checks.unused_ppo(rl, ptx="ppo-ptx" in methods, why=why)
    else:
        names = [field.name for field in dataclasses.fields(PPO) if field.name not in _USED_WITHOUT_RL]
        yield [f"ppo.{name}" for name in names], f"{chosen}, which includes no RL method"
    for names, users in _USERS:
        if not methods & set(users):
            yield names, f"{chosen}; it is a setting of {' and '.join(users)}"


RL_METHODS: tuple[Method, ...] = ("ppo", "ppo-ptx", "rloo", "grpo")
_EVALUATED_ELSEWHERE = [f"evaluation.{name}" for name in ("best_of", "skills", "pretraining_rows", "transcripts")]
_USED_WITHOUT_RL = ("iterations", "batch", "minibatches", "temperature")
"""--ppo settings that apply without RL. ``minibatches`` has no effect then, but it must divide ``batch``."""
_USERS = (
    (("group",), ("rloo", "grpo", "expert-iteration")),
    (("rounds", "evaluation.temperature"), ("expert-iteration",)),
    (("evaluation.prompts",), ("expert-iteration", "best-of-n")),
    (("evaluation.best_of_prompts",), ("best-of-n",)),
)
"""Settings of some methods only."""


def _shorten(preset: Settings) -> Settings:
    """Shortens the runs of the default preset, and lowers the KL coefficient so that they still reach large KLs."""
    if preset.preset != "default":
        return preset
    return dataclasses.replace(preset, ppo=dataclasses.replace(preset.ppo, iterations=18, kl_coef=0.03))


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import time

import jax
import numpy as np
from launch import entry_point, run_folder
from recipe import jobs, precompile, run_setup
from rich.console import Console
from sweeps import expert_iteration, frontier_plot, run_grid

from rlhf_jax import diagnostics, metrics

Curve = tuple[np.ndarray, np.ndarray]
"""KL and gold utility of a run at each iteration or round or, for best-of-n, at each n."""


def run(settings: Compare) -> dict[str, Any]:
    """Runs the comparison and returns the contents of compare.json."""
    out = Console()
    rl_methods: list[Method] = [m for m in settings.methods if m in RL_METHODS]
    cells_by_method: dict[Method, list[run_grid.Cell]] = {
        method: [
            run_grid.Cell(
                f"{method}-seed{seed}",
                ppo_settings(settings, method),
                seed,
                settings.ppo.ptx_coef if method == "ppo-ptx" else 0.0,
            )
            for seed in range(settings.seeds)
        ]
        for method in rl_methods
    }
    cells = [cell for method_cells in cells_by_method.values() for cell in method_cells]
    weights = [(cell.name, 0.9 * settings.ppo.iterations) for cell in cells]
    weights += [("expert-iteration", 20.0 * settings.seeds), ("best-of-n", 5.0 * settings.seeds)]
    curves: dict[str, list[Curve]] = {}
    with run_setup.open_run(settings, out, weights=weights) as (folder, job):
        # PPO and PPO-ptx have the same settings and thus share one compiled program.
        jobs_by_settings = {ppo: run_grid.with_settings(job, ppo) for ppo in dict.fromkeys(c.settings for c in cells)}
        with precompile.in_background(job, {cell.name: jobs_by_settings[cell.settings] for cell in cells}):
            models = run_grid.prepare(job)
            for cell in cells:
                run_grid.train(job, models, cell, step=jobs_by_settings[cell.settings].ppo_step)
        if "expert-iteration" in settings.methods:
            curves["expert-iteration"] = _expert_iteration(job, models, settings)
        if "best-of-n" in settings.methods:
            curves["best-of-n"] = _best_of_n(job, models, settings)
    rows = metrics.read(folder.path)
    for method, method_cells in cells_by_method.items():
        curves[method] = [_logged_curve(rows, cell.name) for cell in method_cells]
    results = summarise(settings, curves) | {"seconds": time.time() - process_setup.START_TIME}
    results = run_folder.finite(results)
    frontier_plot.write_methods(folder.path / "compare.html", results["methods"], title="Gold utility at equal KL")
    folder.write_json("compare.json", results)
    out.print(frontier_plot.methods_table(results["methods"], settings.at))
    run_setup.print_line(out, f"figure: {folder.path / 'compare.html'}   results: {folder.path / 'compare.json'}")
    return results


def _logged_curve(rows: list[dict[str, Any]], stage: str) -> Curve:
    own = [row for row in rows if row["stage"] == stage]
    return tuple(np.array([row[name] for row in own]) for name in ("kl", "gold"))  # type: ignore[return-value]


def _expert_iteration(job: jobs.Job, models: run_grid.StartModels, settings: Compare) -> list[Curve]:
    job.progress.start("expert-iteration", settings.seeds)
    curves = []
    for seed in range(settings.seeds):
        policy, rounds = expert_iteration.train(
            job,
            models,
            job.task.rl_prompts.take(len(job.task.rl_prompts) // 2),
            name=f"expert-seed{seed}",
            seed=seed,
            rounds=settings.rounds,
            samples=settings.group,
            epochs=2,
            learning_rate=settings.sft.learning_rate / 4,
        )
        last = run_grid.sample_answers(job, models, job.task.eval_prompts, policy, seed=seed)
        kl = np.array([r.kl for r in rounds] + [float(np.mean(last.kl_B))])
        gold = np.array([r.gold for r in rounds] + [float(np.mean(last.gold.total))])
        curves.append((kl, gold))
        job.progress.update("expert-iteration", seed + 1, settings.seeds)
    job.progress.finish("expert-iteration")
    return curves


def _best_of_n(job: jobs.Job, models: run_grid.StartModels, settings: Compare) -> list[Curve]:
    job.progress.start("best-of-n", settings.seeds)
    N, sizes = min(settings.evaluation.best_of_prompts, len(job.task.eval_prompts)), [1, 2, 4, 8, 16]
    prompts = job.task.eval_prompts.take(N).at(np.repeat(np.arange(N), sizes[-1]))
    kl, curves = np.array([diagnostics.best_of_n_kl(n) for n in sizes]), []
    for seed in range(settings.seeds):
        key = jax.random.fold_in(job.key("evaluate"), 1000 + seed)
        pool = job.sampler(models.start, models.start, models.reward, prompts, key)
        pairs = zip(pool.scores_B.reshape(N, -1), np.asarray(pool.gold.total).reshape(N, -1), strict=True)
        gold = np.mean([diagnostics.best_of_n_mean(scores, utility, sizes) for scores, utility in pairs], axis=0)
        curves.append((kl, gold))
        job.progress.update("best-of-n", seed + 1, settings.seeds)
    job.progress.finish("best-of-n")
    return curves


def summarise(settings: Compare, curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Returns the mean gold utility of each method at the KLs of --at, with 95 % intervals over seeds.

    A value is None if the curve of any seed does not reach the KL.
    """
    methods = []
    for method in settings.methods:
        gold_by_seed = [[gold_at(*curve, at=kl) for kl in settings.at] for curve in curves[method]]
        points: list[list[float | None]] = []
        for gold in zip(*gold_by_seed, strict=True):
            reached = all(value is not None for value in gold)
            points.append(list(diagnostics.mean_interval(list(gold))) if reached else [None, None, None])
        runs = [{"kl": kl.tolist(), "gold": gold.tolist()} for kl, gold in curves[method]]
        methods.append({"method": method, "at": list(settings.at), "gold": points, "runs": runs})
    return {"methods": methods}


def gold_at(kl: np.ndarray, gold: np.ndarray, *, at: float, width: float = 0.35) -> float | None:
    """Estimates a run's gold utility at the KL ``at`` by local linear regression in √KL.

    The weights of the points are Gaussian with standard deviation ``width`` in √KL. Returns None if ``at`` is outside
    the range of the run's KLs or the run has only one point.
    """
    x, target = np.sqrt(np.maximum(kl, 0.0)), at**0.5
    if len(x) < 2 or x.max() < target or x.min() > target:
        return None
    weight = np.exp(-0.5 * ((x - target) / width) ** 2)
    covariance = np.cov(x, gold, aweights=weight)
    mean_x, mean_gold = np.average(x, weights=weight), np.average(gold, weights=weight)
    slope = covariance[0, 1] / covariance[0, 0] if covariance[0, 0] > 1e-12 else 0.0
    return float(mean_gold + slope * (target - mean_x))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
