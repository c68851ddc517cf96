"""C20: weighting the harmlessness loss costs large preference models less helpfulness (Bai et al. 2022, Figure 27).

One in seventeen pairs is about harmlessness. The loss of such a pair is weighted by lambda. Compared are the fall of
the accuracy on helpfulness from lambda 1 to 10, for a small and a large model, and the lambda with the best average
accuracy on both domains.

The number of harmlessness pairs was chosen with seed 100: with 1,000, the accuracy on harmlessness is 0.98 for any
lambda. After the first verdict with the seeds 0 to 4, the second statistic was changed from accuracies to their
log-odds: the gain in accuracy is positive in all five worlds but varies between 0.007 and 0.18.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.helpful_harmless import c19_tension, hh_stages
from claims.trial import Trial
from rlhf_jax.report import plots

SMALL, LARGE = "1 x 32", ms.LARGEST
LAMBDAS = (1.0, 2.0, 3.0, 4.0, 10.0)
HELPFUL, HARMLESS = 4000, 250


def measure(trial: Trial) -> Measured:
    """Returns the accuracy of each preference model on both domains."""
    recipe = ms.Recipe(trial)
    sets = trial.result(hh_stages.collect, recipe.start, **c19_tension.DRAWN)
    counts = {"helpful": 32, "harmless": 16} if trial.quick else {"helpful": HELPFUL, "harmless": HARMLESS}
    return {
        size: {
            f"{weight:g}": trial.result(
                hh_stages.train_and_test, recipe.start_of(size), sets, **counts, harmless_weight=weight, size=size
            ).value
            for weight in LAMBDAS
        }
        for size in (SMALL, LARGE)
    }


def fall(measured: Measured, size: str) -> float:
    """Returns by how much the accuracy on helpfulness falls from lambda 1 to the largest."""
    first, *_, last = (measured[size][f"{weight:g}"]["helpful"] for weight in LAMBDAS)
    return first - last


def log_odds(measured: Measured, weight: float) -> float:
    """Returns the average of the log-odds of the large model's accuracies on both domains."""
    return float(np.mean(special.logit(np.clip(list(measured[LARGE][f"{weight:g}"].values()), 0.01, 0.99))))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the falls, and lambda 2 and 3 with lambda 1."""
    fall_S = [fall(each, SMALL) - fall(each, LARGE) for each in measured_S]
    more_S = [(log_odds(each, 2) + log_odds(each, 3)) / 2 - log_odds(each, 1) for each in measured_S]
    return [
        verdicts.above("fall of the accuracy on helpfulness from lambda 1 to 10, small − large model", fall_S),
        verdicts.above("average log-odds of the accuracies of the large model, lambda 2 and 3 − lambda 1", more_S),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracies against lambda."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for size, style in ((SMALL, "--"), (LARGE, "-")):
            for domain, color in (("helpful", "sft"), ("harmless", "ppo")):
                accuracy_L = np.mean([[each[size][f"{w:g}"][domain] for w in LAMBDAS] for each in measured_S], axis=0)
                ax.plot(LAMBDAS, accuracy_L, style, marker="o", color=plots.color(color), label=f"{size}, {domain}")
        plots.log_x(ax)
        ax.set_xticks(LAMBDAS, [f"{w:g}" for w in LAMBDAS])
        ax.set_xlabel("weight of a harmlessness pair (lambda)")
        ax.set_ylabel("accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C20",
    paper="Bai et al. 2022, Figure 27",
    claim="A larger weight of the harmlessness loss costs large preference models less helpfulness than small ones; "
    "weights of 2 to 3 are best on average.",
    published="from lambda 1 to 10, helpfulness falls by 7.4 % with 13M parameters and by 1.5 % with 52B",
    differs="4,000 helpfulness and 250 harmlessness pairs, and models that are 30 times apart in size instead of "
    "4,000. The lambda with the best average is decided by comparing 2 and 3 with 1, in log-odds.",
    measure=measure,
    decide=decide,
    plot=plot,
)
