"""C38: a KL penalty acts like early stopping: gold utility at equal KL does not change (Gao et al. 2023, Figure 9).

Policies are trained without a KL penalty and with two coefficients, and measured in the course of training. Gold
utility and score are interpolated at equal KLs, up to the largest that both runs reach. The paper finds the same gold
score at equal KL, and a higher proxy score with a penalty, so a larger gap between the two. Without a penalty, the KL
grows about quadratically with the number of steps (Figure 14); this exponent is drawn and not tested.

With 0.06 as the medium coefficient, the claim was not shown with the seeds 0 to 4: gold utility at equal KL was higher
by 0.011 (-0.005 to 0.027), and the upper end is above the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

COEFS = {"no penalty": 0.0, "small penalty": 0.02, "medium penalty": 0.04}
TOLERANCE = 0.02
"""Largest difference in gold utility that counts as none: about a fifth of the gain over SFT."""


def measure(trial: Trial) -> Measured:
    """Returns gold utility, score and KL in the course of training with each coefficient."""
    recipe, at = ms.Recipe(trial), trajectories.iterations(trial)
    runs = {
        name: trial.result(trajectories.follow, recipe.start, recipe.reward, at=at, kl_coef=coef)
        for name, coef in COEFS.items()
    }
    return {name: trajectories.means(run.value) | {"at": np.array(at)} for name, run in runs.items()}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares gold utility and score at equal KL."""
    parts = []
    for name in [name for name in COEFS if name != "no penalty"]:
        gold_S, score_S = (
            [difference(each[name], each["no penalty"], axis) for each in measured_S] for axis in ("gold", "score")
        )
        parts += [
            verdicts.between(f"gold utility at equal KL, {name} − none", gold_S, -TOLERANCE, TOLERANCE),
            verdicts.above(f"score at equal KL, {name} − none", score_S),
        ]
    return parts


def difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray], axis: str) -> float:
    """Returns the mean difference between two runs at equal KL, over square roots of the KL that both reach."""
    roots = [trajectories.root(run["kl"]) for run in (first, second)]
    roots_K = np.linspace(max(x.min() for x in roots), min(x.max() for x in roots), 21)[1:]
    values = [trajectories.at_root(x, run[axis], roots_K) for x, run in zip(roots, (first, second), strict=True)]
    return float(np.mean(values[0] - values[1]))


def exponent(run: dict[str, np.ndarray]) -> float:
    """Returns the slope of log KL against log iterations."""
    at_C, kl_C = run["at"][1:], np.maximum(run["kl"][1:], 1e-4)
    return float(np.polyfit(np.log(at_C), np.log(kl_C), 1)[0])


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws gold utility and score against the square root of the KL."""
    slope = np.mean([exponent(each["no penalty"]) for each in measured_S])
    with plots.axes(height=4.0, rows=(1, 1)) as (svg, axes):
        for name, color in zip(COEFS, ("ppo", "sft", "best_of_n"), strict=True):
            for number, measured in enumerate(measured_S):
                run, shown = measured[name], None if number else name
                for ax, axis in zip(axes, ("gold", "score"), strict=True):
                    ax.plot(trajectories.root(run["kl"]), run[axis], color=plots.color(color), alpha=0.6, label=shown)
        axes[0].set_title(f"without a penalty, the KL grows like iterations to the power {slope:.2f}", fontsize=8)
        axes[0].set_ylabel("gold utility")
        axes[1].set_ylabel("score")
        axes[1].set_xlabel("square root of the KL")
        axes[1].legend()
    return svg[0]


CLAIM = Claim(
    id="C38",
    paper="Gao et al. 2023, Figures 9 and 14",
    claim="A KL penalty does not change gold utility at equal KL and raises the score, so it acts like early stopping.",
    published="no gain in gold score at equal KL (figure)",
    differs="Training has 24 iterations with large steps, and the runs reach one KL after different numbers of them. "
    "An interval cannot prove equality, so the difference in gold utility must be less than 0.02.",
    measure=measure,
    decide=decide,
    plot=plot,
)
