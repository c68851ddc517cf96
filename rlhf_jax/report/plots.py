"""Plots of the report. Each plotting function accepts results or metrics and returns inline SVG.

Most functions return None if there are no data. Text remains text in the SVG, and colours are CSS variables of the
page. The plots therefore work in light and dark mode, scale with the screen and are small. The policies in
`results.POLICIES` have different colours and markers.
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

# CSS variable -> (light, dark). Policies have Okabe and Ito's colour-blind-safe colours, adjusted for contrast with the
# background. All light colours must differ, because the SVG's colours are replaced by value.
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
LINES = {"sft_mix": (0, (5, 1.5))}  # its colour is a lighter shade of SFT's
MARKERS = {"base": "o", "sft": "s", "sft_mix": "D", "ppo": "^", "ppo_ptx": "v", "best_of_n": "P"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_jax",  # identical numbers produce identical bytes
    "text.parse_math": False,  # dollar signs in category names are literal
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
WIDTH = 4.5  # inches; the page scales plots by 1.0 to 1.4, so text is 9 to 12 pixels high
MAX_POINTS = 240  # per curve


class Curve(NamedTuple):
    """Values of one metric in one stage."""

    stage: str
    x: np.ndarray
    y: np.ndarray


def color(name: str) -> str:
    """Returns the light colour of a policy, a stage or an element of the page."""
    return COLORS.get({"pretrain": "base"}.get(name, name), COLORS["other"])[0]


@contextlib.contextmanager
def axes(*, height: float, rows: Sequence[float] = (1,)) -> Iterator[tuple[list[str], list[Axes]]]:
    """Yields a list, to which the SVG is appended on exit, and vertically stacked axes of relative heights ``rows``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=list(rows))[:, 0]
        svg: list[str] = []
        yield svg, list(axes)
        svg.append(_svg(figure))


def _svg(figure: Figure) -> str:
    """Converts a figure to an ``<svg>`` element without header, metadata, fixed size or fixed colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Two figures may use the same id for a marker or a clip path, but ids must be unique in a page. Otherwise, a
    # reference could resolve to an id in a collapsed section, and nothing would be drawn.
    prefix = f"f{zlib.crc32(text.encode()):08x}"
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), prefix=prefix), text)
    size = re.search(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', text)
    assert size is not None, "matplotlib wrote an SVG without a viewBox"
    width, height = size.groups()
    opening = f'<svg role="img" viewBox="0 0 {width} {height}" style="max-width: {1.4 * float(width):.0f}px">'
    return opening + text[size.end() :]


def standalone(svg: str) -> str:
    """Returns the SVG of a plot as a file of its own, or for a page without the CSS variables, in the light colours."""
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"var\(--(\w+)\)", lambda match: COLORS[match[1]][0], svg)


def _tag(tag: str, *, prefix: str) -> str:
    """Adapts one SVG tag to the page: unique ids, fewer digits, CSS variables for colours."""
    if tag.startswith("<g id="):
        return "" if tag.endswith("/>") else "<g>"  # ids of groups are unused
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag).replace("xlink:href", "href")
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;?', "", tag)
    tag = re.sub(r"(\d+\.\d\d)\d+", r"\1", tag)
    names = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: names.get(match.group(), match.group()), tag)


def win_rates(results: Mapping[str, Any]) -> str | None:
    """Plots the win rate of each policy against SFT, by gold utility (filled) and by held-out labelers (open)."""
    keys = ("gold_win_rate_vs_sft", "heldout_win_rate_vs_sft")
    rates = {
        p: [results_lib.finite(results_lib.value(results, p, key)) for key in keys]
        for p in results_lib.policies(results)
    }
    rows = [p for p, pair in rates.items() if any(pair)]
    if not rows:
        return None
    with axes(height=0.9 + 0.42 * len(rows)) as (svg, (ax,)):
        ax.axvline(50, color=color("soft"), linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xlim(0, 100)
        for row, policy in enumerate(rows):
            for offset, filled, rate in zip((-0.17, 0.17), (True, False), rates[policy]):
                if rate is not None:
                    point(ax, rate, row + offset, policy, scale=100, filled=filled)
        label_rows(ax, [results_lib.label(p) for p in rows])
        ax.set_xlabel("Win rate against SFT (% of held-out prompts)")
        if any(gold for gold, _ in rates.values()) and any(heldout for _, heldout in rates.values()):
            handles = [_marker_handle(filled) for filled in (True, False)]
            legend(ax, handles=handles, labels=["gold utility", "held-out labelers"])
    return svg[0]


def by_policy(
    results: Mapping[str, Any], key: str, *, xlabel: str, scale: float = 1.0, against: str = "sft"
) -> str | None:
    """Plots one number per policy as a dot.

    Args:
        results: Content of results.json.
        key: Name of the number in the results of a policy.
        xlabel: Label of the x axis, with the unit.
        scale: Factor by which the number is multiplied; 100 for percentages.
        against: Policy whose value is shown as a vertical line.

    Returns:
        Inline SVG, or None if no policy has the number.
    """
    values = {p: results_lib.finite(results_lib.value(results, p, key)) for p in results_lib.policies(results)}
    rows = [(p, estimate) for p, estimate in values.items() if estimate is not None]
    if not rows:
        return None
    with axes(height=0.75 + 0.27 * len(rows)) as (svg, (ax,)):
        if (reference := values.get(against)) is not None:
            ax.axvline(scale * reference.mean, color=color(against), linewidth=0.9, linestyle=(0, (4, 3)))
        for row, (policy, estimate) in enumerate(rows):
            point(ax, estimate, row, policy, scale=scale)
        ax.margins(x=0.08)
        label_rows(ax, [results_lib.label(policy) for policy, _ in rows])
        ax.set_xlabel(xlabel)
    return svg[0]


def categories(results: Mapping[str, Any]) -> str | None:
    """Plots the gold utility of SFT, PPO and PPO-ptx by category of prompt, as grouped bars."""
    key = "gold_by_category"
    shown = [p for p in ("sft", "ppo", "ppo_ptx") if results_lib.value(results, p, key)]
    table = {p: {c: results_lib.finite(v) for c, v in results_lib.value(results, p, key).items()} for p in shown}
    names = list(dict.fromkeys(c for row in table.values() for c, estimate in row.items() if estimate))
    if not names:
        return None
    bar = 0.8 / len(shown)
    with axes(height=0.9 + (0.12 + 0.15 * len(shown)) * len(names)) as (svg, (ax,)):
        for i, policy in enumerate(shown):
            for row, name in enumerate(names):
                estimate = table[policy].get(name)
                if estimate is None:
                    continue
                y = row - 0.4 + bar * (i + 0.5)
                ax.barh(y, estimate.mean, height=0.86 * bar, color=color(policy))
                if estimate.low is not None and estimate.high is not None:
                    ends = [estimate.low, estimate.high]
                    ax.plot(ends, [y, y], color=color("ink"), linewidth=0.9, solid_capstyle="butt")
        label_rows(ax, names)
        ax.axvline(0, color=color("soft"), linewidth=0.8)
        ax.set_xlabel("Mean gold utility")
        from matplotlib.patches import Patch

        legend(ax, handles=[Patch(color=color(p)) for p in shown], labels=[results_lib.label(p) for p in shown])
    return svg[0]


def calibration(results: Mapping[str, Any]) -> str | None:
    """Plots the reward model's accuracy by score difference, the logistic curve, and the number of pairs per bin."""
    bins = ((results.get("reward_model") or {}).get("calibration") or {}).get("bins") or []
    bins = [b for b in bins if results_lib.finite(b.get("gap")) and results_lib.finite(b.get("accuracy"))]
    if not bins:
        return None
    gap, accuracy = (np.array([float(b[key]) for b in bins]) for key in ("gap", "accuracy"))
    counts = [results_lib.finite(b.get("count")) for b in bins]
    with axes(height=3.7, rows=(3, 1)) as (svg, (top, bottom)):
        low, high = min(0.0, float(gap.min())), float(gap.max()) * 1.06
        x = np.linspace(low, high, 80)
        top.plot(x, 100 / (1 + np.exp(-x)), color=color("soft"), linestyle=(0, (4, 3)), label="perfectly calibrated")
        for g, b in zip(gap, bins):
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
        bottom.set_xlabel("Difference between the two scores (log odds)")
        bottom.set_xlim(low - 0.02 * high, high)
    return svg[0]


def curve(records: Iterable[Mapping[str, Any]], stage: str, name: str) -> Curve | None:
    """Returns the finite values of a metric in a stage, or None if there are none."""
    pairs = [
        (results_lib.finite(r.get("step")), results_lib.finite(r.get(name))) for r in records if r.get("stage") == stage
    ]
    points = np.array([(step.mean, y.mean) for step, y in pairs if step and y], dtype=float)
    return Curve(stage, points[:, 0], points[:, 1]) if len(points) else None


def learning_curve(curves: Sequence[Curve], *, ylabel: str) -> str:
    """Plots curves over training steps: faint lines for the logged values, solid lines for their running means."""
    with axes(height=2.3) as (svg, (ax,)):
        for c in curves:
            x, y = downsample(c.x), downsample(c.y)
            smooth = running_mean(y, width=max(1, len(y) // 20))
            if len(y) >= 20:
                ax.plot(x, y, color=color(c.stage), alpha=0.3, linewidth=0.8)
            style = {"ls": LINES.get(c.stage, "-"), "marker": "o" if len(y) == 1 else None}
            ax.plot(x, smooth, color=color(c.stage), label=results_lib.label(c.stage), **style)
        ax.set(xlabel="Step", ylabel=ylabel)
        ax.locator_params(axis="x", integer=True)
        ax.grid(axis="y")
        if len(curves) > 1:
            legend(ax)
    return svg[0]


def frontier(results: Mapping[str, Any], curves: Sequence[tuple[Curve, Curve]], key: str, *, ylabel: str) -> str | None:
    """Plots a score against the square root of the KL along each RL run, with best-of-n for comparison.

    Args:
        results: Content of results.json, for the best-of-n line.
        curves: ``(KL, score)`` of each run.
        key: Name of the score in the best-of-n results, "reward" or "gold".
        ylabel: Name of the score.

    Returns:
        Inline SVG, or None if there are no curves.
    """
    bon = [(results_lib.finite(b.get("kl")), results_lib.finite(b.get(key)), b.get("n")) for b in _best_of_n(results)]
    points = [(math.sqrt(max(0.0, kl.mean)), y.mean, n) for kl, y, n in bon if kl is not None and y is not None]
    if not curves:
        return None
    with axes(height=3.1) as (svg, (ax,)):
        for kl, score in curves:
            # KL estimates near 0 can be negative.
            x, y = np.sqrt(np.maximum(downsample(kl.y), 0)), downsample(score.y)
            ax.plot(x, y, MARKERS.get(kl.stage, "o"), color=color(kl.stage), alpha=0.3, markersize=2.6, mew=0)
            x, y = (downsample(z, most=16) for z in (x, y))
            ax.plot(x, y, color=color(kl.stage), label=results_lib.label(kl.stage))
        if points:
            c = color("best_of_n")
            ax.plot([p[0] for p in points], [p[1] for p in points], "P--", color=c, markersize=4.5, label="best-of-n")
            x, y, n = points[-1]
            if n is not None:
                ax.annotate(f"n = {n}", (x, y), (-4, 4), textcoords="offset points", ha="right", fontsize=7.5, color=c)
        ax.set(xlabel="√KL from the reference (√nats per answer)", ylabel=ylabel)
        ax.set_xlim(left=0)
        ax.grid(axis="y")
        legend(ax)
    return svg[0]


def _best_of_n(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    policy = (results.get("policies") or {}).get("best_of_n")
    return results.get("best_of_n_curve") or ([policy] if policy else [])


def paired(records: Sequence[Mapping[str, Any]], stage: str, key: str) -> tuple[Curve, Curve] | None:
    """Returns the curves of the KL and of a score, from the steps that have both."""
    both = [r for r in records if results_lib.finite(r.get("kl")) and results_lib.finite(r.get(key))]
    kl, score = curve(both, stage, "kl"), curve(both, stage, key)
    return None if kl is None or score is None else (kl, score)


def line_fit(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns the R² of a linear fit; None for fewer than 3 points or a constant x or y."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def downsample(y: np.ndarray, *, most: int = MAX_POINTS) -> np.ndarray:
    """Reduces a curve to at most ``most`` points by averaging neighbouring values."""
    if len(y) <= most:
        return y
    return np.array([part.mean() for part in np.array_split(y, most)])


def running_mean(y: np.ndarray, *, width: int) -> np.ndarray:
    """Returns the mean over up to ``width`` neighbours on either side.

    At the start, the window shrinks on both sides, so that a steep start is not flattened. At the end, it shrinks only
    on the right, so that the last value is an average too.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    before = np.minimum(width, i)
    after = np.minimum(before, len(y) - 1 - i)
    return (total[i + after + 1] - total[i - before]) / (before + after + 1)


def point(
    ax: Axes,
    value: results_lib.Interval,
    y: float,
    policy: str,
    *,
    scale: float = 1.0,
    digits: int = 3,
    filled: bool = True,
) -> None:
    """Draws a value with its interval and writes both as text at the right edge.

    Args:
        ax: Axes to draw on.
        value: Value with its interval; an arrow marks a side on which the interval is unbounded.
        y: Vertical position.
        policy: Policy or model that determines colour and marker.
        scale: Factor by which the value is multiplied; 100 for percentages.
        digits: Number of digits of the texts after the decimal point, except of percentages.
        filled: Whether the marker is filled.
    """
    c, mean = color(policy), scale * value.mean
    if value.low is not None or value.high is not None:
        ends = [mean if end is None else scale * end for end in (value.low, value.high)]
        ax.plot(ends, [y, y], color=c, linewidth=1.3, solid_capstyle="butt")
    if (value.low is None) != (value.high is None):
        arrow = {"arrowstyle": "->", "color": c, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        edge = (0.0 if value.low is None else 1.0, y)
        ax.annotate("", edge, (mean, y), xycoords=ax.get_yaxis_transform(), textcoords="data", arrowprops=arrow)
    face = c if filled else color("paper")
    ax.plot([mean], [y], MARKERS.get(policy, "o"), color=c, markerfacecolor=face, markersize=5, mew=1.1)
    text, bounds = results_lib.format_parts(value, percent=scale == 100, digits=digits)
    text += f" ({bounds})" if bounds else ""
    ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5, color=color("soft"))


def log_x(ax: Axes) -> None:
    """Makes the x axis logarithmic, with plain numbers at its major ticks."""
    from matplotlib.ticker import NullFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def label_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Labels the rows of a horizontal plot, with the first row at the top."""
    ax.set_yticks(range(len(labels)), labels, color=color("ink"))
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def _marker_handle(filled: bool) -> Any:
    from matplotlib.lines import Line2D

    c = color("soft")
    return Line2D([], [], color=c, marker="o", markersize=5, mew=1.1, markerfacecolor=c if filled else color("paper"))


def legend(ax: Axes, **kwargs: Any) -> None:
    """Draws a legend in a row above the axes, so that it does not cover data."""
    style = {"borderaxespad": 0.2, "handlelength": 1.6, "columnspacing": 1.4}
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, **style, **kwargs)
