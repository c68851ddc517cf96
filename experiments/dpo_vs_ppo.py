"""Compares DPO and PPO at equal KL and on out-of-distribution pairs (Xu et al. 2024, Rafailov et al. 2023).

    python experiments/dpo_vs_ppo.py                       all three parts
    python experiments/dpo_vs_ppo.py --parts bandit exact  only the parts whose KL and rewards are exact
    python experiments/dpo_vs_ppo.py --preset smoke        all parts; the first is too short to learn much
    python experiments/dpo_vs_ppo.py --resume runs/NAME    resume an interrupted study

The study has three parts:

    world    Policies are trained in the built-in world from one SFT model, with DPO and iterated DPO at several betas
             and PPO at several KL coefficients. In iterated DPO, a reward model labels the pairs. DPO and the reward
             model of PPO are also trained on shifted pairs, which are comparisons of base-model answers that the SFT
             model rarely samples.
    bandit   The same methods are compared on a table of rewards, for which the KL, the expected reward and the optimum
             are computed exactly.
    exact    DPO and PPO are trained on the three-answer example of Xu's theorem 4.1.

The settings of instructgpt.py apply here too, but some that have no effect, such as --on-alarm, are refused. In the
world, all seeds share the prompts, comparisons and reward models, so the intervals reflect only sampling and batch
order. On the bandit, each seed draws new labels. The run folder contains study.json, study.html with the figures,
config.json, metrics.jsonl, tensorboard/, checkpoints/ and reference/.

The study takes 17 minutes and 2.2 GB on two CPU cores. The expected results are:

    world    PPO reaches a gold utility of 0.90 at a KL of 1 to 1.6 nats. At 1.5 nats, its gold utility is 0.035 ±0.020
             above that of DPO, whose seeds vary widely. Shifted pairs reduce the gold utility of DPO by about 0.05
             ±0.07 and that of PPO by 0.10 ±0.01. Unlike in Xu et al., a reward model trained only on answers from the
             base model misleads PPO too.
    bandit   At 1 nat, the expected reward of PPO is 0.15 ±0.05 above that of DPO, over ten draws of 400 labels. The
             effect of shifted pairs is not significant.
    exact    The answer that appears in no pair has a probability of 0.99 with DPO and 0.0001 with PPO.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from launch import command_line, process_setup
from launch import settings as settings_lib
from launch.setting_checks import require
from preferences import direct_settings

Part = Literal["world", "bandit", "exact"]
SHIFTED = "shifted pairs"


@dataclasses.dataclass(frozen=True)
class StudySettings(direct_settings.DirectSettings, settings_lib.Settings):
    """Settings of dpo_vs_ppo.py, in addition to those of instructgpt.py and of DPO."""

    command: ClassVar[str] = "dpo_vs_ppo"

    parts: tuple[Part, ...] = ("world", "bandit", "exact")
    """Parts of the study to run."""
    seeds: int = 3
    """Number of runs per method and coefficient in the world."""
    betas: tuple[float, ...] = (0.05, 0.15, 0.5)
    """Betas of DPO. Shifted pairs use only the middle one."""
    kl_coefs: tuple[float, ...] = (0.02, 0.06, 0.2)
    """KL coefficients of PPO. Shifted pairs use only the middle one."""
    at: tuple[float, ...] = (0.5, 1.0, 1.5)
    """KLs, in nats, at which methods are compared. Gold utilities are interpolated between coefficients."""
    rounds: int = 3
    """Number of rounds of iterated DPO. Beta is multiplied by this number, so that all rounds together move the policy
    as far as one pass of DPO. The rounds together use at most as many prompts as DPO has pairs."""
    bandit_seeds: int = 10
    """Number of draws of labels on the bandit."""
    bandit_coefs: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0)
    """Betas of DPO and KL coefficients of PPO on the bandit, whose rewards have standard deviation 1."""
    bandit_pairs: int = 400
    """Number of labels per draw on the bandit, which has 8 prompts with 8 answers each."""


def parse(arguments: list[str]) -> StudySettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(StudySettings, arguments, doc=__doc__, adjust=_adjust_preset)
    direct_settings.check(settings)
    if settings.loss != "dpo":
        raise settings_lib.SettingError(f"--loss is {settings.loss!r}, but this study only runs dpo; leave it out")
    direct_settings.refuse_unread(
        settings, ("ppo.kl_coef", "ppo.ptx_coef", "reward_model.heldout", "on_alarm"), program="dpo_vs_ppo.py"
    )
    for name in ("seeds", "rounds", "bandit_seeds", "bandit_pairs"):
        require(getattr(settings, name) >= 1, settings, name, "at least 1")
    if settings.rounds > settings.bandit_pairs:
        raise settings_lib.SettingError(
            f"--rounds is {settings.rounds}; it must be at most --bandit-pairs {settings.bandit_pairs}"
        )
    for name in ("betas", "kl_coefs", "bandit_coefs", "at"):
        values = getattr(settings, name)
        distinct = len(set(values)) == len(values)
        require(bool(values) and min(values) > 0 and distinct, settings, name, "one or more distinct values above 0")
    if not settings.parts:
        raise settings_lib.SettingError("--parts is empty; give at least one of world, bandit and exact")
    if "world" in settings.parts and settings.data.path is not None:
        raise settings_lib.SettingError(
            "--data.path cannot be used with --parts world, which requires a gold utility; leave out one of the two"
        )
    if settings.beta is not None:
        raise settings_lib.SettingError(f"--beta is {settings.beta}, but this study uses --betas; leave it out")
    return settings


def _adjust_preset(preset: settings_lib.Settings) -> settings_lib.Settings:
    """Shortens PPO in the default preset, since the study runs it many times."""
    if preset.preset != "default":
        return preset
    return dataclasses.replace(preset, ppo=dataclasses.replace(preset.ppo, iterations=18))


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib
import time

import numpy as np
from launch import entry_point, run_folder
from preferences import bandit_study, direct_alignment, three_actions
from preferences import pairs as pairs_lib
from recipe import comparison_data, jobs, run_setup, stages
from rich import box
from rich.console import Console
from rich.table import Table
from sweeps import frontier_plot, run_grid

from rlhf_jax import diagnostics


def run(settings: StudySettings) -> dict[str, Any]:
    """Runs the study and returns the contents of study.json."""
    out, kind = Console(), "dpo-vs-ppo"
    results: dict[str, Any] = {}
    figures = []

    def show(part: str, title: str, *, xlabel: str, ylabel: str) -> None:
        figures.append(frontier_plot.frontier(results[part]["lines"], xlabel=xlabel, ylabel=ylabel))
        out.print(_lines_table(results[part]["lines"], title))
        for name, effect in results[part]["effects"].items():
            out.print(f"{name}: {frontier_plot.interval_text(effect)}", soft_wrap=True, highlight=False)

    if "world" in settings.parts:
        with run_setup.open_run(settings, out, kind=kind, weights=_weights(settings)) as (folder, job):
            results["world"] = _run_world(settings, job, folder)
        xlabel = "Built-in world: √KL to the SFT model, nats per sequence"
        show("world", "built-in world: gold utility and KL of each coefficient", xlabel=xlabel, ylabel="Gold utility")
    elif settings.resume:
        folder = run_folder.RunFolder(pathlib.Path(settings.resume))
    else:
        folder = run_folder.create(run_folder.free_path(settings, kind=kind), settings)
    if "exact" in settings.parts:
        results["exact"] = _run_exact()
        out.print(_exact_table(results["exact"]))
    if "bandit" in settings.parts:
        results["bandit"] = _run_bandit(settings)
        title = "bandit: expected reward and KL of each coefficient"
        show("bandit", title, xlabel="Bandit: √KL (exact), nats", ylabel="Expected reward (exact)")
    folder.log.close()
    results = run_folder.finite(results | {"seconds": time.time() - process_setup.START_TIME})
    note = (
        "Each line connects the coefficients of a method. Points are means over seeds, with 95 % intervals. Hollow "
        "markers show shifted pairs."
    )
    if "exact" in results:
        note += " " + _exact_sentence(results["exact"])
    frontier_plot.write_page(folder.path / "study.html", "DPO and PPO", figures, note)
    folder.write_json("study.json", results)
    run_setup.print_line(out, f"figures: {folder.path / 'study.html'}   results: {folder.path / 'study.json'}")
    return results


OPTIMUM = "optimum of reward less KL"


def _run_exact() -> dict[str, Any]:
    """Returns each policy's probabilities of the three answers and its DPO loss."""
    beta = 0.1
    policies = {
        "reference": three_actions.REFERENCE,
        "DPO": three_actions.train_dpo(beta=beta)[0],
        "PPO": three_actions.train_ppo(kl_coef=beta),
        OPTIMUM: three_actions.optimum(kl_coef=beta),
        "(0.1, 0, 0.9)": (0.1, 0.0, 0.9),
    }
    return {
        name: {"probabilities": [float(p) for p in policy], "dpo_loss": three_actions.loss(policy, beta=beta)}
        for name, policy in policies.items()
    }


def _exact_sentence(policies: dict[str, Any]) -> str:
    unseen = {name: policy["probabilities"][2] for name, policy in policies.items()}
    return (
        f"In the three-answer example, the probability of the unseen answer is {unseen['DPO']:.3f} after DPO, "
        f"{unseen['PPO']:.4f} after PPO and {unseen[OPTIMUM]:.1e} at the optimum."
    )


def _new_table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _exact_table(policies: dict[str, Any]) -> Table:
    """Returns a table of the part ``exact``, with one row per policy."""
    table = _new_table("three answers, the third unseen", "policy", "better", "worse", "unseen", "DPO loss")
    for name, policy in policies.items():
        table.add_row(name, *(f"{p:.4g}" for p in policy["probabilities"]), f"{policy['dpo_loss']:.4f}")
    return table


def _run_bandit(settings: StudySettings) -> dict[str, Any]:
    """Returns the lines of the bandit's figure and the `effects` on the bandit."""
    coefs = settings.bandit_coefs
    results = bandit_study.run(
        coefs=coefs, seeds=settings.bandit_seeds, pairs=settings.bandit_pairs, rounds=settings.rounds
    )
    runs = {method: dict(zip(coefs, rows)) for method, rows in results.items()}
    middle = {"DPO": _middle(coefs), "PPO": _middle(coefs)}
    return {"lines": [_line(*each) for each in runs.items()], "effects": effects(runs, middle, settings.at)}


def _world_methods(settings: StudySettings) -> list[tuple[str, tuple[float, ...]]]:
    """Returns the methods that are compared in the built-in world, with their coefficients."""
    betas, kl_coefs = settings.betas, settings.kl_coefs
    dpo = [("DPO", betas), (f"DPO, {SHIFTED}", (_middle(betas),)), ("iterated DPO", betas)]
    return [*dpo, ("PPO", kl_coefs), (f"PPO, {SHIFTED}", (_middle(kl_coefs),))]


def _weights(settings: StudySettings) -> list[tuple[str, float]]:
    """Returns the stages with their expected durations in seconds."""
    weights = [("reward_model-shifted", 20.0)]
    for method, coefs in _world_methods(settings):
        names = [_run_name(method, coef, seed) for coef in coefs for seed in range(settings.seeds)]
        if method == "iterated DPO":
            weights += [(f"{name}-round{r}", 4.0) for name in names for r in range(settings.rounds)]
        else:
            weights += [(name, 16.0 if "PPO" in method else 9.0) for name in names]
    return [*weights, ("evaluate", 60.0)]


def _run_world(settings: StudySettings, job: jobs.Job, folder: run_folder.RunFolder) -> dict[str, Any]:
    """Returns the lines of the world's figure, the `effects` in the world, and the numbers of pairs and prompts."""
    middle = {"DPO": _middle(settings.betas), "PPO": _middle(settings.kl_coefs)}
    shared, policies, pairs = _train_policies(job, settings, folder, _world_methods(settings))
    job.progress.start("evaluate", 1 + len(policies))
    against = run_grid.sample_answers(job, shared, job.task.eval_prompts, shared.sft, seed=0)
    runs: dict[str, dict[float, list[dict[str, float]]]] = {}
    for done, ((method, coef, seed), policy) in enumerate(policies.items()):
        numbers = run_grid.measure(job, shared, job.task.eval_prompts, against, policy, seed=1 + seed)
        runs.setdefault(method, {}).setdefault(coef, []).append(numbers)
        job.progress.update("evaluate", 1 + done, 1 + len(policies))
    job.progress.finish("evaluate")
    lines = [_line(*each) for each in runs.items()]
    return {"lines": lines, "effects": effects(runs, middle, settings.at), "pairs": pairs}


def _train_policies(
    job: jobs.Job, settings: StudySettings, folder: run_folder.RunFolder, methods: Any
) -> tuple[run_grid.StartModels, dict[tuple[str, float, int], Any], dict[str, Any]]:
    """Returns the shared models, the policies by (method, coefficient, seed), and the numbers of pairs and prompts."""
    shared = run_grid.prepare(job)
    base = stages.pretrain(job)
    (own, *_), _, _ = comparison_data.load_or_collect(job, [shared.sft, shared.start])
    (shifted, *_), _, _ = comparison_data.load_or_collect(job, [base], stage="comparisons-shifted")
    reward = stages.train_reward_model(job, shared.start, shifted, stage="reward_model-shifted")
    shared_shifted = shared._replace(reward=stages.normalise_scores(job, reward, shared.start))
    pairs = {
        name: pairs_lib.from_rankings(
            rows, prompt_width=job.task.prompt_width, per_prompt=settings.pairs, seed=settings.seed
        )
        for name, rows in (("own", own), (SHIFTED, shifted))
    }
    trainer = direct_alignment.make_trainer(job, settings, folder.path)
    # A prompt of a round yields at most one pair, so the rounds together have at most as many pairs as DPO.
    prompts = job.task.rl_prompts.take(min(len(pairs["own"]), len(job.task.rl_prompts)))
    if len(prompts) < settings.rounds:
        raise settings_lib.SettingError(
            f"--rounds is {settings.rounds}; it must be at most {len(prompts)}, the number of prompts"
        )
    counts: dict[str, Any] = {name: len(each) for name, each in pairs.items()} | {"prompts of rounds": len(prompts)}
    policies: dict[tuple[str, float, int], Any] = {}
    for method, coef, seed in ((m, c, s) for m, coefs in methods for c in coefs for s in range(settings.seeds)):
        name, data = _run_name(method, coef, seed), SHIFTED if SHIFTED in method else "own"
        if method == "iterated DPO":
            policy, rounds = direct_alignment.iterate(
                trainer,
                shared.start,
                shared.reward,
                prompts,
                judge=pairs_lib.reward_judge,
                name=name,
                seed=seed,
                rounds=settings.rounds,
                samples=4,
                settings=dataclasses.replace(settings, beta=settings.rounds * coef),
            )
            counts[name] = sum(each.pairs for each in rounds)
        elif "DPO" in method:
            policy = trainer.train(
                shared.start,
                pairs[data],
                name=name,
                seed=seed,
                settings=dataclasses.replace(settings, beta=coef),
                reference_file=f"{data.replace(' ', '-')}-sft_mix",
            )
        else:
            cell = run_grid.Cell(name, dataclasses.replace(settings.ppo, kl_coef=coef), seed)
            policy = run_grid.train(job, shared_shifted if data == SHIFTED else shared, cell, step=job.ppo_step)
        policies[method, coef, seed] = policy
    return shared, policies, counts


def _middle(coefs: tuple[float, ...]) -> float:
    return sorted(coefs)[len(coefs) // 2]


def _run_name(method: str, coef: float, seed: int) -> str:
    return f"{method.lower().replace(', ', '-').replace(' ', '-')}-{coef:g}-seed{seed}"


def _line(method: str, runs: dict[float, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the data of a method's line in a figure: its look, points and runs."""
    families = ("PPO", "DPO", "iterated DPO", "optimum")
    return {
        "method": method,
        "look": families.index(method.split(",")[0]),
        "paler": SHIFTED in method,
        "points": [{"coef": coef} | run_grid.mean_over_seeds(each) for coef, each in runs.items()],
        "runs": {f"{coef:g}": each for coef, each in runs.items()},
    }


def effects(
    runs: dict[str, dict[float, list[dict[str, float]]]], middle: dict[str, float], at: tuple[float, ...]
) -> dict[str, list[float]]:
    """Returns differences in gold utility with 95 % intervals over seeds.

    ``runs`` has the numbers of each seed by method and coefficient. Shifted pairs are compared with pairs of SFT
    samples at the ``middle`` coefficients. Methods are compared at the KLs ``at``.
    """

    def gold(method: str) -> list[float]:
        return [numbers["gold"] for numbers in runs[method][middle[method.split(",")[0]]]]

    cost = {name: _difference(gold(name), gold(f"{name}, {SHIFTED}")) for name in ("DPO", "PPO")}
    differences = {f"gold that shifted pairs cost {name}": cost[name] for name in cost}
    differences["what they cost DPO more than PPO"] = _difference(cost["DPO"], cost["PPO"])
    for kl in at:
        for method, other in (("PPO", "DPO"), ("iterated DPO", "DPO")):
            upper, lower = (_gold_at(runs[name], kl) for name in (method, other))
            if upper is not None and lower is not None:
                differences[f"gold of {method} above {other} at a KL of {kl:g}"] = _difference(upper, lower)
    return {name: list(diagnostics.mean_interval(each)) for name, each in differences.items()}


def _gold_at(runs: dict[float, list[dict[str, float]]], kl: float) -> list[float] | None:
    """Returns the gold utility of each seed at a KL, interpolated linearly in √KL between the coefficients.

    Returns None if ``kl`` is outside the range of any seed's KLs.
    """
    golds = []
    for each in zip(*runs.values(), strict=True):
        points = sorted((max(numbers["kl"], 0.0) ** 0.5, numbers["gold"]) for numbers in each)
        x, y = zip(*points)
        if not x[0] <= kl**0.5 <= x[-1]:
            return None
        golds.append(float(np.interp(kl**0.5, x, y)))
    return golds


def _difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _lines_table(lines: list[dict[str, Any]], title: str) -> Table:
    """Returns a table with one row per method and coefficient."""
    table = _new_table(title, "method", "coef", "KL", "gold")
    for line in lines:
        for i, point in enumerate(line["points"]):
            numbers = (frontier_plot.interval_text(point[name]) for name in ("kl", "gold"))
            table.add_row("" if i else line["method"], f"{point['coef']:g}", *numbers)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
