"""The report's plots: each function takes results or metrics and gives inline SVG, or None where there is no data.

Text stays text in the SVG, and every colour in it is replaced by a CSS variable of the page, so that one drawing serves
light and dark mode, scales with the screen and weighs little. One colour and one marker belong to one policy.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.report import results as results_lib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name of the CSS variable -> (light, dark). Policies: Okabe and Ito's colour-blind-safe set, darkened or lightened
# until each stands out from its paper. No two light colours may be equal: they are how a colour is found in the SVG.
COLORS = {
    "paper": ("#fffefb", "#16181b"),
    "ink": ("#202124", "#e8e6e1"),
    "soft": ("#66686c", "#a3a5a8"),
    "rule": ("#dfdcd5", "#34373c"),
    "base": ("#7b7b7b", "#9c9c9c"),
    "sft": ("#0072b2", "#4ea5e6"),
    "sft_mix": ("#4a9fd4", "#93cff4"),
    "ppo": ("#d55e00", "#ff8b42"),
    "ppo_ptx": ("#008f68", "#2fc699"),
    "best_of_n": ("#b0609c", "#dc98cc"),
    "reward_model": ("#a88400", "#e0b934"),
    "other": ("#5d52a3", "#a79df0"),
}
LINES = {"sft_mix": (0, (5, 1.5))}  # its blue is SFT's, lighter
MARKERS = {"base": "o", "sft": "s", "sft_mix": "D", "ppo": "^", "ppo_ptx": "v", "best_of_n": "P"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_jax",  # the same numbers give the same bytes
    "text.parse_math": False,  # a dollar sign in a category's name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.edgecolor": COLORS["soft"][0],
    "axes.labelcolor": COLORS["ink"][0],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": COLORS["ink"][0],
    "xtick.color": COLORS["soft"][0],
    "ytick.color": COLORS["soft"][0],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": COLORS["rule"][0],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
WIDTH = 4.5  # inches; a panel is read at 1.0 to 1.4 times this, so text is 9 to 12 pixels on a phone and on a desk
MAX_POINTS = 240  # of one curve


class Curve(NamedTuple):
    """One stage's values of one metric."""

    stage: str
    x: np.ndarray
    y: np.ndarray


def color(name: str) -> str:
    """The light colour of a policy, a stage or a part of the page."""
    return COLORS.get({"pretrain": "base"}.get(name, name), COLORS["other"])[0]


@contextlib.contextmanager
def axes(out: list[str], *, height: float, rows: Sequence[float] = (1,)) -> Iterator[list[Axes]]:
    """Axes to draw on, stacked with the given relative heights; at the end the figure's SVG is put into ``out``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=list(rows))[:, 0]
        yield list(axes)
        out.append(_svg(figure))


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for inclusion in a page: no header, no metadata, no fixed size or colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Two figures may hold the same marker or clip path under one id; in a page the ids must differ, for one of the two
    # figures might lie in a closed section.
    prefix = f"f{zlib.crc32(text.encode()):08x}"
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), prefix=prefix), text)
    size = re.search(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', text)
    assert size is not None, "matplotlib wrote an SVG without a viewBox"
    width, height = size.groups()
    opening = f'<svg role="img" viewBox="0 0 {width} {height}" style="max-width: {1.4 * float(width):.0f}px">'
    return opening + text[size.end() :]


def _tag(tag: str, *, prefix: str) -> str:
    """One tag of an SVG, made ready for a page. What stands between tags is text, and stays as it is."""
    if tag.startswith("<g id="):
        return "" if tag.endswith("/>") else "<g>"  # nobody points at a group
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag).replace("xlink:href", "href")
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;?', "", tag)
    tag = re.sub(r"(\d+\.\d\d)\d+", r"\1", tag)
    names = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: names.get(found.group(), found.group()), tag)


def win_rates(results: Mapping[str, Any]) -> str | None:
    """Win rate against SFT of every policy, by gold filled, by held-out labelers open, with the 50 % line."""
    keys = ("gold_win_rate_vs_sft", "heldout_win_rate_vs_sft")
    rates = {
        p: [results_lib.finite(results_lib.value(results, p, key)) for key in keys]
        for p in results_lib.policies(results)
    }
    rows = [p for p, found in rates.items() if any(found)]
    if not rows:
        return None
    out: list[str] = []
    with axes(out, height=0.9 + 0.42 * len(rows)) as (ax,):
        ax.axvline(50, color=color("soft"), linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xlim(0, 100)
        for row, policy in enumerate(rows):
            for offset, filled, rate in zip((-0.17, 0.17), (True, False), rates[policy]):
                if rate is not None:
                    point(ax, rate, row + offset, policy, scale=100, filled=filled)
        _policy_rows(ax, rows)
        ax.set_xlabel("Wins against SFT (% of held-out prompts)")
        if any(found[0] for found in rates.values()) and any(found[1] for found in rates.values()):
            handles = [_marker_handle(filled) for filled in (True, False)]
            legend(ax, handles=handles, labels=["gold utility", "held-out labelers"])
    return out[0]


def by_policy(
    results: Mapping[str, Any], key: str, *, xlabel: str, scale: float = 1.0, against: str = "sft"
) -> str | None:
    """One number of every policy as dots, with the value of the policy ``against`` as a line to compare with."""
    found = {p: results_lib.finite(results_lib.value(results, p, key)) for p in results_lib.policies(results)}
    rows = [p for p, it in found.items() if it is not None]
    if not rows:
        return None
    out: list[str] = []
    with axes(out, height=0.75 + 0.27 * len(rows)) as (ax,):
        start = found.get(against)
        if start is not None:
            ax.axvline(scale * start.mean, color=color(against), linewidth=0.9, linestyle=(0, (4, 3)))
        for row, policy in enumerate(rows):
            it = found[policy]
            if it is not None:
                point(ax, it, row, policy, scale=scale)
        ax.margins(x=0.08)
        _policy_rows(ax, rows)
        ax.set_xlabel(xlabel)
    return out[0]


def categories(results: Mapping[str, Any]) -> str | None:
    """Gold utility by category of prompt: grouped bars, SFT against PPO and PPO-ptx."""
    key = "gold_by_category"
    shown = [p for p in ("sft", "ppo", "ppo_ptx") if results_lib.value(results, p, key)]
    table = {p: {c: results_lib.finite(v) for c, v in results_lib.value(results, p, key).items()} for p in shown}
    names = list(dict.fromkeys(c for row in table.values() for c, it in row.items() if it))
    if not names:
        return None
    out: list[str] = []
    bar = 0.8 / len(shown)
    with axes(out, height=0.9 + (0.12 + 0.15 * len(shown)) * len(names)) as (ax,):
        for i, policy in enumerate(shown):
            for row, name in enumerate(names):
                it = table[policy].get(name)
                if it is None:
                    continue
                y = row - 0.4 + bar * (i + 0.5)
                ax.barh(y, it.mean, height=0.86 * bar, color=color(policy))
                if it.low is not None and it.high is not None:
                    ax.plot([it.low, it.high], [y, y], color=color("ink"), linewidth=0.9, solid_capstyle="butt")
        ax.set_yticks(range(len(names)), names, color=color("ink"))
        ax.set_ylim(len(names) - 0.45, -0.55)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color=color("soft"), linewidth=0.8)
        ax.grid(axis="x")
        ax.set_xlabel("Gold utility (mean)")
        from matplotlib.patches import Patch

        legend(ax, handles=[Patch(color=color(p)) for p in shown], labels=[results_lib.label(p) for p in shown])
    return out[0]


def calibration(results: Mapping[str, Any]) -> str | None:
    """Accuracy of the reward model by score gap against the logistic curve, and how many comparisons each gap has."""
    bins = ((results.get("reward_model") or {}).get("calibration") or {}).get("bins") or []
    found = [b for b in bins if results_lib.finite(b.get("gap")) and results_lib.finite(b.get("accuracy"))]
    if not found:
        return None
    gap, accuracy = (np.array([float(b[key]) for b in found]) for key in ("gap", "accuracy"))
    counts = [results_lib.finite(b.get("count")) for b in found]
    out: list[str] = []
    with axes(out, height=3.7, rows=(3, 1)) as (top, bottom):
        low, high = min(0.0, float(gap.min())), float(gap.max()) * 1.06
        x = np.linspace(low, high, 80)
        top.plot(x, 100 / (1 + np.exp(-x)), color=color("soft"), linestyle=(0, (4, 3)), label="perfectly calibrated")
        for g, b in zip(gap, found):
            low_end, high_end = (results_lib.finite(b.get(end)) for end in ("lo", "hi"))
            if low_end and high_end:
                ends = [100 * low_end.mean, 100 * high_end.mean]
                top.plot([g, g], ends, color=color("reward_model"), linewidth=1)
        top.plot(gap, 100 * accuracy, "o", color=color("reward_model"), markersize=5, label="reward model")
        top.set_ylabel("Accuracy (%)")
        top.grid(axis="y")
        top.legend(loc="lower right")
        known = [(g, c.mean) for g, c in zip(gap, counts) if c is not None]
        bottom.vlines([g for g, _ in known], 0, [c for _, c in known], color=color("rule"), linewidth=7)
        most = max([c for _, c in known], default=1.0)
        bottom.set(ylim=(0, 1.1 * most), yticks=[0, most], ylabel="Pairs")
        bottom.set_xlabel("Gap between the two scores (reward-model units, log odds)")
        bottom.set_xlim(low - 0.02 * high, high)
    return out[0]


def curve(records: Iterable[Mapping[str, Any]], stage: str, name: str) -> Curve | None:
    """The finite values of one metric of one stage, or None where there are none."""
    found = [
        (results_lib.finite(r.get("step")), results_lib.finite(r.get(name))) for r in records if r.get("stage") == stage
    ]
    points = np.array([(step.mean, y.mean) for step, y in found if step and y], dtype=float)
    return Curve(stage, points[:, 0], points[:, 1]) if len(points) else None


def learning_curve(curves: Sequence[Curve], *, ylabel: str) -> str:
    """Curves over training steps: the logged values faint, their running mean strong."""
    out: list[str] = []
    with axes(out, height=2.3) as (ax,):
        for c in curves:
            x, y = thin(c.x), thin(c.y)
            smooth = running_mean(y, width=max(1, len(y) // 20))
            if len(y) >= 20:
                ax.plot(x, y, color=color(c.stage), alpha=0.3, linewidth=0.8)
            marker = "o" if len(y) == 1 else None
            style = LINES.get(c.stage, "-")
            ax.plot(x, smooth, color=color(c.stage), ls=style, marker=marker, label=results_lib.label(c.stage))
        ax.set(xlabel="Step", ylabel=ylabel)
        ax.grid(axis="y")
        if len(curves) > 1:
            legend(ax)
    return out[0]


def frontier(results: Mapping[str, Any], curves: Sequence[tuple[Curve, Curve]], key: str, *, ylabel: str) -> str | None:
    """A score against the square root of the KL spent for it, along each RL run, with best-of-n to compare with.

    Args:
        results: for the best-of-n line.
        curves: (KL, score) of each run.
        key: "reward" or "gold".
        ylabel: name of the score, with its unit.
    """
    bon = [(results_lib.finite(b.get("kl")), results_lib.finite(b.get(key)), b.get("n")) for b in _best_of_n(results)]
    points = [(math.sqrt(max(0.0, kl.mean)), y.mean, n) for kl, y, n in bon if kl is not None and y is not None]
    if not curves:
        return None
    out: list[str] = []
    with axes(out, height=3.1) as (ax,):
        for kl, score in curves:
            # An estimate of a KL near 0 can be negative; it is drawn at 0.
            x, y = np.sqrt(np.maximum(thin(kl.y), 0)), thin(score.y)
            ax.plot(x, y, MARKERS.get(kl.stage, "o"), color=color(kl.stage), alpha=0.3, markersize=2.6, mew=0)
            x, y = (thin(z, most=16) for z in (x, y))
            ax.plot(x, y, color=color(kl.stage), label=results_lib.label(kl.stage))
        if points:
            c = color("best_of_n")
            ax.plot([p[0] for p in points], [p[1] for p in points], "P--", color=c, markersize=4.5, label="best-of-n")
            x, y, n = points[-1]
            if n is not None:
                ax.annotate(f"n = {n}", (x, y), (-4, 4), textcoords="offset points", ha="right", fontsize=7.5, color=c)
        ax.set(xlabel="√KL from the reference (√nats, per answer)", ylabel=ylabel)
        ax.set_xlim(left=0)
        ax.grid(axis="y")
        legend(ax)
    return out[0]


def _best_of_n(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    alone = (results.get("policies") or {}).get("best_of_n")
    return results.get("best_of_n_curve") or ([alone] if alone else [])


def paired(records: Sequence[Mapping[str, Any]], stage: str, key: str) -> tuple[Curve, Curve] | None:
    """KL and a score at the steps that have both."""
    both = [r for r in records if results_lib.finite(r.get("kl")) and results_lib.finite(r.get(key))]
    kl, score = curve(both, stage, "kl"), curve(both, stage, key)
    return None if kl is None or score is None else (kl, score)


def line_fit(x: np.ndarray, y: np.ndarray) -> float | None:
    """R² of a straight line through (x, y); None for fewer than 3 points or where one of the two is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def thin(y: np.ndarray, *, most: int = MAX_POINTS) -> np.ndarray:
    """At most ``most`` points: means of equal runs of neighbours."""
    if len(y) <= most:
        return y
    return np.array([part.mean() for part in np.array_split(y, most)])


def running_mean(y: np.ndarray, *, width: int) -> np.ndarray:
    """Mean over up to ``width`` neighbours on either side.

    At the start as many after a point as before it, so that a steep start stays steep; at the end only those before,
    so that the last value does not stand alone.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    before = np.minimum(width, i)
    after = np.minimum(before, len(y) - 1 - i)
    return (total[i + after + 1] - total[i - before]) / (before + after + 1)


def point(
    ax: Axes,
    it: results_lib.Interval,
    y: float,
    policy: str,
    *,
    scale: float = 1.0,
    filled: bool = True,
    digits: int = 3,
) -> None:
    """A dot with its interval, and both in figures at the right edge, where they cover nothing.

    A side without an end is an arrow to the edge of the plot.
    """
    c, mean = color(policy), scale * it.mean
    if it.low is not None or it.high is not None:
        ends = [mean if end is None else scale * end for end in (it.low, it.high)]
        ax.plot(ends, [y, y], color=c, linewidth=1.3, solid_capstyle="butt")
    if (it.low is None) != (it.high is None):
        arrow = {"arrowstyle": "->", "color": c, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        edge = (0.0 if it.low is None else 1.0, y)
        ax.annotate("", edge, (mean, y), xycoords=ax.get_yaxis_transform(), textcoords="data", arrowprops=arrow)
    face = c if filled else color("paper")
    ax.plot([mean], [y], MARKERS.get(policy, "o"), color=c, markerfacecolor=face, markersize=5, mew=1.1)
    percent = scale == 100
    text, bounds = results_lib.format_parts(it, percent=percent, digits=digits)
    text += f" ({bounds})" if bounds else ""
    ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5, color=color("soft"))


def _policy_rows(ax: Axes, rows: Sequence[str]) -> None:
    ax.set_yticks(range(len(rows)), [results_lib.label(p) for p in rows], color=color("ink"))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def _marker_handle(filled: bool) -> Any:
    from matplotlib.lines import Line2D

    c = color("soft")
    return Line2D([], [], color=c, marker="o", markersize=5, mew=1.1, markerfacecolor=c if filled else color("paper"))


def legend(ax: Axes, **kwargs: Any) -> None:
    """A legend in one row above the axes, where it can cover nothing."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        borderaxespad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
        **kwargs,
    )
