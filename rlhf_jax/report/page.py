"""One self-contained HTML page about a run: results, plots, transcripts, settings.

The page loads nothing: plots are inline SVG, styles are in its head, there is no script. All text is escaped by the
template; only the SVG drawn here goes in as it is. Sections whose numbers are absent are left out, so the same call
serves the simulated world, where a gold utility is known, and real human data, where it is not.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.checkpoint import atomic
from rlhf_jax.report import plots, reward_plots
from rlhf_jax.report import results as results_lib
from rlhf_jax.report.metric_display import METRICS, STAGES

MOST_TRANSCRIPTS = 12


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
    """Writes the report of one run, whole or not at all.

    Args:
        path: the HTML file to write.
        results: what results.json holds; any field may be absent or null.
        metrics: the records of metrics.jsonl: ``stage``, ``step``, and numbers or null.
        title: of the page, as text.
        settings: the run's configuration, nested as it likes; shown flat, with dotted names.
    """
    page = render(results, list(metrics), title=title, settings=settings)
    # A tokenizer can decode half a character; such text is shown with a replacement sign rather than lost.
    atomic.replace_file(path, page.encode("utf-8", "xmlcharrefreplace"))


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
        Section("Over-optimisation", _overoptimisation(results), goodhart_rows(results)),
        Section("Alignment tax", _tax(results)),
        Section("Truthfulness and harm", _conduct(results)),
        *(Section(f"Learning curves: {name}", figures) for name, figures in learning_curves(metrics)),
    ]
    sections = [s._replace(figures=[f._replace(svg=markupsafe.Markup(f.svg)) for f in s.figures]) for s in sections]
    dropped = results.get("dropped")
    chosen = transcripts(results)
    text = importlib.resources.files("rlhf_jax.report").joinpath("page.html").read_text(encoding="utf-8")
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
            "Points are accuracies of n pairs, ties a half, lines their 95 % intervals; the dotted line is all pairs.",
        ),
        (
            reward_plots.generalisation(model.get("gap")),
            "Training and other pairs",
            _gap_words(model.get("gap")),
        ),
        (reward_plots.thresholds(model.get("thresholds")), "Accuracy among high scores", falls + "."),
        (
            reward_plots.length_bias(model.get("length_bias")),
            "Length",
            "A model that prefers the longer answer more often than the labels do, and is right less often where the "
            "shorter one is, goes by length; lines are 95 % intervals.",
        ),
    )


def goodhart_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each policy gained over its start on the same prompts, by the score that it is trained on and by gold."""
    rows = []
    for policy, found in (results.get("goodhart") or {}).items():
        for key, name in (("reward_gained", "RM score"), ("gold_gained", "gold utility")):
            mean, bounds = results_lib.format_parts(found.get(key), digits=3)
            if mean != results_lib.MISSING:
                fell = ", while the score rose" if key == "gold_gained" and found.get("gamed") else ""
                told = f"{mean} ({bounds}){fell}" if bounds else mean + fell
                rows.append((f"{results_lib.label(policy)} over SFT-mix, {name}", told))
    return rows


def _gap_words(gap: Mapping[str, Any] | None) -> str:
    words = (
        "The model has learnt its training pairs by heart where the difference of the two, training less other pairs, "
        "has an interval above 0; the two intervals may overlap all the same"
    )
    mean, bounds = results_lib.format_parts((gap or {}).get("accuracy_gap"), percent=True)
    if mean == results_lib.MISSING:
        return words + "."
    return words + f". Here it is {mean} points" + (f" (95 % interval {bounds})." if bounds else ".")


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
