"""Plots of diagnostics for reward models and for the policies that are trained on them.

The plotting functions accept results as stored in results.json, where named tuples are dictionaries and estimates are
lists ``[mean, low, high]``. They return inline SVG, or None if there are no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.report import plots
from rlhf_jax.report import results as results_lib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Mapping[str, Any]

LENGTH_ROWS = {
    "longer_wins": "labelers prefer longer",
    "shorter_wins": "labelers prefer shorter",
    "prefers_longer": "model prefers longer",
    "accuracy_where_longer": "accuracy, longer is better",
    "accuracy_where_shorter": "accuracy, shorter is better",
}
GAP_ROWS = {"train_accuracy": "training pairs", "validation_accuracy": "held-out pairs"}


def strata(groups: Mapping[str, Sequence[Numbers]] | None, overall: Any = None) -> str | None:
    """Plots the accuracy on each stratum, with its interval and number of pairs.

    ``groups`` maps a criterion such as "annotator" to one `Stratum` per value. ``overall``, the accuracy on all pairs,
    is drawn as a vertical line.
    """
    rows: list[tuple[str, results_lib.Interval | None]] = []
    for name, members in (groups or {}).items():
        accuracies = [(each, results_lib.finite(each.get("accuracy"))) for each in members]
        group = [
            (f"{_name(each)} (n = {each['count']}){results_lib.ROUGH_MARK * results_lib.is_rough(each)}", accuracy)
            for each, accuracy in accuracies
            if accuracy
        ]
        # A single criterion needs no heading.
        rows += [(name, None), *group] if group and len(groups or {}) > 1 else group
    return _rates(rows, xlabel="Accuracy (%)", line=results_lib.finite(overall))


def length_bias(bias: Numbers | None) -> str | None:
    """Plots a `LengthBias`.

    The rows show how often the labelers prefer the longer and the shorter answer, how often the model prefers the
    longer answer, and the model's accuracy on pairs whose longer or shorter answer is better.
    """
    return _rates(_named_rates(bias, LENGTH_ROWS), xlabel="Pairs (%)")


def generalisation(gap: Numbers | None) -> str | None:
    """Plots a `GeneralisationGap`: accuracy on training pairs and on held-out pairs."""
    return _rates(_named_rates(gap, GAP_ROWS), xlabel="Accuracy (%)")


def thresholds(scan: Numbers | None) -> str | None:
    """Plots a `ThresholdScan`: accuracy on the pairs whose two scores reach a threshold, and the number of pairs."""
    columns = zip(*((scan or {}).get(key) or () for key in ("threshold", "accuracy", "lo", "hi", "count")))
    rows = [row for row in columns if results_lib.finite(row[1])]
    if not rows:
        return None
    x, mean, low, high, count = np.array(rows, float).T
    c = plots.color("reward_model")
    with plots.axes(height=3.2, rows=(3, 1)) as (svg, (top, bottom)):
        top.axhline(50, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        top.vlines(x, 100 * low, 100 * high, color=c, linewidth=1.2)
        top.plot(x, 100 * mean, "o-", color=c, markersize=4, linewidth=0.8)
        top.set_ylabel("Accuracy (%)")
        top.grid(axis="y")
        bottom.plot(x, count, "o-", color=plots.color("soft"), markersize=3, linewidth=0.8)
        bottom.set(xlabel="Minimum score of both answers", ylabel="Pairs", ylim=(0, 1.1 * count.max()))
    return svg[0]


def split_halves(halves: Numbers | None, steps: Sequence[float] | None = None) -> str | None:
    """Plots a `SplitHalves`: scores from the train and the test reward model during a run, and their difference.

    A vertical line marks the checkpoint ``parted``, if there is one. ``steps`` are the training steps of the
    checkpoints; by default, the checkpoints are numbered from 0.
    """
    names = ("train", "test", "gap", "lo", "hi")
    if not halves or not halves.get("gap") or any(len(halves[name]) != len(halves["gap"]) for name in names):
        return None
    train, test, gap, low, high = (np.array(halves[name], float) for name in names)
    x, parted = np.arange(len(gap)) if steps is None else np.array(steps, float), halves.get("parted")
    with plots.axes(height=3.4, rows=(3, 2)) as (svg, (top, bottom)):
        top.plot(x, train, "o-", color=plots.color("ppo"), markersize=3, label="train reward model")
        top.plot(x, test, "s-", color=plots.color("sft"), markersize=3, label="test reward model")
        top.set_ylabel("Gain in score")
        plots.legend(top)
        bottom.axhline(0, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        bottom.plot(x, gap, "o-", color=plots.color("other"), markersize=3)
        bottom.vlines(x, low, high, color=plots.color("other"), linewidth=1.2)
        bottom.set(xlabel="Checkpoint" if steps is None else "Step", ylabel="Difference")
        for ax in (top, bottom):
            ax.grid(axis="y")
            if parted is not None:
                ax.axvline(float(x[parted]), color=plots.color("ink"), linewidth=0.9, linestyle=(0, (1, 2)))
    return svg[0]


def overoptimisation(curves: Sequence[Numbers] | None) -> str | None:
    """Plots gains against the square root of the KL, with the fits of both functional forms.

    Each curve has a ``name``, the lists ``kl`` and ``gains``, optionally ``lo`` and ``hi``, and ``fits``. The fits are
    `diagnostics.overoptimisation.Fit` tuples as dictionaries, with the name of the form as ``form``. The better fit
    comes first and is drawn as a solid line with a star at its peak.
    """
    from rlhf_jax.diagnostics import overoptimisation as over  # imports scipy

    drawn = [each for each in curves or () if each.get("kl")]
    if not drawn:
        return None
    forms = {form.name: form for form in (over.BEST_OF_N, over.REINFORCEMENT)}
    styles = {over.BEST_OF_N.name: (0, (5, 1.5)), over.REINFORCEMENT.name: (0, (1, 1.5))}
    colors = ("ppo", "best_of_n", "ppo_ptx", "sft", "other")
    with plots.axes(height=3.2) as (svg, (ax,)):
        for place, each in enumerate(drawn):
            c = plots.color(colors[place % len(colors)])
            x, y = np.sqrt(np.maximum(np.array(each["kl"], float), 0)), np.array(each["gains"], float)
            ax.plot(x, y, "o", color=c, markersize=3, label=each["name"])
            if each.get("lo") and each.get("hi"):
                low, high = (np.array(each[end], float) for end in ("lo", "hi"))
                ends = np.isfinite(low) & np.isfinite(high)
                ax.vlines(x[ends], low[ends], high[ends], color=c, linewidth=0.9)
            for rank, fit in enumerate(each.get("fits") or ()):
                a, b = fit["alpha"][0], fit["beta"][0]
                d = np.linspace(x.max() / 200, x.max(), 200)
                curve = d * (a - b * forms[fit["form"]].bend(d))
                ax.plot(
                    np.append(0.0, d),
                    np.append(0.0, curve),
                    color=c,
                    alpha=0.5 if rank else 1.0,
                    linewidth=1.0 if rank else 1.5,
                    linestyle=styles[fit["form"]] if rank else "-",
                )
                if rank == 0:
                    _mark_peak(ax, fit, most=float(x.max()), color=c)
        ax.set(xlabel="√KL from the initial policy (√nats)", ylabel="Gain in gold utility")
        ax.set_xlim(left=0)
        ax.grid(axis="y")
        plots.legend(ax)
    return svg[0]


def fit_summary(curves: Sequence[Numbers] | None) -> str:
    """Describes the fits of each curve: R² of both functional forms, and the peak of the better form."""
    texts = []
    for each in curves or ():
        for rank, fit in enumerate(each.get("fits") or ()):
            share = results_lib.finite(fit["r_squared"])  # None if the gains do not vary
            text = f"R² {results_lib.MISSING if share is None else f'{share.mean:.3f}'} with the {fit['form']} form"
            if rank == 0 and results_lib.finite(fit["peak_distance"]):
                mean, bounds = results_lib.format_parts(fit["peak_distance"], digits=2)
                text += f", peak at √KL = {mean}" + (f" ({bounds})" if bounds else "")
            elif rank == 0:
                text += ", no peak"
            texts.append((f"{each['name']}: " if rank == 0 else "") + text)
    return "; ".join(texts)


def _mark_peak(ax: Axes, fit: Numbers, *, most: float, color: str) -> None:
    distance, gain = results_lib.finite(fit.get("peak_distance")), results_lib.finite(fit.get("peak_gain"))
    if distance is not None and gain is not None and distance.mean <= most:
        ax.plot([distance.mean], [gain.mean], "*", color=color, markersize=9, markeredgecolor=plots.color("paper"))


def _named_rates(values: Numbers | None, names: Mapping[str, str]) -> list[tuple[str, results_lib.Interval]]:
    rates = [(name, results_lib.finite((values or {}).get(key))) for key, name in names.items()]
    return [(name, rate) for name, rate in rates if rate]


def _rates(
    rows: Sequence[tuple[str, results_lib.Interval | None]], *, xlabel: str, line: results_lib.Interval | None = None
) -> str | None:
    """Plots rates as points with intervals; a row without a rate is a heading."""
    if not any(rate for _, rate in rows):
        return None
    with plots.axes(height=0.75 + 0.2 * len(rows)) as (svg, (ax,)):
        ax.axvline(50, color=plots.color("soft"), linewidth=1, linestyle=(0, (4, 3)))
        if line is not None:
            ax.axvline(100 * line.mean, color=plots.color("reward_model"), linewidth=0.9, linestyle=(0, (1, 2)))
        for row, (name, rate) in enumerate(rows):
            if rate is not None:
                plots.point(ax, rate, row, "reward_model", scale=100)
            else:  # inside the axes, so that a long heading does not shrink them
                ax.text(0, row, name, va="center", fontsize=8, fontweight="bold", backgroundcolor=plots.color("paper"))
        ax.set_xlim(-1.5, 101.5)
        plots.label_rows(ax, [name if rate else "" for name, rate in rows])
        ax.set_xlabel(xlabel)
    return svg[0]


def _name(stratum: Numbers) -> str:
    name = stratum.get("name")
    if name is None or (isinstance(name, float) and math.isnan(name)):
        return "unknown"
    text = str(name)
    return text if len(text) <= 24 else text[:23] + "…"
