"""One self-contained HTML page about a run: results, plots, transcripts, settings.

The page loads nothing: plots are inline SVG, styles are in its head, there is no script. All text is escaped by the
template; only the SVG drawn here goes in as it is. Sections whose numbers are absent are left out, so the same call
serves the simulated world, where a gold utility is known, and real human data, where it is not.
"""

from __future__ import annotations

import importlib.resources
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax import report_plots as plots
from rlhf_jax import report_reward_plots as reward_plots
from rlhf_jax import results as results_lib

MOST_TRANSCRIPTS = 12

STAGES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "sft_mix": "Supervised fine-tuning",
    "reward_model": "Reward model",
    "ppo": "Reinforcement learning",
    "ppo_ptx": "Reinforcement learning",
} | dict.fromkeys(results_lib.DIRECT, "Learning from pairs")
"""Stages in the order in which they are shown; those of one name share their plots."""


class Metric(NamedTuple):
    """How a logged metric is drawn: name, axis with its unit, how to read it; minor ones lie in a closed part."""

    name: str
    ylabel: str
    caption: str
    minor: bool = False


METRICS = {
    "loss": Metric("Loss", "Nats", "Lower is better; the faint line is the batch, the strong one a running mean."),
    "accuracy": Metric(
        "Accuracy", "Share", "Share of targets that the model predicts or ranks right; higher is better."
    ),
    "margin": Metric(
        "Margin", "Implicit reward", "By how much the better answer of a pair leads; it grows as the policy moves."
    ),
    "chosen_logprob": Metric(
        "Better answers", "Nats per answer", "Their log-probability; that it falls too is common, and no error."
    ),
    "rejected_logprob": Metric(
        "Worse answers", "Nats per answer", "Their log-probability; it falls faster than that of the better ones."
    ),
    "reward": Metric("Reward", "Reward-model score", "What PPO is trained to raise; it climbs and then levels off."),
    "gold": Metric(
        "Gold",
        "Gold utility",
        "What the score stands for; where it falls while the score climbs, the policy games the reward model.",
    ),
    "heldout_reward": Metric(
        "Held-out reward",
        "Score of a second reward model",
        "Of a reward model that nothing is trained on; a fall while the score climbs is over-optimisation.",
    ),
    "kl": Metric(
        "KL from the reference",
        "Nats per answer",
        "How far the policy has moved from where it started; growth without a bound means too weak a penalty.",
    ),
    "pretraining_loss": Metric(
        "Pretraining loss",
        "Nats per token",
        "A rise is what the policy forgets of its pretraining text; PPO-ptx is there to hold it.",
    ),
    "length": Metric("Answer length", "Tokens", "A steady climb beside the score hints at reward for length alone."),
    "entropy": Metric("Entropy", "Nats per token", "How open the policy's choice is; a fall to 0 is a collapse."),
    "explained_variance": Metric(
        "Explained variance", "Share", "1 is a perfect critic, 0 one no better than a constant.", minor=True
    ),
    "value_loss": Metric(
        "Value loss", "Squared score", "The critic's error; it falls early and then stays low.", minor=True
    ),
    "policy_loss": Metric("Policy loss", "Clipped surrogate", "It hovers around 0 or a little below.", minor=True),
    "clip_fraction": Metric(
        "Clipped tokens", "Share", "Above about 0.3 the steps are too large for the clip.", minor=True
    ),
    "approx_kl": Metric("KL of an update", "Nats per token", "How far one update moves the policy.", minor=True),
    "ratio_max": Metric(
        "Largest probability ratio",
        "New over old probability",
        "Spikes mean too large a step, or samples that the policy being trained did not write.",
        minor=True,
    ),
    "stopped": Metric(
        "Finished answers", "Share", "Answers that end by themselves instead of being cut off.", minor=True
    ),
    "sampler_gap": Metric(
        "Sampler against trainer",
        "Largest gap (nats)",
        "Between the two log-probabilities of one token; anything but rounding is a bug.",
        minor=True,
    ),
    "kl_coef": Metric(
        "KL coefficient", "Score per nat", "The strength of the penalty; flat if not adapted.", minor=True
    ),
    "grad_norm": Metric("Gradient norm", "Norm", "Before clipping; spikes come before divergence.", minor=True),
    "learning_rate": Metric("Learning rate", "Rate", "The schedule as it was run.", minor=True),
}


class Figure(NamedTuple):
    """A drawing, its name, and the sentence that says how to read it."""

    svg: str
    name: str
    caption: str
    minor: bool = False


class Section(NamedTuple):
    """A heading, numbers in a list, and figures; without either it is not shown."""

    title: str
    figures: list[Figure]
    rows: Sequence[tuple[str, str]] = ()


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    metrics: Iterable[Mapping[str, Any]],
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report of one run.

    Args:
        path: the HTML file to write.
        results: what results.json holds; any field may be absent or null.
        metrics: the records of metrics.jsonl: ``stage``, ``step``, and numbers or null.
        title: of the page, as text.
        settings: the run's configuration, nested as it likes; shown flat, with dotted names.
    """
    page = render(results, list(metrics), title=title, settings=settings)
    # A tokenizer can decode half a character; such text is shown with a replacement sign rather than lost.
    pathlib.Path(path).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def render(
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; arguments as in `write_report`."""
    import jinja2
    import markupsafe

    sections = [
        Section("Preference", _preference(results) + _categories(results)),
        Section("Reward model", _calibration(results) + _reward_model(results), reward_model_rows(results)),
        Section("Score against KL", _frontiers(results, metrics)),
        Section("Over-optimisation", _overoptimisation(results)),
        Section("Alignment tax", _tax(results)),
        Section("Truthfulness and harm", _conduct(results)),
        *(Section(f"Learning curves: {name}", figures) for name, figures in learning_curves(metrics)),
    ]
    sections = [s._replace(figures=[f._replace(svg=markupsafe.Markup(f.svg)) for f in s.figures]) for s in sections]
    dropped = results.get("dropped")
    chosen = transcripts(results)
    text = importlib.resources.files("rlhf_jax").joinpath("report_template.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return template.from_string(text).render(
        title=title,
        colors=plots.COLORS,
        headline=results_lib.headline(results),
        summary=results_lib.summary(results),
        facts=results_lib.run_facts(results),
        table_main=table(results, results_lib.columns(results)),
        table_other=table(results, results_lib.other_columns(results)),
        table_note=_table_note(results),
        alarms=[(results_lib.label(a["stage"]), a["step"], a["message"]) for a in results.get("alarms") or []],
        sections=sections,
        dropped=None if dropped is None else [(reason, n) for reason, n in dropped.items() if n],
        transcripts=chosen,
        transcripts_left=len(results.get("transcripts") or []) - len(chosen),
        scored=any(a["gold"] for t in chosen for a in t["answers"]),
        settings=list(flatten(settings or {})),
    )


def table(results: Mapping[str, Any], columns: Sequence[results_lib.Column]) -> dict[str, Any]:
    """Headings and rows of a table of policies, in text."""
    rows = [
        {
            "name": results_lib.label(p),
            "color": _css(p),
            "cells": [
                results_lib.format_parts(results_lib.value(results, p, c.key), percent=c.percent, digits=c.digits)
                for c in columns
            ],
        }
        for p in results_lib.policies(results)
    ]
    return {"head": ["Policy", *(c.title for c in columns)], "rows": rows if columns else []}


def _table_note(results: Mapping[str, Any]) -> str:
    note = "Where a second line stands below a number, it is the 95 % interval. KL is from the policy RL started from."
    best = results_lib.finite(results.get("best_possible_gold"))
    if best is not None:
        note += f" The best possible gold utility is {results_lib.format_number(best.mean, digits=3)}"
        note += "; gap closed is the share of the way to it." if results.get("gap_closed") else "."
    return note


def _css(policy: str) -> str:
    return policy if policy in plots.COLORS else "other"


def reward_model_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every number about the reward model as (name, text); rates as percentages."""
    model = dict(results.get("reward_model") or {})
    fit = model.get("calibration") or {}
    model |= {f"calibration {key}": fit.get(key) for key in ("error", "slope", "temperature")}
    model |= {"length correlation": (model.get("length_bias") or {}).get("correlation")}
    model |= {key.replace("_", " "): (model.get("gap") or {}).get(key) for key in ("accuracy_gap", "loss_gap")}
    rows = []
    for name, found in model.items():
        if results_lib.interval(found) is None:
            continue
        percent = name.endswith(("accuracy", "agreement"))
        mean, bounds = results_lib.format_parts(found, percent=percent, digits=0 if isinstance(found, int) else 3)
        unit = " %" if percent else ""
        rows.append((name.replace("_", " ").capitalize(), mean + unit + (f" ({bounds})" if bounds else "")))
    return rows


def _figures(*drawn: tuple[str | None, str, str]) -> list[Figure]:
    return [Figure(svg, name, caption) for svg, name, caption in drawn if svg is not None]


def _preference(results: Mapping[str, Any]) -> list[Figure]:
    caption = (
        "Right of the dashed 50 % line a policy is preferred to SFT; lines are 95 % intervals, filled marks "
        "are judged by the gold utility, open marks by labelers whom the reward model never saw"
    )
    mean, bounds = results_lib.format_parts(results.get("null_check"), percent=True)
    if mean != results_lib.MISSING:
        caption += f"; a policy that equals SFT measured {mean} %" + (f" ({bounds})" if bounds else "")
    return _figures((plots.win_rates(results), "Win rates against SFT", caption + "."))


def _calibration(results: Mapping[str, Any]) -> list[Figure]:
    caption = (
        "Points below the dashed curve are pairs on which the model is surer than it is right, points above it pairs "
        "on which it is too unsure; lines are 95 % intervals, and the strip counts the comparisons of each gap."
    )
    return _figures((plots.calibration(results), "Calibration", caption))


def _reward_model(results: Mapping[str, Any]) -> list[Figure]:
    model = results.get("reward_model") or {}
    rho = results_lib.finite((model.get("thresholds") or {}).get("spearman"))
    falls = "Where it falls, the model tells good answers worse apart than bad ones"
    falls += "" if rho is None else f"; rank correlation {results_lib.format_number(rho.mean, digits=2)}"
    return _figures(
        (
            reward_plots.strata(model.get("strata"), model.get("accuracy")),
            "Accuracy by stratum",
            "Points are accuracies, ties a half, lines their 95 % intervals; the dotted line is all pairs together.",
        ),
        (
            reward_plots.generalisation(model.get("gap")),
            "Training and other pairs",
            "Where the intervals do not overlap, the model has learnt its training pairs by heart.",
        ),
        (reward_plots.thresholds(model.get("thresholds")), "Accuracy among high scores", falls + "."),
        (
            reward_plots.length_bias(model.get("length_bias")),
            "Length",
            "A model that prefers the longer answer more often than the labels do, and is right less often where the "
            "shorter one is, goes by length; lines are 95 % intervals.",
        ),
    )


def _overoptimisation(results: Mapping[str, Any]) -> list[Figure]:
    halves, curves = results.get("split_halves"), results.get("overoptimisation")
    told = reward_plots.overoptimisation_words(curves)
    return _figures(
        (
            reward_plots.split_halves(halves, (halves or {}).get("steps")),
            "Two reward models",
            "Trained on halves of the comparisons; from the dotted line on, the policy gains what one alone likes.",
        ),
        (
            reward_plots.overoptimisation(curves),
            "Gold against KL, fitted",
            "Solid: the form that fits better, with its peak; broken: the other" + (f" ({told})." if told else "."),
        ),
    )


def _frontiers(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    names = {"reward": ("Reward-model score", "Reward for KL"), "gold": ("Gold utility", "Gold for KL")}
    stages = [s for s in _stages(metrics) if s.startswith("ppo")]
    found = []
    for key, (ylabel, name) in names.items():
        curves = [pair for s in stages if (pair := plots.paired(metrics, s, key))]
        svg = plots.frontier(results, curves, key, ylabel=ylabel)
        higher = "Higher at the same KL is better; where a curve turns down, the reward model is over-optimised"
        straight = "A straight line is reward that grows as the square root of the KL" + _straightness(curves)
        found.append((svg, name, (straight if key == "reward" else higher) + "."))
    return _figures(*found)


def _straightness(curves: Sequence[tuple[plots.Curve, plots.Curve]]) -> str:
    """How straight the curves are in √KL and in KL, in words."""
    told = []
    for kl, score in curves:
        positive = kl.y.clip(min=0)
        root, plain = plots.line_fit(positive**0.5, score.y), plots.line_fit(positive, score.y)
        if root is not None and plain is not None:
            told.append(f"{results_lib.label(kl.stage)}: R² {root:.2f} in √KL, {plain:.2f} in KL")
    return f" ({'; '.join(told)})" if told else ""


def _categories(results: Mapping[str, Any]) -> list[Figure]:
    caption = "Longer is better; thin lines are 95 % intervals, and overlapping ones leave the order of two bars open."
    return _figures((plots.categories(results), "Gold utility by category", caption))


def _tax(results: Mapping[str, Any]) -> list[Figure]:
    skill = plots.by_policy(results, "skill_accuracy", xlabel="Skill accuracy (%)", scale=100, against="sft_mix")
    loss = plots.by_policy(results, "pretraining_loss", xlabel="Pretraining loss (nats per token)", against="sft_mix")
    return _figures(
        (skill, "Skills", "Left of the dashed line (SFT-mix, where PPO starts) skills are lost: the alignment tax."),
        (loss, "Pretraining text", "Right of the dashed line (SFT-mix) a policy predicts its pretraining text worse."),
    )


def _conduct(results: Mapping[str, Any]) -> list[Figure]:
    truthful = plots.by_policy(results, "truthful_rate", xlabel="Truthful answers (%)", scale=100)
    harm = plots.by_policy(results, "harm_rate", xlabel="Harmful answers (%)", scale=100)
    return _figures(
        (truthful, "Truthfulness", "Further right is better; the dashed line is SFT."),
        (harm, "Harm", "Further left is better; the dashed line is SFT."),
    )


def _stages(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stages in the metrics: known ones in their order, then the others as they come."""
    found = dict.fromkeys(r["stage"] for r in metrics if r.get("stage") is not None)
    return [s for s in STAGES if s in found] + [s for s in found if s not in STAGES]


def learning_curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Figure]]]:
    """Figures of every group of stages, one a metric, the stages of the group in it together."""
    groups: dict[str, list[str]] = {}
    for stage in _stages(metrics):
        groups.setdefault(STAGES.get(stage, stage.replace("_", " ")), []).append(stage)
    return [(name, _group_curves(metrics, stages)) for name, stages in groups.items()]


def _group_curves(metrics: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> list[Figure]:
    records = {s: [r for r in metrics if r.get("stage") == s] for s in stages}
    found = []
    for name, m in METRICS.items():
        curves = [c for s in stages if (c := plots.curve(records[s], s, name))]
        if curves:
            svg = plots.learning_curve(curves, ylabel=m.ylabel)
            found.append(Figure(svg, m.name, m.caption, m.minor))
    return found


def transcripts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first dozen transcripts, ready for the page: answers in the order of the policies, gold as text."""
    found = []
    for t in (results.get("transcripts") or [])[:MOST_TRANSCRIPTS]:
        answers, gold = t.get("answers") or {}, t.get("gold") or {}
        found.append(
            {
                "prompt": t.get("prompt") or "",
                "category": t.get("category"),
                "answers": [
                    {
                        "name": results_lib.label(p),
                        "color": _css(p),
                        "text": answers[p],
                        "gold": results_lib.format_parts(gold.get(p), digits=2)[0] if p in gold else "",
                    }
                    for p in results_lib.policies({"policies": answers})
                ],
            }
        )
    return found


def flatten(settings: Mapping[str, Any], *, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    for name, setting in settings.items():
        if isinstance(setting, Mapping) and setting:
            yield from flatten(setting, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(setting)
