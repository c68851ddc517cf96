"""Renders the results, plots, transcripts and settings of a run as one self-contained HTML page.

The page loads no other files and has no scripts. Plots are inline SVG, and styles are in the page's head. The template
escapes all text except the SVG. Sections without data are omitted, so the same functions work for the simulated world,
in which the gold utility of an answer is known, and for human data, for which it is unknown.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax import atomic
from rlhf_jax.report import distillation_plots, plots, reward_plots
from rlhf_jax.report import results as results_lib
from rlhf_jax.report.metric_display import METRICS, STAGES

MAX_TRANSCRIPTS = 12


class Figure(NamedTuple):
    """A plot with its name and caption; minor figures are in a collapsed section."""

    svg: str
    name: str
    caption: str
    minor: bool = False


class Section(NamedTuple):
    """A section of the page with a table, figures and numbers; omitted if it has none of them."""

    title: str
    figures: list[Figure]
    rows: Sequence[tuple[str, str]] = ()
    table: Mapping[str, Any] | None = None
    """Headings ``head``, ``rows`` with ``name``, ``color`` and ``cells``, as those of `table`, and a ``note``."""


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    metrics: Iterable[Mapping[str, Any]],
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> None:
    """Writes the HTML page of a run to a file, atomically.

    Args:
        path: HTML file to write.
        results: Content of results.json; any field may be missing or None.
        metrics: Records of metrics.jsonl, with ``stage``, ``step``, and metrics that are numbers or None.
        title: Title of the page.
        settings: Configuration of the run; nested settings are shown with dotted names.
        sections: Further sections, which come first.
    """
    page = render(results, list(metrics), title=title, settings=settings, sections=sections)
    # Text truncated within a multi-byte character may contain lone surrogates, which UTF-8 cannot encode.
    atomic.replace_file(path, page.encode("utf-8", "xmlcharrefreplace"))


def render(
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """Returns the HTML page of a run.

    Args:
        results: Content of results.json; any field may be missing or None.
        metrics: Records of metrics.jsonl, with ``stage``, ``step``, and metrics that are numbers or None.
        title: Title of the page.
        settings: Configuration of the run; nested settings are shown with dotted names.
        sections: Further sections, which come first.

    Returns:
        The page as text.
    """
    import jinja2
    import markupsafe

    sections = [
        *sections,
        Section("Comparison with the baseline", _comparison(results)),
        Section("Distillation", _distillation(results), distillation_plots.rows(results)),
        Section("Preference", _preference(results) + _categories(results)),
        Section("Reward model", _calibration(results) + _reward_model(results), reward_model_rows(results)),
        Section("Reward and KL", _frontiers(results, metrics)),
        Section("Over-optimisation", _overoptimisation(results), goodhart_rows(results)),
        Section("Alignment tax", _alignment_tax(results)),
        Section("Truthfulness and harm", _truthfulness_and_harm(results)),
        *(Section(f"Learning curves: {name}", figures) for name, figures in learning_curves(metrics)),
    ]
    sections = [s._replace(figures=[f._replace(svg=markupsafe.Markup(f.svg)) for f in s.figures]) for s in sections]
    dropped = results.get("dropped")
    shown = transcripts(results)
    text = importlib.resources.files("rlhf_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return template.from_string(text).render(
        title=title,
        colors=plots.COLORS,
        headlines=results_lib.headlines(results),
        summary=results_lib.summary(results),
        facts=results_lib.run_facts(results),
        table_main=table(results, results_lib.columns(results)),
        table_other=table(results, results_lib.other_columns(results)),
        table_note=_table_note(results),
        alarms=[(results_lib.label(a["stage"]), a["step"], a["message"]) for a in results.get("alarms") or []],
        incidents=[(results_lib.label(each["stage"]), each["text"]) for each in results.get("incidents") or []],
        sections=sections,
        dropped=None if dropped is None else [(reason, n) for reason, n in dropped.items() if n],
        transcripts=shown,
        transcripts_left=len(results.get("transcripts") or []) - len(shown),
        scored=any(a["gold"] for t in shown for a in t["answers"]),
        score_name="score" if results.get("baseline") else "gold utility",
        settings=list(flatten(settings or {})),
    )


def table(results: Mapping[str, Any], columns: Sequence[results_lib.Column]) -> dict[str, Any]:
    """Returns the headings and the formatted rows of a table of policies."""
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
    note = "The second line of a cell is the 95 % interval."
    if results.get("distillation"):
        return note
    note += " The KL is measured from "
    if (reference := results.get("reference")) is not None:
        return f"{note}{results_lib.label(str(reference))}."
    note += "SFT-mix, the policy before RL or direct preference optimisation."
    if differs := results_lib.best_of_n_differs(results):
        note += f" {differs[0].upper()}{differs[1:]}."
        if results_lib.value(results, "best_of_n", "gold_win_rate_vs_sft"):
            note += " Its win rates compare it with the answers of SFT to the same prompts."
    best = results_lib.finite(results.get("best_possible_gold"))
    if best is not None:
        note += f" The best possible gold utility is {results_lib.format_number(best.mean, digits=3)}."
        note += " “Gap closed” is the share of the gap between SFT and this maximum that the policy closes."
    return note


def _css(policy: str) -> str:
    return policy if policy in plots.COLORS else "other"


def reward_model_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the numbers about the reward model as (name, text), with accuracies and agreement as percentages."""
    model = dict(results.get("reward_model") or {})
    fit = model.get("calibration") or {}
    model |= {f"calibration {key}": fit.get(key) for key in ("error", "overconfidence", "slope", "temperature")}
    model |= {"length correlation": (model.get("length_bias") or {}).get("correlation")}
    model |= {key.replace("_", " "): (model.get("gap") or {}).get(key) for key in ("accuracy_gap", "loss_gap")}
    model |= {"held-out reward model's accuracy": (results.get("heldout_reward_model") or {}).get("accuracy")}
    rows = []
    for name, value in model.items():
        if results_lib.interval(value) is None:
            continue
        percent = name.endswith(("accuracy", "agreement"))
        mean, bounds = results_lib.format_parts(value, percent=percent, digits=3)
        unit = " %" if percent else ""
        rows.append((name.replace("_", " ").capitalize(), mean + unit + (f" ({bounds})" if bounds else "")))
    return rows


def _figures(*figures: tuple[str | None, str, str]) -> list[Figure]:
    return [Figure(svg, name, caption) for svg, name, caption in figures if svg is not None]


def _comparison(results: Mapping[str, Any]) -> list[Figure]:
    if not (baseline := results.get("baseline")):
        return []
    wins = plots.by_policy(results, "win_rate", xlabel=f"Wins against {results_lib.label(baseline)} (%)", scale=100)
    score = plots.by_policy(results, "score", xlabel="Score", against=baseline)
    judge = (results.get("judges") or ["the judge"])[0]
    return _figures(
        (wins, "Win rates", f"Share of answers that {judge} prefers to the baseline's. A tie counts as one half."),
        (score, "Scores", f"Mean score of the answers under {judge}. The dashed line marks the baseline."),
    )


def _distillation(results: Mapping[str, Any]) -> list[Figure]:
    if not (found := results.get("distillation")):
        return []
    exact = "exact over the vocabulary, on the answers of the teacher"
    kl = f"over {found['classes']} classes, on held-out rows" if found.get("classes") else exact
    gold = plots.by_policy(results, "gold", xlabel="Gold utility", against="prompted_teacher")
    return _figures(
        (
            distillation_plots.kl_before_and_after(found),
            "KL from the teacher",
            f"Mean KL per token, {kl}. The teacher has read its prompt, if it has one; the student has not. Lines are "
            "95 % intervals.",
        ),
        (gold, "Gold utility", "The dashed line marks the teacher with its prompt."),
    )


def _preference(results: Mapping[str, Any]) -> list[Figure]:
    caption = (
        "Policies to the right of the dashed 50 % line are preferred to SFT. Filled markers are win rates by gold "
        "utility. Open markers are win rates by held-out labelers, whose comparisons were not used to train the reward "
        "model. Lines are 95 % intervals."
    )
    mean, bounds = results_lib.format_parts(results.get("null_check"), percent=True)
    if mean != results_lib.MISSING:
        caption += f" As a check, the win rate of SFT against itself is {mean} %" + (f" ({bounds})." if bounds else ".")
    return _figures((plots.win_rates(results), "Win rates against SFT", caption))


def _calibration(results: Mapping[str, Any]) -> list[Figure]:
    caption = (
        "Accuracy as a function of the difference between the two scores of a pair. Points below the dashed curve mean "
        "that the reward model is overconfident; points above the curve mean that it is underconfident. Vertical lines "
        "are 95 % intervals. The lower panel shows the number of pairs in each bin."
    )
    return _figures((plots.calibration(results), "Calibration", caption))


def _reward_model(results: Mapping[str, Any]) -> list[Figure]:
    model = results.get("reward_model") or {}
    rho = results_lib.finite((model.get("thresholds") or {}).get("spearman"))
    thresholds = (
        "Accuracy on the pairs in which both answers reach a minimum score. If it falls as this minimum rises, the "
        "reward model ranks good answers less reliably than bad ones."
    )
    if rho is not None:
        correlation = results_lib.format_number(rho.mean, digits=2)
        thresholds += f" The rank correlation of accuracy and minimum score is {correlation}."
    return _figures(
        (
            reward_plots.strata(model.get("strata"), model.get("accuracy")),
            "Accuracy by group",
            "Accuracy on the n pairs of each group, with 95 % intervals. A tie counts one half. The dotted line is "
            "the accuracy on all pairs. A star marks groups of fewer than 20 independent conversations, whose "
            "intervals are rough.",
        ),
        (
            reward_plots.generalisation(model.get("gap")),
            "Training and held-out pairs",
            _gap_caption(model.get("gap")),
        ),
        (reward_plots.thresholds(model.get("thresholds")), "Accuracy among high scores", thresholds),
        (
            reward_plots.length_bias(model.get("length_bias")),
            "Length bias",
            "A reward model is biased towards length if it prefers the longer answer more often than the labelers do "
            "and is less accurate on pairs whose shorter answer is better. Lines are 95 % intervals.",
        ),
    )


def goodhart_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows (name, text) for each policy's gains over SFT-mix in reward-model score and gold utility."""
    rows = []
    for policy, gains in (results.get("goodhart") or {}).items():
        for key, name in (("reward_gained", "RM score"), ("gold_gained", "gold utility")):
            mean, bounds = results_lib.format_parts(gains.get(key), digits=3)
            if mean != results_lib.MISSING:
                text = f"{mean} ({bounds})" if bounds else mean
                text += ", while the RM score rose" if key == "gold_gained" and gains.get("gamed") else ""
                rows.append((f"{results_lib.label(policy)}: gain in {name} over SFT-mix", text))
    return rows


def _gap_caption(gap: Mapping[str, Any] | None) -> str:
    caption = (
        "The reward model has overfitted if the 95 % interval of the difference between training and held-out accuracy "
        "is above 0, even if the intervals of the two accuracies overlap."
    )
    mean, bounds = results_lib.format_parts((gap or {}).get("accuracy_gap"), percent=True)
    if mean == results_lib.MISSING:
        return caption
    return caption + f" Here the difference is {mean} percentage points" + (f" ({bounds})." if bounds else ".")


def _overoptimisation(results: Mapping[str, Any]) -> list[Figure]:
    halves, curves = results.get("split_halves"), results.get("overoptimisation")
    fits = reward_plots.fit_summary(curves)
    return _figures(
        (
            reward_plots.split_halves(halves, (halves or {}).get("steps")),
            "Train and test reward model",
            "The two reward models are trained on different halves of the comparisons; the policy is optimised against "
            "the train model only. A dotted line, if there is one, marks the checkpoint from which on the score under "
            "the train model has risen significantly more than the score under the test model.",
        ),
        (
            reward_plots.overoptimisation(curves),
            "Gold utility against KL",
            "Points are measured gains. Lines are fits of the two functional forms of Gao et al. (2022); the better "
            "fit is solid, with a star at its peak." + (f" {fits}." if fits else ""),
        ),
    )


def _frontiers(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    stages = [s for s in _stages(metrics) if s.startswith("ppo")]
    source = " Curves are means over rollouts, which answer training prompts; best-of-n answers held-out prompts."
    reward, gold = ([pair for s in stages if (pair := plots.paired(metrics, s, key))] for key in ("reward", "gold"))
    linear = f"If the curve is straight, the reward is linear in the square root of the KL{_linearity(reward)}.{source}"
    falling = f"At the same KL, a higher utility is better. If a curve falls, the policy is over-optimised.{source}"
    return _figures(
        (plots.frontier(results, reward, "reward", ylabel="Reward-model score"), "Reward against KL", linear),
        (plots.frontier(results, gold, "gold", ylabel="Gold utility"), "Gold utility against KL", falling),
    )


def _linearity(curves: Sequence[tuple[plots.Curve, plots.Curve]]) -> str:
    """Returns, in parentheses, the R² of linear fits of each curve in √KL and in KL."""
    texts = []
    for kl, score in curves:
        positive = kl.y.clip(min=0)
        root, linear = plots.line_fit(positive**0.5, score.y), plots.line_fit(positive, score.y)
        if root is not None and linear is not None:
            texts.append(f"{results_lib.label(kl.stage)}: linear fits have R² {root:.2f} in √KL and {linear:.2f} in KL")
    return f" ({'; '.join(texts)})" if texts else ""


def _categories(results: Mapping[str, Any]) -> list[Figure]:
    caption = "Mean gold utility of the answers in each prompt category. Thin lines are 95 % intervals."
    return _figures((plots.categories(results), "Gold utility by category", caption))


def _alignment_tax(results: Mapping[str, Any]) -> list[Figure]:
    skill = plots.by_policy(results, "skill_accuracy", xlabel="Skill accuracy (%)", scale=100, against="sft_mix")
    loss = plots.by_policy(results, "pretraining_loss", xlabel="Pretraining loss (nats per token)", against="sft_mix")
    return _figures(
        (
            skill,
            "Skills",
            "The dashed line marks SFT-mix, the policy before PPO or DPO. Policies to its left have lost skills.",
        ),
        (
            loss,
            "Pretraining text",
            "Policies to the right of the dashed line predict this text less well than SFT-mix.",
        ),
    )


def _truthfulness_and_harm(results: Mapping[str, Any]) -> list[Figure]:
    truthful = plots.by_policy(results, "truthful_rate", xlabel="Truthful answers (%)", scale=100)
    harm = plots.by_policy(results, "harm_rate", xlabel="Harmful answers (%)", scale=100)
    return _figures(
        (truthful, "Truthfulness", "Higher is better. The dashed line marks SFT."),
        (harm, "Harm", "Lower is better. The dashed line marks SFT."),
    )


def _stages(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the stages of the metrics: the known stages in display order, then the others in order of appearance."""
    stages = dict.fromkeys(r["stage"] for r in metrics if r.get("stage") is not None)
    return [s for s in STAGES if s in stages] + [s for s in stages if s not in STAGES]


def learning_curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Figure]]]:
    """Returns (title, figures) for each group of stages, with one figure per metric for all stages of the group."""
    groups: dict[str, list[str]] = {}
    for stage in _stages(metrics):
        groups.setdefault(STAGES.get(stage, stage.replace("_", " ")), []).append(stage)
    return [(name, _group_curves(metrics, stages)) for name, stages in groups.items()]


def _group_curves(metrics: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> list[Figure]:
    records = {s: [r for r in metrics if r.get("stage") == s] for s in stages}
    figures = []
    for name, m in METRICS.items():
        curves = [c for s in stages if (c := plots.curve(records[s], s, name))]
        if curves:
            svg = plots.learning_curve(curves, ylabel=m.ylabel)
            figures.append(Figure(svg, m.name, m.caption, m.minor))
    return figures


def transcripts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the first `MAX_TRANSCRIPTS` transcripts, with policies in display order and formatted gold utilities."""
    shown = []
    for t in (results.get("transcripts") or [])[:MAX_TRANSCRIPTS]:
        answers, gold = t.get("answers") or {}, t.get("gold") or t.get("scores") or {}
        shown.append(
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
    return shown


def flatten(settings: Mapping[str, Any], *, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yields nested settings as (dotted name, text)."""
    for name, setting in settings.items():
        if isinstance(setting, Mapping) and setting:
            yield from flatten(setting, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(setting)
