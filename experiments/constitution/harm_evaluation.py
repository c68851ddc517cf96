"""Evaluates the policies of constitutional.py on held-out red-team prompts and benign prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from recipe import evaluation, jobs, policy_sampling, tasks

from constitution import red_team
from rlhf_jax import types
from rlhf_jax.report import page, plots
from rlhf_jax.report import results as results_lib

POLICIES = ("helpful", "sl_cai", "rl_cai")
NAMES = {"helpful": "helpful-only", "sl_cai": "SL-CAI", "rl_cai": "RL-CAI"}
CHANGES = (("sl_cai", "helpful"), ("rl_cai", "sl_cai"), ("rl_cai", "helpful"))
"""Pairs of policies that are compared."""
RATES = {
    "harmlessness": "gold harmlessness on red-team prompts",
    "helpfulness": "gold helpfulness on benign prompts",
    "red_team_helpfulness": "gold helpfulness on red-team prompts",
    "refusal_rate_harmful": "refusal rate on red-team prompts",
    "refusal_rate_benign": "refusal rate on benign prompts",
    "harm_rate": "rate of harmful instructions on red-team prompts",
}
"""What is measured, with the words of tables and plots."""


def rates(answers: policy_sampling.Answers) -> dict[str, np.ndarray]:
    """Returns what `RATES` names for each answer; NaN at prompts of the other kind."""
    gold = answers.gold
    harmful = np.asarray(gold.harmful_request)

    def at(values: Any, where: np.ndarray) -> np.ndarray:
        return np.where(where, np.asarray(values, np.float64), np.nan)

    return {
        "harmlessness": at(gold.harmless, harmful),
        "helpfulness": at(gold.helpful, ~harmful),
        "red_team_helpfulness": at(gold.helpful, harmful),
        "refusal_rate_harmful": at(gold.refused, harmful),
        "refusal_rate_benign": at(gold.refused, ~harmful),
        "harm_rate": at(gold.harm, harmful),
    }


def held_out(job: jobs.Job, *, red_team_share: float) -> tasks.PromptSet:
    """Returns the held-out prompts, first the red-team prompts and then the benign ones."""
    settings = job.settings
    n = settings.evaluation.prompts
    n_red = round(red_team_share * n)
    split = settings.evaluation.split
    drawn = red_team.draw(settings, n_red, stream=red_team.EVALUATE, harmful=True, split=split)
    drawn += red_team.draw(settings, n - n_red, stream=red_team.EVALUATE, harmful=False, split=split)
    return tasks.prompt_set(job.task, drawn)


def evaluate(
    job: jobs.Job, policies: Mapping[str, types.Params], reward: types.Params, *, red_team_share: float
) -> dict[str, Any]:
    """Evaluates the policies on the same held-out prompts and returns the entries for results.json.

    Every number is ``[mean, low, high]`` with its 95 % interval, clustered by what the prompts ask. Differences between
    policies are paired by prompt.
    """
    prompts = held_out(job, red_team_share=red_team_share)
    job.progress.start("evaluate", len(policies))
    key, answers = job.key("evaluate"), {}
    for number, (name, policy) in enumerate(policies.items()):
        answers[name] = job.sampler(
            policy,
            policies["sl_cai"],
            reward,
            prompts,
            jax.random.fold_in(key, number),
            temperature=job.settings.evaluation.temperature,
        )
        job.progress.update("evaluate", number + 1, len(policies))
    job.progress.finish("evaluate")
    measured = {name: rates(each) for name, each in answers.items()}

    def mean(values_B: np.ndarray, *, rate: bool) -> list[float]:
        known_B = ~np.isnan(values_B)
        return evaluation.mean(values_B[known_B], prompts.asked_B[known_B], rate=rate)

    found = {
        name: evaluation.numbers(prompts, each)
        | {metric: mean(values_B, rate=True) for metric, values_B in measured[name].items()}
        for name, each in answers.items()
    }
    changes = {
        f"{after} − {before}": {
            metric: mean(measured[after][metric] - measured[before][metric], rate=False) for metric in RATES
        }
        for after, before in CHANGES
    }
    return {
        "policies": found,
        "changes": changes,
        "reference": "sl_cai",
        "transcripts": _transcripts(job, prompts, answers),
        "held_out": {"prompts": len(prompts), "asked": len(np.unique(prompts.asked_B))},
    }


def _transcripts(
    job: jobs.Job, prompts: tasks.PromptSet, answers: Mapping[str, policy_sampling.Answers]
) -> list[dict[str, Any]]:
    """Returns the answers of all policies to a few prompts, half of which are harmful."""
    n = job.settings.evaluation.transcripts
    harmful = np.array([category == red_team.HARMFUL for category in prompts.categories])
    rows = [*np.flatnonzero(harmful)[: -(-n // 2)], *np.flatnonzero(~harmful)[: n // 2]]
    texts = {name: red_team.texts_of(job, each) for name, each in answers.items()}
    return [
        {
            "prompt": prompts.texts[i],
            "category": prompts.categories[i],
            "answers": {name: texts[name][i] for name in answers},
            "gold": {name: float(np.asarray(each.gold.total)[i]) for name, each in answers.items()},
        }
        for i in rows
    ]


def headlines(results: Mapping[str, Any]) -> list[str]:
    """Returns the main results in two sentences: the gain in harmlessness, and what it costs in helpfulness."""
    sentences = []
    change = results["changes"]["rl_cai − helpful"]
    for metric, verbs in (("harmlessness", ("raises", "lowers")), ("helpfulness", ("raises", "lowers"))):
        before, after = (results["policies"][name][metric][0] for name in ("helpful", "rl_cai"))
        mean, low, high = change[metric]
        verb = "does not significantly change" if low <= 0 <= high else verbs[mean < 0]
        sentences.append(
            f"Constitutional AI {verb} the {RATES[metric]}: {before:.3f} before, {after:.3f} after "
            f"(difference {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
        )
    return sentences


def change_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the differences between policies as rows of a table."""
    rows = []
    for pair, numbers in results["changes"].items():
        after, before = (NAMES[each] for each in pair.split(" − "))
        for metric, value in numbers.items():
            mean, bounds = results_lib.format_parts(value, digits=3)
            rows.append((f"{RATES[metric]}: {after} − {before}", f"{mean} ({bounds})"))
    return rows


def sections(results: Mapping[str, Any]) -> list[page.Section]:
    """Returns the sections of the report about harm and helpfulness, the revisions and the judge."""
    figures = []
    for metric, words in RATES.items():
        svg = plots.by_policy(results, metric, xlabel=words[0].upper() + words[1:], against="helpful")
        if svg is not None:
            minor = metric in ("red_team_helpfulness", "harm_rate")
            caption = "Mean over held-out prompts, with 95 % intervals. The dashed line marks the helpful-only policy."
            figures.append(page.Figure(svg, words[0].upper() + words[1:], caption, minor))
    steps = results["revisions"]["steps"]
    curve = page.Figure(
        _revision_plot(steps),
        "Revisions",
        "Gold harmlessness and helpfulness of the answers to the red-team prompts after each revision, with 95 % "
        "intervals. Revision 0 is the answer of the helpful-only policy.",
    )
    judged = results["judge"]
    mean, bounds = results_lib.format_parts(judged["agreement"], percent=True)
    rows = [
        ("Agreement of the judge with the gold harmlessness on held-out pairs", f"{mean} % ({bounds})"),
        ("Preference of the judge for the first place", f"{judged['position_bias']:+.3f}"),
        ("Pairs that the judge labelled", f"{judged['labelled']:,}"),
    ]
    return [
        page.Section("Harmlessness and helpfulness", figures, change_rows(results)),
        page.Section("Critiques and revisions", [curve]),
        page.Section("The judge", [], rows),
    ]


def _revision_plot(steps: list[dict[str, Any]]) -> str:
    with plots.axes(height=2.8) as (svg, (ax,)):
        for metric, color in (("harmless", "ppo"), ("helpful", "sft")):
            mean, low, high = np.array([step[metric] for step in steps], float).T
            ax.errorbar(range(len(steps)), mean, [mean - low, high - mean], fmt="o-", color=plots.color(color))
            ax.annotate(metric, (len(steps) - 1, mean[-1]), xytext=(-4, -12), textcoords="offset points", ha="right")
        ax.set_xlabel("Number of revisions")
        ax.set_ylabel("Gold utility")
        ax.set_xticks(range(len(steps)))
        ax.grid(axis="y")
    return svg[0]
