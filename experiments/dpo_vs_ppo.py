"""DPO against PPO, after Xu et al. 2024 and Rafailov et al. 2023: gold utility for KL, and what shifted pairs cost.

    python experiments/dpo_vs_ppo.py                       all three parts
    python experiments/dpo_vs_ppo.py --parts bandit exact  the two whose KL and rewards are exact
    python experiments/dpo_vs_ppo.py --preset smoke        all of it, too short to learn much in the world
    python experiments/dpo_vs_ppo.py --resume runs/NAME    go on with a study that was stopped or killed

Three parts. ``world``: from one SFT model of the built-in world, DPO at several betas, DPO in rounds that a reward
model labels, PPO at several KL coefficients, and both again where the comparisons are of the base model's answers,
which the SFT model would hardly write (shifted pairs). ``bandit``: the same on a table of rewards, where KL and gold
are exact and the optimum is known. ``exact``: the three answers of Xu's theorem 4.1. All settings of instructgpt.py are
settings here too, but for those that nothing here reads.

All seeds of the world share its prompts, its comparisons and its reward models: they are keys of sampling and batches,
and intervals over them are of optimisation and sampling alone. Seeds of the bandit are other labels on one table.

Hardware: two CPU cores, 2.2 GB. Time: about 17 minutes. To expect of the world: gold of 0.90 from PPO at a KL of 1 to
1.6 nats, 0.035 ±0.020 above DPO at 1.5; DPO's seeds lie far apart. Shifted pairs cost DPO 0.05 ±0.07 and PPO 0.10
±0.01: a reward model that saw only the base model's answers misleads PPO as well, unlike in Xu et al. Of the bandit,
over ten draws of 400 labels: PPO 0.15 ±0.05 above DPO at 1 nat, and no cost of shift that could be told from 0. Of the
three answers DPO puts 0.99 on the unseen one and PPO 0.0001.

Writes below ``--out``: study.json, study.html with the figures, config.json, metrics.jsonl, checkpoints/, reference/.
"""

from __future__ import annotations

from launch import process_setup
from recipe import jobs

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import pathlib
import time
from typing import Any, ClassVar, Literal

import numpy as np
from launch import command_line, entry_point, run_folder, settings
from preferences import bandit_study, direct_methods, three_actions
from preferences import pairs as pairs_lib
from recipe import comparison_data, run_setup, stages
from rich import box
from rich.console import Console
from rich.table import Table
from sweeps import frontier_plot, run_grid

from rlhf_jax import diagnostics

Part = Literal["world", "bandit", "exact"]
SHIFTED = "shifted pairs"


@dataclasses.dataclass(frozen=True)
class Study(direct_methods.Direct, settings.Settings):
    """DPO against PPO, with every setting of the main job."""

    command: ClassVar[str] = "dpo_vs_ppo"

    parts: tuple[Part, ...] = ("world", "bandit", "exact")
    """Which to run."""
    seeds: int = 3
    """Runs of each method and coefficient."""
    betas: tuple[float, ...] = (0.05, 0.15, 0.5)
    """Of DPO; the middle one is what shifted and unshifted pairs are compared at."""
    kl_coefs: tuple[float, ...] = (0.02, 0.06, 0.2)
    """Of PPO; likewise."""
    at: tuple[float, ...] = (0.5, 1.0, 1.5)
    """KLs, in nats, at which the methods' gold is compared, between the coefficients on either side."""
    rounds: int = 3
    """Of iterated DPO, on at most as many pairs in all as the other has, each with so many times the beta, which makes
    the whole as strong as one pass. A prompt gives one pair, or none; study.json says how many there were."""
    bandit_seeds: int = 10
    """Draws of labels on the bandit."""
    bandit_coefs: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0)
    """Betas and KL coefficients on the bandit, where rewards have standard deviation 1."""
    bandit_pairs: int = 400
    """Labels on the bandit; it has 64 pairs of a prompt and an answer."""


def parse(arguments: list[str]) -> Study:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = command_line.parse(Study, arguments, doc=__doc__, adjust=_short)
    direct_methods.check(asked)
    if asked.loss != "dpo":
        raise settings.SettingError(f"--loss is {asked.loss!r}; the study is of dpo, so leave it out")
    direct_methods.refuse_unread(
        asked, ("ppo.kl_coef", "ppo.ptx_coef", "reward_model.heldout", "on_alarm"), program="dpo_vs_ppo.py"
    )
    for name in ("seeds", "rounds", "bandit_seeds", "bandit_pairs"):
        if getattr(asked, name) < 1:
            raise settings.SettingError(f"--{name.replace('_', '-')} is {getattr(asked, name)}; it must be at least 1")
    if asked.rounds > asked.bandit_pairs:
        raise settings.SettingError(
            f"--rounds is {asked.rounds}; --bandit-pairs {asked.bandit_pairs} are too few for it"
        )
    for name in ("betas", "kl_coefs", "bandit_coefs", "at"):
        given = getattr(asked, name)
        if not given or min(given) <= 0 or len(set(given)) < len(given):
            raise settings.SettingError(f"--{name.replace('_', '-')} is {given}; each must be above 0, and there once")
    if not asked.parts:
        raise settings.SettingError("--parts must name something")
    if "world" in asked.parts and asked.data.path is not None:
        raise settings.SettingError("--data.path has no gold utility to compare by; leave it out, or the part `world`")
    if asked.beta is not None:
        raise settings.SettingError(f"--beta is {asked.beta}; give --betas here")
    return asked


def _short(preset: settings.Settings) -> settings.Settings:
    """Many runs are made shorter."""
    if preset.preset != "default":
        return preset
    return dataclasses.replace(preset, ppo=dataclasses.replace(preset.ppo, iterations=18))


def run(asked: Study) -> dict[str, Any]:
    """The whole study; returns what study.json holds."""
    out, kind = Console(), "dpo-vs-ppo"
    results: dict[str, Any] = {}
    drawn = []
    if "world" in asked.parts:
        with run_setup.open_run(asked, out, kind=kind, weights=_weights(asked)) as (folder, job):
            results["world"] = in_world(asked, job, folder)
        label = "Built-in world: root of the KL to the SFT model, nats a sequence"
        drawn.append(frontier_plot.frontier(results["world"]["lines"], xlabel=label, ylabel="Gold utility"))
        _tell(out, results["world"], "built-in world: gold utility at the KL that each coefficient ends at")
    elif asked.resume:
        folder = run_folder.RunFolder(pathlib.Path(asked.resume))
    else:
        folder = run_folder.create(run_folder.free_path(asked, kind=kind), asked)
    if "exact" in asked.parts:
        results["exact"] = exact()
        out.print(exact_table(results["exact"]))
    if "bandit" in asked.parts:
        results["bandit"] = on_bandit(asked)
        label = "Bandit: root of the exact KL, nats"
        drawn.append(frontier_plot.frontier(results["bandit"]["lines"], xlabel=label, ylabel="Expected reward, exact"))
        _tell(out, results["bandit"], "bandit: expected reward at the KL that each coefficient ends at")
    folder.log.close()
    results = run_folder.finite(results | {"seconds": time.time() - process_setup.START_TIME})
    note = (
        "Lines join the coefficients of a method, means over seeds with 95 % intervals; broken ones had shifted pairs."
    )
    if "exact" in results:
        note += " " + exact_words(results["exact"])
    frontier_plot.write_page(folder.path / "study.html", "DPO against PPO", drawn, note)
    folder.write_json("study.json", results)
    run_setup.print_line(out, f"figures: {folder.path / 'study.html'}   numbers: {folder.path / 'study.json'}")
    return results


def _tell(out: Console, part: dict[str, Any], title: str) -> None:
    out.print(lines_table(part["lines"], title))
    for name, effect in part["effects"].items():
        out.print(f"{name}: {frontier_plot.interval_text(effect)}", soft_wrap=True, highlight=False)


def exact() -> dict[str, Any]:
    """Probabilities of the three answers, by method, and DPO's loss of each."""
    beta = 0.1
    trained, _ = three_actions.by_dpo(beta=beta)
    policies = {
        "reference": three_actions.REFERENCE,
        "DPO": trained,
        "PPO": three_actions.by_ppo(kl_coef=beta),
        "optimum of reward less KL": three_actions.optimum(kl_coef=beta),
        "(0.1, 0, 0.9)": (0.1, 0.0, 0.9),
    }
    return {
        name: {"probabilities": [float(p) for p in each], "dpo_loss": three_actions.loss(each, beta=beta)}
        for name, each in policies.items()
    }


def exact_words(found: dict[str, Any]) -> str:
    """The part ``exact`` in a sentence."""
    third = {name: each["probabilities"][2] for name, each in found.items()}
    return (
        "Three answers, of which the third was never seen: "
        f"DPO gives it {third['DPO']:.3f} and PPO {third['PPO']:.4f}; in the optimum it has "
        f"{third['optimum of reward less KL']:.1e}."
    )


def exact_table(found: dict[str, Any]) -> Table:
    """The part ``exact``, a policy a row."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, title="three answers, the third unseen", title_justify="left")
    for column in ("", "better", "worse", "unseen", "DPO loss"):
        made.add_column(column, justify="right" if column else "left")
    for name, each in found.items():
        made.add_row(name, *(f"{p:.4g}" for p in each["probabilities"]), f"{each['dpo_loss']:.4f}")
    return made


def on_bandit(asked: Study) -> dict[str, Any]:
    """The lines of the bandit, and the effects at its middle coefficient."""
    coefs = asked.bandit_coefs
    found = bandit_study.run(coefs=coefs, seeds=asked.bandit_seeds, pairs=asked.bandit_pairs, rounds=asked.rounds)
    runs = {method: dict(zip(coefs, rows)) for method, rows in found.items()}
    middle = {"DPO": _middle(coefs), "PPO": _middle(coefs)}
    return {"lines": [_line(*each) for each in runs.items()], "effects": effects(runs, middle, asked.at)}


def _wanted(asked: Study) -> list[tuple[str, tuple[float, ...]]]:
    """The methods of the built-in world, and the coefficients of each."""
    wanted = [("DPO", asked.betas), (f"DPO, {SHIFTED}", (_middle(asked.betas),)), ("iterated DPO", asked.betas)]
    return [*wanted, ("PPO", asked.kl_coefs), (f"PPO, {SHIFTED}", (_middle(asked.kl_coefs),))]


def _weights(asked: Study) -> list[tuple[str, float]]:
    weights = [("reward_model-shifted", 20.0)]
    for method, coefs in _wanted(asked):
        each = [_stage(method, coef, seed) for coef in coefs for seed in range(asked.seeds)]
        rounds = range(asked.rounds)
        weights += [(f"{n}-round{r}", 4.0) for n in each for r in rounds] if method == "iterated DPO" else []
        weights += [(n, 16.0 if "PPO" in method else 9.0) for n in each] if method != "iterated DPO" else []
    return [*weights, ("evaluate", 60.0)]


def in_world(asked: Study, job: jobs.Job, folder: run_folder.RunFolder) -> dict[str, Any]:
    """The lines of the built-in world, and what shift and rounds do at the middle coefficients."""
    middle = {"DPO": _middle(asked.betas), "PPO": _middle(asked.kl_coefs)}
    shared, policies, learnt = _policies(job, asked, folder, _wanted(asked))
    job.progress.start("evaluate", 1 + len(policies))
    against = run_grid.sample_answers(job, shared, job.task.eval_prompts, shared.sft, seed=0)
    runs: dict[str, dict[float, list[dict[str, float]]]] = {}
    for done, ((method, coef, seed), policy) in enumerate(policies.items()):
        numbers = run_grid.measure(job, shared, job.task.eval_prompts, against, policy, seed=1 + seed)
        runs.setdefault(method, {}).setdefault(coef, []).append(numbers)
        job.progress.update("evaluate", 1 + done, 1 + len(policies))
    job.progress.finish("evaluate")
    lines = [_line(method, each) for method, each in runs.items()]
    return {"lines": lines, "effects": effects(runs, middle, asked.at), "pairs": learnt}


def _policies(
    job: jobs.Job, asked: Study, folder: run_folder.RunFolder, wanted: Any
) -> tuple[run_grid.StartModels, dict[tuple[str, float, int], Any], dict[str, Any]]:
    """What all share, every policy by (method, coefficient, seed), and on how many pairs DPO was trained."""
    shared = run_grid.prepare(job)
    base = stages.pretrain(job)
    width, n = job.task.prompt_width, asked.pairs
    (own, *_), _, _ = comparison_data.load_or_collect(job, [shared.sft, shared.start])
    (shifted, *_), _, _ = comparison_data.load_or_collect(job, [base])
    reward = stages.train_reward_model(job, shared.start, shifted, stage="reward_model-shifted")
    others = shared._replace(reward=stages.normalise_scores(job, reward, shared.start))
    pairs = {
        name: pairs_lib.from_rankings(rows, prompt_width=width, per_prompt=n, seed=asked.seed)
        for name, rows in (("own", own), (SHIFTED, shifted))
    }
    trainer = direct_methods.make_trainer(job, asked, folder.path)
    # Each prompt of a round gives one pair at most.
    prompts = job.task.rl_prompts.take(min(len(pairs["own"]), len(job.task.rl_prompts)))
    if len(prompts) < asked.rounds:
        raise settings.SettingError(f"--rounds is {asked.rounds}; there are {len(prompts)} prompts for them")
    learnt: dict[str, Any] = {name: len(each) for name, each in pairs.items()} | {"prompts of rounds": len(prompts)}
    made: dict[tuple[str, float, int], Any] = {}
    for method, coefs in wanted:
        for coef in coefs:
            numbers = dataclasses.replace(asked, beta=coef)
            for seed in range(asked.seeds):
                name = _stage(method, coef, seed)
                if method == "iterated DPO":
                    policy, found = direct_methods.iterate(
                        trainer,
                        shared.start,
                        shared.reward,
                        prompts,
                        judge=pairs_lib.judged_by_reward,
                        name=name,
                        seed=seed,
                        rounds=asked.rounds,
                        samples=4,
                        asked=dataclasses.replace(numbers, beta=asked.rounds * coef),
                    )
                    learnt[name] = sum(each.pairs for each in found)
                elif "DPO" in method:
                    which = SHIFTED if SHIFTED in method else "own"
                    kept = f"{which.replace(' ', '-')}-sft_mix"
                    policy = trainer.train(shared.start, pairs[which], name=name, seed=seed, asked=numbers, kept=kept)
                else:
                    cell = run_grid.Cell(name, dataclasses.replace(asked.ppo, kl_coef=coef), seed)
                    policy = run_grid.train(job, others if SHIFTED in method else shared, cell, step=job.ppo_step)
                made[method, coef, seed] = policy
    return shared, made, learnt


def _middle(coefs: tuple[float, ...]) -> float:
    return sorted(coefs)[len(coefs) // 2]


def _stage(method: str, coef: float, seed: int) -> str:
    return f"{method.lower().replace(', ', '-').replace(' ', '-')}-{coef:g}-seed{seed}"


def _line(method: str, runs: dict[float, list[dict[str, float]]]) -> dict[str, Any]:
    """One method's line in a figure, and its runs."""
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
    """Differences of gold, with 95 % intervals over seeds: shift at the middle coefficients, methods at equal KL."""

    def gold(method: str) -> list[float]:
        return [numbers["gold"] for numbers in runs[method][middle[method.split(",")[0]]]]

    cost = {name: _difference(gold(name), gold(f"{name}, {SHIFTED}")) for name in ("DPO", "PPO")}
    told = {f"gold that shifted pairs cost {name}": cost[name] for name in cost}
    told["what they cost DPO more than PPO"] = _difference(cost["DPO"], cost["PPO"])
    for kl in at:
        for method, other in (("PPO", "DPO"), ("iterated DPO", "DPO")):
            upper, lower = (gold_at(runs[name], kl) for name in (method, other))
            if upper is not None and lower is not None:
                told[f"gold of {method} above {other} at a KL of {kl:g}"] = _difference(upper, lower)
    return {name: list(diagnostics.mean_interval(each)) for name, each in told.items()}


def gold_at(runs: dict[float, list[dict[str, float]]], kl: float) -> list[float] | None:
    """Each seed's gold where its KL is ``kl``, on straight lines in the root of the KL between its coefficients.

    None where a seed's coefficients do not lie on both sides of it.
    """
    found = []
    for each in zip(*runs.values(), strict=True):
        points = sorted((max(numbers["kl"], 0.0) ** 0.5, numbers["gold"]) for numbers in each)
        x, y = zip(*points)
        if not x[0] <= kl**0.5 <= x[-1]:
            return None
        found.append(float(np.interp(kl**0.5, x, y)))
    return found


def _difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def lines_table(lines: list[dict[str, Any]], title: str) -> Table:
    """A method and coefficient a row."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for column in ("method", "coef", "KL", "gold"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        for i, point in enumerate(line["points"]):
            numbers = (frontier_plot.interval_text(point[name]) for name in ("kl", "gold"))
            made.add_row("" if i else line["method"], f"{point['coef']:g}", *numbers)
    return made


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
