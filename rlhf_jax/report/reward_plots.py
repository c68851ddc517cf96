"""Plots of what `diagnostics` says of reward models and of policies that are trained on them; see `report_plots`.

Each function takes what results.json holds, named tuples as dictionaries and estimates as ``[mean, low, high]``, and
gives inline SVG, or None where there is nothing to draw.
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
    "longer_wins": "rule “longer wins”",
    "shorter_wins": "rule “shorter wins”",
    "prefers_longer": "model prefers the longer",
    "accuracy_where_longer": "model, longer is right",
    "accuracy_where_shorter": "model, shorter is right",
}
GAP_ROWS = {"train_accuracy": "training pairs", "validation_accuracy": "other pairs"}


def strata(groups: Mapping[str, Sequence[Numbers]] | None, overall: Any = None) -> str | None:
    """Accuracy of every stratum with its interval and number of pairs, group by group.

    Args:
        groups: what the strata are by, such as "annotator" -> `Stratum` of each, as dictionaries.
        overall: accuracy of all pairs, a line to compare with.
    """
    rows: list[tuple[str, results_lib.Interval | None]] = []
    for name, members in (groups or {}).items():
        drawn = [(each, results_lib.finite(each.get("accuracy"))) for each in members]
        found = [(f"{_name(each)} (n = {each['count']})", it) for each, it in drawn if it]
        # One group needs no heading: the figure's name is enough.
        rows += [(name, None), *found] if found and len(groups or {}) > 1 else found
    return _rates(rows, xlabel="Accuracy (%)", line=results_lib.finite(overall))


def length_bias(bias: Numbers | None) -> str | None:
    """The rates of a `LengthBias`: how good length alone would be, and how the model goes by it."""
    found = [(name, results_lib.finite((bias or {}).get(key))) for key, name in LENGTH_ROWS.items()]
    return _rates([(name, it) for name, it in found if it], xlabel="Share of pairs (%)")


def generalisation(gap: Numbers | None) -> str | None:
    """Accuracy on training pairs and on others, of a `GeneralisationGap`."""
    found = [(name, results_lib.finite((gap or {}).get(key))) for key, name in GAP_ROWS.items()]
    return _rates([(name, it) for name, it in found if it], xlabel="Accuracy (%)")


def thresholds(scan: Numbers | None) -> str | None:
    """Accuracy of the pairs whose two scores pass a threshold, and how many they are, of a `ThresholdScan`."""
    columns = zip(*((scan or {}).get(key) or () for key in ("threshold", "accuracy", "lo", "hi", "count")))
    found = [row for row in columns if results_lib.finite(row[1])]
    if not found:
        return None
    x, mean, low, high, count = np.array(found, float).T
    out: list[str] = []
    c = plots.color("reward_model")
    with plots.axes(out, height=3.2, rows=(3, 1)) as (top, bottom):
        top.axhline(50, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        top.vlines(x, 100 * low, 100 * high, color=c, linewidth=1.2)
        top.plot(x, 100 * mean, "o-", color=c, markersize=4, linewidth=0.8)
        top.set_ylabel("Accuracy (%)")
        top.grid(axis="y")
        bottom.plot(x, count, "o-", color=plots.color("soft"), markersize=3, linewidth=0.8)
        bottom.set(xlabel="Least score of both answers", ylabel="Pairs", ylim=(0, 1.1 * count.max()))
    return out[0]


def split_halves(halves: Numbers | None, steps: Sequence[float] | None = None) -> str | None:
    """Train and test reward model along a run, and their gap with its interval, of a `SplitHalves`.

    ``steps`` are those of the checkpoints, which are counted without it.
    """
    names = ("train", "test", "gap", "lo", "hi")
    if not halves or not halves.get("gap") or any(len(halves[name]) != len(halves["gap"]) for name in names):
        return None
    train, test, gap, low, high = (np.array(halves[name], float) for name in names)
    x, parted = np.arange(len(gap)) if steps is None else np.array(steps, float), halves.get("parted")
    out: list[str] = []
    with plots.axes(out, height=3.4, rows=(3, 2)) as (top, bottom):
        top.plot(x, train, "o-", color=plots.color("ppo"), markersize=3, label="reward model trained on")
        top.plot(x, test, "s-", color=plots.color("sft"), markersize=3, label="reward model of the other half")
        top.set_ylabel("Score gained")
        plots.legend(top)
        bottom.axhline(0, color=plots.color("soft"), linewidth=0.9, linestyle=(0, (4, 3)))
        bottom.plot(x, gap, "o-", color=plots.color("other"), markersize=3)
        bottom.vlines(x, low, high, color=plots.color("other"), linewidth=1.2)
        bottom.set(xlabel="Checkpoint" if steps is None else "Step", ylabel="Gap")
        for ax in (top, bottom):
            ax.grid(axis="y")
            if parted is not None:
                ax.axvline(float(x[parted]), color=plots.color("ink"), linewidth=0.9, linestyle=(0, (1, 2)))
    return out[0]


def overoptimisation(curves: Sequence[Numbers] | None) -> str | None:
    """Gains against the root of the KL with both fitted forms, the better one solid and its peak marked.

    Each curve has ``name``, ``kl`` and ``gains`` (lists, and ``lo`` and ``hi`` where there are intervals), and
    ``fits``: `overoptimisation.Fit` as dictionaries, the better one first, ``form`` being the name of the form.
    """
    from rlhf_jax.diagnostics import overoptimisation as over  # here, for it imports scipy

    drawn = [each for each in curves or () if each.get("kl")]
    if not drawn:
        return None
    forms = {form.name: form for form in (over.BEST_OF_N, over.REINFORCEMENT)}
    styles = {over.BEST_OF_N.name: (0, (5, 1.5)), over.REINFORCEMENT.name: (0, (1, 1.5))}
    colors = ("ppo", "best_of_n", "ppo_ptx", "sft", "other")
    out: list[str] = []
    with plots.axes(out, height=3.2) as (ax,):
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
        ax.set(xlabel="√KL from the start (√nats)", ylabel="Gold gained over the start")
        ax.set_xlim(left=0)
        ax.grid(axis="y")
        plots.legend(ax)
    return out[0]


def overoptimisation_words(curves: Sequence[Numbers] | None) -> str:
    """What was fitted, in words: the better form of each curve, its R² and where it peaks."""
    told = []
    for each in curves or ():
        for rank, fit in enumerate(each.get("fits") or ()):
            share = results_lib.finite(fit["r_squared"])  # None where the gains do not vary.
            text = f"R² {results_lib.MISSING if share is None else f'{share.mean:.3f}'} by the form of {fit['form']}"
            if rank == 0:
                mean, bounds = results_lib.format_parts(fit["peak_distance"], digits=2)
                known = results_lib.finite(fit["peak_distance"])
                text += (
                    f", highest at √KL = {mean}" + (f" ({bounds})" if bounds else "") if known else ", never falling"
                )
            told.append((f"{each['name']}: " if rank == 0 else "") + text)
    return "; ".join(told)


def _mark_peak(ax: Axes, fit: Numbers, *, most: float, color: str) -> None:
    distance, gain = results_lib.finite(fit.get("peak_distance")), results_lib.finite(fit.get("peak_gain"))
    if distance is not None and gain is not None and distance.mean <= most:
        ax.plot([distance.mean], [gain.mean], "*", color=color, markersize=9, markeredgecolor=plots.color("paper"))


def _rates(
    rows: Sequence[tuple[str, results_lib.Interval | None]], *, xlabel: str, line: results_lib.Interval | None = None
) -> str | None:
    """Rates as points with intervals, 50 % marked; a row without a rate is a heading."""
    if not any(it for _, it in rows):
        return None
    out: list[str] = []
    with plots.axes(out, height=0.75 + 0.2 * len(rows)) as (ax,):
        ax.axvline(50, color=plots.color("soft"), linewidth=1, linestyle=(0, (4, 3)))
        if line is not None:
            ax.axvline(100 * line.mean, color=plots.color("reward_model"), linewidth=0.9, linestyle=(0, (1, 2)))
        for row, (name, it) in enumerate(rows):
            if it is not None:
                plots.point(ax, it, row, "reward_model", scale=100)
            else:  # within the axes, where a long one takes no room from them
                ax.text(0, row, name, va="center", fontsize=8, fontweight="bold", backgroundcolor=plots.color("paper"))
        ax.set_xlim(-1.5, 101.5)
        ax.set_yticks(range(len(rows)), [name if it else "" for name, it in rows], color=plots.color("ink"))
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.set_xlabel(xlabel)
    return out[0]


def _name(stratum: Numbers) -> str:
    name = stratum.get("name")
    if name is None or (isinstance(name, float) and math.isnan(name)):
        return "not given"
    text = str(name)
    return text if len(text) <= 24 else text[:23] + "…"
