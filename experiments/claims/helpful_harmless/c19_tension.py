"""C19: a preference model trained on helpfulness or harmlessness alone is below chance on the other (Bai et al. 2022).

Preference models of three sizes are trained on six mixtures of both kinds of pairs, with the same number of pairs in
all (Figures 19 and 26). A model's mean accuracy is the average of its accuracies on held-out pairs of both domains. The
spread is the standard deviation of the mean accuracy over the mixtures, in relation to the best mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.helpful_harmless import hh_stages
from claims.trial import Trial
from rlhf_jax.report import plots

SIZES = ("1 x 32", "2 x 64", ms.LARGEST)
SHARES = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)
"""Shares of harmlessness pairs."""
PAIRS = 4000
DRAWN = {"helpful": PAIRS + 900, "harmless": 2 * PAIRS + 1600}
"""Pairs that are labelled, more than needed because equal ones are dropped."""


def measure(trial: Trial) -> Measured:
    """Returns the accuracy of each preference model on both domains."""
    recipe = ms.Recipe(trial)
    sets = trial.result(hh_stages.collect, recipe.start, **DRAWN)
    total = 32 if trial.quick else PAIRS
    return {
        size: {
            f"{share:g}": trial.result(
                hh_stages.train_and_test,
                recipe.start_of(size),
                sets,
                helpful=total - round(total * share),
                harmless=round(total * share),
                size=size,
            ).value
            for share in SHARES
        }
        for size in SIZES
    }


def mean_accuracy(measured: Measured, size: str) -> np.ndarray:
    """Returns the average accuracy on both domains for each mixture."""
    return np.array([np.mean(list(measured[size][f"{share:g}"].values())) for share in SHARES])


def spread(measured: Measured, size: str) -> float:
    """Returns the standard deviation of the mean accuracy over the mixtures, relative to the best."""
    accuracy_M = mean_accuracy(measured, size)
    return float(np.std(accuracy_M) / np.max(accuracy_M))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the accuracies at the extremes with chance, and the spread of the mean accuracy with size."""
    sizes = [ms.LOG_SIZES[size] for size in SIZES]
    slope_S = [float(np.polyfit(sizes, [spread(each, size) for size in SIZES], 1)[0]) for each in measured_S]
    helpful_only, harmless_only = (
        [np.mean([each[size][share][other] for size in SIZES]) for each in measured_S]
        for share, other in (("0", "harmless"), ("1", "helpful"))
    )
    return [
        verdicts.below("accuracy on harmlessness pairs, trained on helpfulness", helpful_only, 0.5),
        verdicts.below("accuracy on helpfulness pairs, trained on harmlessness", harmless_only, 0.5),
        verdicts.below("spread of the mean accuracy over mixtures, per doubling of the parameters", slope_S),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracies of the largest model, and the mean accuracy of each size."""
    with plots.axes(height=4.2, rows=(1, 1)) as (svg, (top, bottom)):
        for domain, color in (("helpful", "sft"), ("harmless", "ppo")):
            accuracy_SM = np.array([[each[ms.LARGEST][f"{s:g}"][domain] for s in SHARES] for each in measured_S])
            top.plot(SHARES, accuracy_SM.T, ".", color=plots.color(color), alpha=0.3)
            top.plot(SHARES, accuracy_SM.mean(axis=0), "o-", color=plots.color(color), label=f"on {domain} pairs")
        for number, size in enumerate(SIZES):
            accuracy_M = np.mean([mean_accuracy(each, size) for each in measured_S], axis=0)
            bottom.plot(SHARES, accuracy_M, "o-", color=plots.color("other"), alpha=0.4 + 0.3 * number, label=size)
        top.axhline(0.5, color=plots.color("soft"), linewidth=0.8)
        top.set_ylabel("accuracy")
        bottom.set_ylabel("mean accuracy")
        bottom.set_xlabel("share of harmlessness pairs in training")
        top.legend()
        bottom.legend(title="layers x width")
    return svg[0]


CLAIM = Claim(
    id="C19",
    paper="Bai et al. 2022, Figures 19 and 26",
    claim="A preference model trained on helpfulness alone is below chance on harmlessness, and the reverse; larger "
    "models are less sensitive to the mixture.",
    published="figures; 11 mixtures of 42,000 comparisons",
    differs="4,000 pairs instead of 42,000, six mixtures instead of eleven, and three sizes instead of seven. Labels "
    "are by simulated labelers.",
    measure=measure,
    decide=decide,
    plot=plot,
)
