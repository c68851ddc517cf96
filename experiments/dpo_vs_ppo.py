"""Compares DPO and PPO at equal KL and on out-of-distribution pairs (Xu et al. 2024, Rafailov et al. 2023).

    python experiments/dpo_vs_ppo.py                       all three parts
    python experiments/dpo_vs_ppo.py --parts bandit exact  only the parts whose KL and rewards are exact
    python experiments/dpo_vs_ppo.py --preset smoke        all parts; the first is too short to learn much
    python experiments/dpo_vs_ppo.py --resume runs/NAME    resume an interrupted study

The study has three parts:

    world    Policies are trained in the built-in world from one SFT model, with DPO and iterated DPO at several betas
             and PPO at several KL coefficients. DPO is trained on the comparisons of the reward model, with all pairs
             of a prompt in one batch element, as the reward model is. In iterated DPO, the reward model labels the
             pairs, and as many answers are sampled as in PPO. DPO and the reward model of PPO are also trained on
             shifted pairs, which are comparisons of base-model answers that the SFT model rarely samples.
    bandit   The same methods are compared on a table of rewards, for which the KL, the expected reward and the optimum
             are computed exactly.
    exact    DPO and PPO are trained on the three-answer example of Xu's theorem 4.1.

The settings of instructgpt.py apply here too, except those without effect, such as --on-alarm. In the
world, all seeds share the prompts, comparisons and reward models, so the intervals reflect only sampling and batch
order. On the bandit, each seed draws new labels. Each part prints the numbers of labels, sampled answers and steps. The
run folder contains study.json, study.html with the figures, config.json, metrics.jsonl, tensorboard/, checkpoints/ and
reference/.

The study takes about 15 minutes and 2.2 GB on two CPU cores. The expected results are:

    bandit   At 1 nat, the expected reward of PPO is 0.15 ±0.05 above that of DPO, over ten draws of 400 labels. The
             effect of shifted pairs is not significant.
    exact    The answer that appears in no pair has a probability of 0.99 with DPO and 0.0001 with PPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import command_line, process_setup, setting_checks
from launch import settings as settings_lib
from launch.setting_checks import require
from preferences import direct_settings

Part = Literal["world", "bandit", "exact"]
SAMPLES = 4
"""Number of answers to each prompt in iterated DPO."""


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
    as far as one pass of DPO. The rounds together sample as many answers as PPO, four to each prompt."""
    bandit_seeds: int = 10
    """Number of draws of labels on the bandit."""
    bandit_coefs: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0)
    """Betas of DPO and KL coefficients of PPO on the bandit, whose rewards have standard deviation 1."""
    bandit_pairs: int = 400
    """Number of labels per draw on the bandit, which has 8 prompts with 8 answers each."""


def parse(arguments: list[str]) -> StudySettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(
        StudySettings, arguments, doc=__doc__, adjust=_adjust_preset, unused=_unused, runs=_runs
    )
    direct_settings.check(settings)
    if settings.loss != "dpo":
        raise settings_lib.SettingError(f"--loss is {settings.loss!r}, but this study only runs dpo; leave it out")
    if settings.ppo.method in setting_checks.KL_IN_LOSS:
        raise settings_lib.SettingError(
            f"--ppo.method {settings.ppo.method} has no KL in the reward, so --kl-coefs would have no effect; use a "
            "different method"
        )
    if settings.published is not None and "world" not in settings.parts:
        raise settings_lib.SettingError(
            f"--published {settings.published} has no effect without world in --parts; leave it out"
        )
    for name in ("seeds", "rounds", "bandit_seeds", "bandit_pairs"):
        require(getattr(settings, name) >= 1, settings, name, "at least 1")
    if "bandit" in settings.parts and settings.rounds > settings.bandit_pairs:
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
            "--data.path is not supported, because the part world requires a gold utility; leave it out"
        )
    return settings


_OF_THE_WORLD = ("seed", "model", "on_alarm", "saves", "max_skipped", "mesh", "hosts", "data", "world", "net")
_OF_THE_WORLD += ("compute",)
_OF_THE_WORLD += ("pretrain", "sft", "comparisons", "reward_model", "ppo", "evaluation", "epochs", "batch")
_OF_THE_WORLD += ("micro_batches", "learning_rate", "pairs", "seeds", "betas", "kl_coefs")


def _unused(settings: StudySettings) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the study, and why."""
    study = "on dpo_vs_ppo.py"
    yield ("beta",), f"{study}, which uses --betas"
    yield ("pairs",), f"{study}, whose DPO uses all pairs, as the reward model does"
    yield from direct_settings.unused(settings)
    for part, names in (("world", _OF_THE_WORLD), ("bandit", ("bandit_seeds", "bandit_coefs", "bandit_pairs"))):
        if part not in settings.parts:
            yield names, f"without {part} in --parts"
    if settings.parts == ("exact",):
        yield ("rounds", "at"), "with --parts exact"
    yield ("ppo.kl_coef",), f"{study}, which uses --kl-coefs"
    yield ("reward_model.heldout",), f"{study}, which trains no held-out reward model"
    yield ("on_alarm",), f"{study}, which raises no alarms"
    yield ("hosts",), f"{study}, which runs on a single host"
    unread = ("best_of", "best_of_prompts", "skills", "pretraining_rows", "transcripts")
    yield [f"evaluation.{name}" for name in unread], f"{study}, which only samples one answer to each prompt"
    why = f"{study}, which trains without a pretraining loss"
    yield from setting_checks.unused_ppo(_runs(settings), ptx=False, why=why)


def _runs(settings: StudySettings) -> list[settings_lib.PPO]:
    return [dataclasses.replace(settings.ppo, kl_coef=coef) for coef in settings.kl_coefs]


def _adjust_preset(preset: settings_lib.Settings) -> settings_lib.Settings:
    """Shortens PPO and the evaluation in the default preset, since the study runs them many times."""
    if preset.preset != "default":
        return preset
    evaluation = dataclasses.replace(preset.evaluation, prompts=1024)
    return dataclasses.replace(preset, ppo=dataclasses.replace(preset.ppo, iterations=18), evaluation=evaluation)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib
from functools import partial

from launch import entry_point, run_folder
from preferences import bandit_study, direct_alignment, ranked_dpo, study_results, three_actions
from preferences import pairs as pairs_lib
from recipe import comparison_data, jobs, run_setup, stages
from rich.console import Console
from rich.table import Table
from sweeps import frontier_plot, run_grid


def run(settings: StudySettings) -> dict[str, Any]:
    """Runs the study and returns the contents of study.json."""
    out, kind = Console(), "dpo-vs-ppo"
    results: dict[str, Any] = {}
    figures = []

    def show(part: str, title: str, *, xlabel: str, ylabel: str) -> None:
        figures.append(frontier_plot.frontier(results[part]["lines"], xlabel=xlabel, ylabel=ylabel))
        out.print(study_results.lines_table(results[part]["lines"], title))
        out.print(study_results.data_table(results[part]["data"]))
        for name, effect in results[part]["effects"].items():
            out.print(f"{name}: {frontier_plot.interval_text(effect)}", soft_wrap=True, highlight=False)

    if "world" in settings.parts:
        with run_setup.open_run(settings, out, kind=kind, weights=_weights(settings)) as (folder, job):
            results["world"] = _run_world(settings, job, folder)
        xlabel = "Built-in world: √KL to the SFT model, nats per sequence"
        show("world", "built-in world: gold utility and KL of each coefficient", xlabel=xlabel, ylabel="Gold utility")
    elif settings.resume:
        folder = run_folder.resume(pathlib.Path(settings.resume), settings)
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
    results = run_folder.finite(results | {"seconds": folder.elapsed.total})
    note = (
        "Each line connects the coefficients of a method. Points are means over seeds, with 95 % intervals. Hollow "
        "markers show shifted pairs."
    )
    if "world" in results:
        note += (
            f" In the built-in world, all policies answer the same {results['world']['held_out_prompts']} held-out "
            "prompts. The seeds cover the sampling and the batch order of training, and the sampling of the "
            "evaluation, but not the choice of the prompts, the labels and the reward models, which they share."
        )
    if "exact" in results:
        note += " " + _exact_sentence(results["exact"])
    frontier_plot.write_page(folder.path / "study.html", "DPO and PPO", figures, note)
    folder.write_json("study.json", results)
    run_setup.print_line(out, note)
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


def _exact_table(policies: dict[str, Any]) -> Table:
    """Returns a table of the part ``exact``, with one row per policy."""
    table = study_results.new_table(
        "three answers, the third unseen", "policy", "better", "worse", "unseen", "DPO loss"
    )
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
    return {
        "lines": [study_results.line(*each) for each in runs.items()],
        "effects": study_results.effects(runs, middle, settings.at),
        "data": bandit_study.data(pairs=settings.bandit_pairs, rounds=settings.rounds),
    }


def _world_methods(settings: StudySettings) -> list[tuple[str, tuple[float, ...]]]:
    """Returns the methods that are compared in the built-in world, with their coefficients."""
    betas, kl_coefs = settings.betas, settings.kl_coefs
    dpo = [("DPO", betas), (f"DPO, {study_results.SHIFTED}", (_middle(betas),)), ("iterated DPO", betas)]
    return [*dpo, ("PPO", kl_coefs), (f"PPO, {study_results.SHIFTED}", (_middle(kl_coefs),))]


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
    """Returns the lines of the world's figure, the `effects` in the world, and what each method is trained on."""
    middle = {"DPO": _middle(settings.betas), "PPO": _middle(settings.kl_coefs)}
    shared, policies, data = _train_policies(job, settings, folder, _world_methods(settings))
    job.progress.start("evaluate", 1 + len(policies))
    against = run_grid.sample_answers(job, shared, job.task.eval_prompts, shared.sft, seed=0)
    runs: dict[str, dict[float, list[dict[str, float]]]] = {}
    for done, ((method, coef, seed), policy) in enumerate(policies.items(), start=2):
        numbers = run_grid.measure(job, shared, job.task.eval_prompts, against, policy, seed=1 + seed)
        runs.setdefault(method, {}).setdefault(coef, []).append(numbers)
        job.progress.update("evaluate", done, 1 + len(policies))
    job.progress.finish("evaluate")
    lines = [study_results.line(*each) for each in runs.items()]
    return {
        "lines": lines,
        "effects": study_results.effects(runs, middle, settings.at),
        "data": data,
        "held_out_prompts": len(job.task.eval_prompts),
    }


def _train_policies(
    job: jobs.Job, settings: StudySettings, folder: run_folder.RunFolder, methods: Any
) -> tuple[run_grid.StartModels, dict[tuple[str, float, int], Any], dict[str, Any]]:
    """Returns the shared models, the policies by (method, coefficient, seed), and what each method is trained on."""
    shared = run_grid.prepare(job)
    base = stages.pretrain(job)
    (own, *_), _, _ = comparison_data.load_or_collect(job, [shared.sft, shared.start])
    (shifted, *_), _, _ = comparison_data.load_or_collect(job, [base], stage="comparisons-shifted")
    reward = stages.train_reward_model(job, shared.start, shifted, stage="reward_model-shifted")
    shared_shifted = shared._replace(reward=stages.normalise_scores(job, reward, shared.start))
    ranked = {
        name: ranked_dpo.with_reference(job, shared.start, rows)
        for name, rows in (("own", own), (study_results.SHIFTED, shifted))
    }
    step, trainer = ranked_dpo.make_step(job), direct_alignment.make_trainer(job, settings, folder.path)
    prompts = job.task.rl_prompts.take(settings.ppo.iterations * settings.ppo.batch // SAMPLES)
    if len(prompts) < settings.rounds:
        raise settings_lib.SettingError(
            f"--rounds is {settings.rounds}; it must be at most {len(prompts)}, the number of prompts"
        )
    data: dict[str, dict[str, int]] = {}
    policies: dict[tuple[str, float, int], Any] = {}
    for method, coef, seed in ((m, c, s) for m, coefs in methods for c in coefs for s in range(settings.seeds)):
        name, source = (
            _run_name(method, coef, seed),
            study_results.SHIFTED if study_results.SHIFTED in method else "own",
        )
        if method == "iterated DPO":
            # A prompt has one pair. Each pair is used SAMPLES times, so that there are as many steps as in PPO.
            own_settings = dataclasses.replace(settings, beta=settings.rounds * coef, epochs=SAMPLES * settings.epochs)
            policy, rounds = direct_alignment.iterate(
                trainer,
                shared.start,
                shared.reward,
                prompts,
                judge=pairs_lib.reward_judge,
                name=name,
                seed=seed,
                rounds=settings.rounds,
                samples=SAMPLES,
                settings=own_settings,
            )
            schedule = partial(direct_alignment.schedule, own_settings, devices=trainer.devices)
            steps = sum(schedule(each.pairs).steps for each in rounds)
            prompts_used = len(prompts) // settings.rounds * settings.rounds
            used = {"sampled answers": SAMPLES * prompts_used, "prompts": prompts_used, "steps": steps}
        elif "DPO" in method:
            policy = ranked_dpo.train(
                job,
                step,
                shared.start,
                ranked[source],
                name=name,
                seed=seed,
                beta=coef,
                learning_rate=settings.learning_rate or settings.ppo.learning_rate / 2,
                epochs=settings.epochs,
            )
            n = len(ranked[source].ranks_BK)
            used = {
                "sampled answers": 0,
                "prompts": 0,
                "steps": settings.epochs * (n // min(settings.reward_model.batch, n)),
            }
        else:
            ppo = dataclasses.replace(settings.ppo, kl_coef=coef)
            cell = run_grid.Cell(name, ppo, seed)
            policy = run_grid.train(
                job, shared_shifted if source == study_results.SHIFTED else shared, cell, step=job.ppo_step
            )
            answers = ppo.iterations * ppo.batch
            steps = ppo.iterations * ppo.epochs * ppo.minibatches
            used = {"sampled answers": answers, "prompts": answers // ppo.samples, "steps": steps}
        policies[method, coef, seed] = policy
        labels = pairs_lib.count(ranked[source])
        data[method] = {"labelled pairs": labels["pairs"], "labelled answers": labels["answers"]} | used
    return shared, policies, data


def _middle(coefs: tuple[float, ...]) -> float:
    return sorted(coefs)[len(coefs) // 2]


def _run_name(method: str, coef: float, seed: int) -> str:
    return f"{method.lower().replace(', ', '-').replace(' ', '-')}-{coef:g}-seed{seed}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
