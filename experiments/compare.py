"""Compares PPO, PPO-ptx, RLOO, GRPO, expert iteration and best-of-n at equal KL, over several seeds.

    python experiments/compare.py                                 six methods with five seeds each
    python experiments/compare.py --methods ppo rloo --seeds 3
    python experiments/compare.py --preset smoke                  all runs within two minutes, too short to learn much
    python experiments/compare.py --resume runs/NAME              resume an interrupted comparison

All methods start from the same SFT model and use the same reward model. Each trained method samples the same number of
answers and takes the same number of optimiser steps; PPO and PPO-ptx answer each prompt once, the others --group times.
During training, each policy answers the same held-out prompts several times, which gives a curve of gold utility
against KL to the SFT model. The curves are compared at the KLs of --at. GRPO penalises the KL in the loss, as
published, with --ppo.kl-loss-coef; the other RL methods penalise it in the reward, with --ppo.kl-coef. The learning
rate of expert iteration is a quarter of --sft.learning-rate. Best-of-n trains nothing, but samples n answers to each
held-out prompt. Its KL is measured, because repeated answers make it lower than log n - (n - 1) / n. The flags of
instructgpt.py are accepted too, except those without effect, such as --ppo.method and --on-alarm.

The run folder contains compare.json, compare.html with the figure, config.json, metrics.jsonl, tensorboard/ and
checkpoints/.

The comparison takes about 12 minutes and 2 GB on two CPU cores. docs/methods.md has the results.
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
    """Number of rounds of expert iteration. All rounds together sample as many answers as PPO and take as many
    optimiser steps."""


def parse(arguments: list[str]) -> Compare:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(Compare, arguments, doc=__doc__, adjust=_shorten, unused=_unused, runs=_runs)
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
    prompts = ppo.iterations * ppo.batch // settings.group
    require(settings.rounds <= prompts, settings, "rounds", f"at most {prompts}, the number of prompts")
    if not settings.methods:
        raise SettingError("--methods is empty; give at least one method")
    if not settings.at or min(settings.at) < 0:
        raise SettingError(f"--at is {settings.at}; give KLs of at least 0")
    return settings


def ppo_settings(settings: Compare, method: Method) -> PPO:
    """Returns the PPO settings of a method. Batch, learning rates and iterations are the same for all methods.

    Only GRPO has a KL in the loss.
    """
    if method == "grpo":
        return dataclasses.replace(settings.ppo, method="grpo", samples=settings.group)
    ppo = dataclasses.replace(settings.ppo, method="ppo", samples=1, kl_loss_coef=None)
    return dataclasses.replace(ppo, method="rloo", samples=settings.group) if method == "rloo" else ppo


def _runs(settings: Compare) -> list[PPO]:
    return [ppo_settings(settings, method) for method in RL_METHODS if method in settings.methods]


def _unused(settings: Compare) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the methods to compare, and why."""
    methods = set(settings.methods)
    chosen = f"with --methods {' '.join(settings.methods)}"
    rl = _runs(settings)
    yield ("ppo.method", "ppo.samples"), "on compare.py; use --methods and --group"
    yield ("ppo.both_kl_terms",), "on compare.py, where only grpo has a KL in the loss"
    yield ("on_alarm",), "on compare.py, which raises no alarms"
    yield ("hosts",), "on compare.py, which runs on a single host"
    yield _EVALUATED_ELSEWHERE, "on compare.py, which only samples answers and computes their gold utility"
    if rl:
        why = f"{chosen}, none of which has a pretraining loss"
        yield from setting_checks.unused_ppo(rl, ptx="ppo-ptx" in methods, why=why)
    else:
        names = [field.name for field in dataclasses.fields(PPO) if field.name not in _USED_WITHOUT_RL]
        why = f"{chosen}, which includes no RL method"
        if "expert-iteration" in methods:
            yield ("ppo.learning_rate",), f"{why}; set --sft.learning-rate, of which expert iteration uses a quarter"
        yield [f"ppo.{name}" for name in names], why
    for names, users in _USERS:
        if not methods & set(users):
            yield names, f"{chosen}, because it is a setting of {', '.join(users)}"


RL_METHODS: tuple[Method, ...] = ("ppo", "ppo-ptx", "rloo", "grpo")
_EVALUATED_ELSEWHERE = [f"evaluation.{name}" for name in ("best_of", "best_of_prompts", "skills")]
_EVALUATED_ELSEWHERE += ["evaluation.pretraining_rows", "evaluation.transcripts"]
_USED_WITHOUT_RL = ("iterations", "batch", "minibatches", "epochs", "temperature")
"""--ppo settings that apply without RL, since expert iteration takes as many optimiser steps as RL."""
_USERS = (
    (("group",), ("rloo", "grpo", "expert-iteration")),
    (("rounds",), ("expert-iteration",)),
    (("ppo.epochs",), (*RL_METHODS, "expert-iteration")),
    (("ppo.kl_loss_coef",), ("grpo",)),
)
"""Settings of some methods only."""


def _shorten(preset: Settings) -> Settings:
    """Shortens the runs of the default preset so that they still reach large KLs.

    The KL coefficient is lower, and no method averages its weights, because expert iteration does not.
    """
    if preset.preset != "default":
        return preset
    ppo = dataclasses.replace(preset.ppo, iterations=18, kl_coef=0.03, ema=0.0)
    return dataclasses.replace(preset, ppo=ppo, evaluation=dataclasses.replace(preset.evaluation, prompts=512))


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()


import jax
import numpy as np
from launch import entry_point, run_folder
from recipe import jobs, policy_sampling, precompile, run_setup
from rich.console import Console
from sweeps import expert_iteration, frontier_plot, run_grid

from rlhf_jax import diagnostics, metrics

Curve = tuple[np.ndarray, np.ndarray]
"""KL and gold utility on the held-out prompts: of a run at several iterations or rounds or, for best-of-n, at each n.
The first point is the SFT model."""
TIMES = 6
"""Number of times that a run is evaluated, not counting the SFT model."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""The values of n in best-of-n."""
POOL = 80
"""Minimum number of answers per prompt, over all seeds, from which the KL of best-of-n is measured."""


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
    weights = [(cell.name, 1.4 * settings.ppo.iterations) for cell in cells]
    weights += [("expert-iteration", 20.0 * settings.seeds), ("best-of-n", 12.0 * settings.seeds)]
    curves: dict[str, list[Curve]] = {}
    best_of_n: dict[str, Any] = {}
    with run_setup.open_run(settings, out, weights=weights) as (folder, job):
        # PPO and PPO-ptx have the same settings and thus share one compiled program.
        jobs_by_settings = {ppo: run_grid.with_settings(job, ppo) for ppo in dict.fromkeys(c.settings for c in cells)}
        with precompile.in_background(job, {cell.name: jobs_by_settings[cell.settings] for cell in cells}):
            models = run_grid.prepare(job)
            for cell in cells:
                run_grid.train(job, models, cell, step=jobs_by_settings[cell.settings].ppo_step, times=TIMES)
        start = [
            run_grid.sample_answers(job, models, job.task.eval_prompts, models.start, seed=seed)
            for seed in range(settings.seeds)
        ]
        if "expert-iteration" in settings.methods:
            curves["expert-iteration"] = _expert_iteration(job, models, settings)
        if "best-of-n" in settings.methods:
            curves["best-of-n"], best_of_n = _best_of_n(job, models, settings)
        sft = _over_prompts(job.task.eval_prompts.asked_B, [np.asarray(answers.gold.total) for answers in start])
    rows = metrics.read(folder.path)
    for method, method_cells in cells_by_method.items():
        curves[method] = [_logged_curve(rows, cell.name) for cell in method_cells]
    for method in curves:
        if method != "best-of-n":  # whose first point is n = 1
            golds = [float(np.mean(answers.gold.total)) for answers in start]
            curves[method] = [_from_start(curve, gold) for curve, gold in zip(curves[method], golds, strict=True)]
    results = summarise(settings, curves) | {
        "sft_gold": sft,
        "held_out_prompts": len(start[0].kl_B),
        "best_of_n": best_of_n,
        "seconds": folder.elapsed.total,
    }
    results = run_folder.finite(results)
    note = caption(results, seeds=settings.seeds)
    frontier_plot.write_methods(
        folder.path / "compare.html", results["methods"], title="Gold utility at equal KL", note=note
    )
    folder.write_json("compare.json", results)
    out.print(frontier_plot.methods_table(results["methods"], settings.at))
    out.print(frontier_plot.costs_table(results["methods"]))
    run_setup.print_line(out, note)
    run_setup.print_line(out, f"figure: {folder.path / 'compare.html'}   results: {folder.path / 'compare.json'}")
    return results


def costs(settings: Compare, method: Method) -> dict[str, Any]:
    """Returns what a method uses: answers, prompts and optimiser steps in training, and samples per answer afterwards.

    PPO-ptx also trains on ``text_rows`` rows of pretraining text.
    """
    ppo = settings.ppo
    steps = ppo.iterations * ppo.epochs * ppo.minibatches
    prompts = ppo.iterations * ppo.batch // (1 if method in ("ppo", "ppo-ptx") else settings.group)
    if method == "best-of-n":
        return {"answers": 0, "prompts": 0, "steps": 0, "text_rows": 0, "samples_per_answer": f"1–{SIZES[-1]}"}
    if method == "expert-iteration":
        prompts -= prompts % settings.rounds
        steps = _steps_per_round(settings) * settings.rounds
    return {
        "answers": prompts * (1 if method in ("ppo", "ppo-ptx") else settings.group),
        "prompts": prompts,
        "steps": steps,
        "text_rows": steps * round(ppo.batch // ppo.minibatches * ppo.ptx_ratio) if method == "ppo-ptx" else 0,
        "samples_per_answer": "1",
    }


def caption(results: dict[str, Any], *, seeds: int) -> str:
    """Returns the sentences that describe the table and its intervals."""
    text = (
        f"All methods share the SFT model, the reward model and its labels, and answer the same "
        f"{results['held_out_prompts']} held-out prompts. Means and 95 % intervals are over seeds ({seeds} "
        "per method). They cover the sampling and the batch order of training, and the sampling of the "
        "evaluation, but not the choice of the prompts, which is shared by all methods: for the SFT model, the "
        "gold utility is "
        f"{frontier_plot.interval_text(results['sft_gold'])} over prompts."
    )
    if results["best_of_n"]:
        last = {name: values[-1] for name, values in results["best_of_n"].items()}
        text += (
            f" The KL of best-of-{last['n']} is {last['kl']:.3f} nats, measured from {last['pool']} answers per "
            f"prompt; the formula for answers that never repeat gives {last['kl_bound']:.3f}."
        )
    return text


def _over_prompts(asked_B: np.ndarray, gold_SB: list[np.ndarray]) -> list[float]:
    """Returns the mean of the seeds' gold utilities with an interval clustered by what the prompts ask."""
    return list(diagnostics.clustered_mean(np.mean(gold_SB, axis=0), asked_B.tolist()))


def _logged_curve(rows: list[dict[str, Any]], stage: str) -> Curve:
    kl, gold = (run_grid.MEASURED[name] for name in ("kl", "gold"))
    own = [row for row in rows if row["stage"] == stage and kl in row]
    return np.array([row[kl] for row in own]), np.array([row[gold] for row in own])


def _from_start(curve: Curve, gold: float) -> Curve:
    """Returns the curve with the SFT model as the first point."""
    return np.concatenate([[0.0], curve[0]]), np.concatenate([[gold], curve[1]])


def _steps_per_round(settings: Compare) -> int:
    ppo = settings.ppo
    return max(1, ppo.iterations * ppo.epochs * ppo.minibatches // settings.rounds)


def _expert_iteration(job: jobs.Job, models: run_grid.StartModels, settings: Compare) -> list[Curve]:
    job.progress.start("expert-iteration", settings.seeds)
    curves = []
    for seed in range(settings.seeds):

        def measure(policy: Any, seed: int = seed) -> dict[str, float]:
            prompts = job.task.eval_prompts
            return run_grid.answer_means(run_grid.sample_answers(job, models, prompts, policy, seed=seed))

        _, rounds = expert_iteration.train(
            job,
            models,
            job.task.rl_prompts.take(costs(settings, "expert-iteration")["prompts"]),
            name=f"expert-seed{seed}",
            seed=seed,
            rounds=settings.rounds,
            samples=settings.group,
            steps=_steps_per_round(settings),
            learning_rate=settings.sft.learning_rate / 4,
            measure=measure,
        )
        kl, gold = (np.array([each[name] for each in rounds]) for name in ("kl", "gold"))
        curves.append((kl, gold))
        job.progress.update("expert-iteration", seed + 1, settings.seeds)
    job.progress.finish("expert-iteration")
    return curves


def _best_of_n(
    job: jobs.Job, models: run_grid.StartModels, settings: Compare
) -> tuple[list[Curve], dict[str, list[Any]]]:
    """Returns the curve of each seed, and the KL at each n, which is measured from the answers of all seeds."""
    job.progress.start("best-of-n", settings.seeds)
    N, samples = len(job.task.eval_prompts), max(SIZES[-1], -(-POOL // settings.seeds))
    prompts = job.task.eval_prompts.at(np.repeat(np.arange(N), samples))
    golds, pools = [], []
    for seed in range(settings.seeds):
        pool = run_grid.sample_answers(job, models, prompts, models.start, seed=1000 + seed)
        scores_NK, gold_NK = pool.scores_B.reshape(N, -1), np.asarray(pool.gold.total).reshape(N, -1)
        pairs = zip(scores_NK, gold_NK, strict=True)
        golds.append(np.mean([diagnostics.best_of_n_mean(scores, gold, SIZES) for scores, gold in pairs], axis=0))
        pools.append(jax.tree.map(lambda x: x.reshape(N, samples, *x.shape[1:]), pool))
        job.progress.update("best-of-n", seed + 1, settings.seeds)
    together = jax.tree.map(lambda *x: np.concatenate(x, axis=1).reshape(-1, *x[0].shape[2:]), *pools)
    pool_size = settings.seeds * samples
    kl = policy_sampling.best_of_kl(together, pool_size, SIZES)
    job.progress.finish("best-of-n")
    measured = {
        "n": list(SIZES),
        "kl": kl,
        "kl_bound": diagnostics.best_of_n_kl(SIZES).tolist(),
        "pool": [pool_size] * len(SIZES),
    }
    return [(np.array(kl), gold) for gold in golds], measured


def summarise(settings: Compare, curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Returns the mean gold utility of each method at the KLs of --at, with 95 % intervals over seeds.

    A value is None if the curve of any seed does not reach the KL.
    """
    methods = []
    for method in settings.methods:
        # The curve of best-of-n has no noise of training, and it bends too much for a regression.
        width = None if method == "best-of-n" else 0.5
        gold_by_seed = [[gold_at(*curve, at=kl, width=width) for kl in settings.at] for curve in curves[method]]
        points: list[list[float | None]] = []
        for gold in zip(*gold_by_seed, strict=True):
            reached = all(value is not None for value in gold)
            points.append(list(diagnostics.mean_interval(list(gold))) if reached else [None, None, None])
        runs = [{"kl": kl.tolist(), "gold": gold.tolist()} for kl, gold in curves[method]]
        each = {"method": method, "at": list(settings.at), "gold": points, "runs": runs}
        methods.append(each | costs(settings, method))
    return {"methods": methods}


def gold_at(kl: np.ndarray, gold: np.ndarray, *, at: float, width: float | None = 0.5) -> float | None:
    """Estimates a run's gold utility at the KL ``at`` by local quadratic regression in √KL.

    The weights of the points are Gaussian with standard deviation ``width`` in √KL; None interpolates linearly between
    the points instead. Returns None if ``at`` is outside the range of the run's KLs or the run has only one point.
    """
    x, target = np.sqrt(np.maximum(kl, 0.0)), at**0.5
    if len(x) < 2 or x.max() < target or x.min() > target:
        return None
    if width is None:
        return float(np.interp(target, x, gold))
    weights = np.exp(-0.25 * ((x - target) / width) ** 2)  # np.polyfit squares them
    return float(np.polyfit(x - target, gold, min(2, len(np.unique(x)) - 1), w=weights)[-1])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
