"""C47: the accuracy on harmlessness depends less on the size of the preference model than that on helpfulness.

Preference models of four sizes are trained on the same pairs, half of which are about each domain. The accuracies on
held-out pairs are regressed on the logarithm of the number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.helpful_harmless import c19_tension, hh_stages
from claims.trial import Trial
from rlhf_jax.report import plots

SIZES = ("1 x 16", "1 x 32", "2 x 64", ms.LARGEST)


def measure(trial: Trial) -> Measured:
    """Returns the accuracy of each preference model on both domains."""
    recipe = ms.Recipe(trial)
    sets = trial.result(hh_stages.collect, recipe.start, **c19_tension.DRAWN)
    each = 32 if trial.quick else c19_tension.PAIRS
    return {
        size: trial.result(
            hh_stages.train_and_test, recipe.start_of(size), sets, helpful=each, harmless=each, size=size
        ).value
        for size in SIZES
    }


def slope(measured: Measured, domain: str) -> float:
    """Returns the rise of the accuracy per doubling of the parameters."""
    return float(np.polyfit([ms.LOG_SIZES[size] for size in SIZES], [measured[size][domain] for size in SIZES], 1)[0])


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the slopes."""
    slope_SD = np.array([[slope(each, domain) for domain in ("helpful", "harmless")] for each in measured_S])
    return [
        verdicts.above(
            "accuracy per doubling of the parameters, helpfulness − harmlessness", slope_SD[:, 0] - slope_SD[:, 1]
        )
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracies against the number of parameters."""
    sizes = [ms.LOG_SIZES[size] for size in SIZES]
    with plots.axes(height=2.6) as (svg, (ax,)):
        for domain, color in (("helpful", "sft"), ("harmless", "ppo")):
            accuracy_SZ = np.array([[each[size][domain] for size in SIZES] for each in measured_S])
            ax.plot(sizes, accuracy_SZ.T, ".", color=plots.color(color), alpha=0.4)
            ax.plot(sizes, accuracy_SZ.mean(axis=0), "o-", color=plots.color(color), label=f"on {domain} pairs")
        ax.set_xlabel("log2 of the parameters in the layers")
        ax.set_ylabel("accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C47",
    paper="secondary notes on Bai et al. 2022; not found in the paper itself",
    claim="The accuracy on harmlessness is insensitive to the size of the preference model, that on helpfulness grows.",
    published="no numbers",
    differs="4,000 pairs of each kind, and four sizes, of up to 350,000 parameters.",
    measure=measure,
    decide=decide,
    plot=plot,
)
