"""C35: gold utility is d (a - b d) for best of n and d (a - b log d) for RL, d = sqrt(KL) (Gao et al. 2023, Figure 1).

Each form is fitted to the points with the smaller KLs, at most half the largest, and predicts the others. The error of
the prediction must be smaller with the form of the paper than with that of the other method. The form must also explain
at least 90 % of the variance if it is fitted to all points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import sample_pool, trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import overoptimisation
from rlhf_jax.report import plots

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FORMS = {"best of n": overoptimisation.BEST_OF_N, "reinforcement learning": overoptimisation.REINFORCEMENT}
FEWEST = 4
"""Smallest number of fitted points."""


def measure(trial: Trial) -> Measured:
    """Returns the KL and the gain in gold utility of best of n and in the course of RL without a KL penalty."""
    recipe, at = ms.Recipe(trial), trajectories.iterations(trial)
    pool = sample_pool.pool(trial, recipe)
    scores_PN = trial.result(sample_pool.score, recipe.reward, pool).value
    run = trial.result(trajectories.follow, recipe.start, recipe.reward, at=at, kl_coef=0.0)
    means = trajectories.means(run.value)
    return {
        "best of n": best_of_n(scores_PN, pool.value["gold"]),
        "reinforcement learning": {
            "kl": np.maximum(means["kl"][1:], 1e-6),
            "gain": means["gold"][1:] - means["gold"][0],
        },
    }


def best_of_n(score_PN: np.ndarray, gold_PN: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the KL and the gain in gold utility for each of `SIZES`."""
    gain_M = diagnostics.best_of_n_mean(score_PN, gold_PN, SIZES).mean(axis=0) - np.mean(gold_PN, dtype=np.float64)
    kl_M = np.mean([diagnostics.best_of_n_kl_estimate(score_N, SIZES) for score_N in score_PN], axis=0)
    return {"kl": kl_M, "gain": gain_M}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the errors of the predictions of both forms for each method."""
    parts = []
    for name, other in (tuple(FORMS), tuple(FORMS)[::-1]):
        errors_S = np.array([[error(each[name], FORMS[form]) for form in (name, other)] for each in measured_S])
        fits = [overoptimisation.fit(each[name]["kl"], each[name]["gain"], form=FORMS[name]) for each in measured_S]
        parts += [
            verdicts.above(f"{name}: error of the other form − of its own", errors_S[:, 1] - errors_S[:, 0]),
            verdicts.above(f"{name}: share of variance explained", [each.r_squared for each in fits], 0.9),
        ]
    return parts


def error(points: dict[str, np.ndarray], form: overoptimisation.Form) -> float:
    """Returns the root mean squared error of predictions for the larger KLs from a fit to the smaller ones."""
    kl_M, gain_M = (points[name][np.argsort(points["kl"], kind="stable")] for name in ("kl", "gain"))
    n = int(np.clip(np.sum(kl_M <= kl_M[-1] / 2), FEWEST, len(kl_M) - 1))
    curve = overoptimisation.fit(kl_M[:n], gain_M[:n], form=form)
    return float(np.sqrt(np.mean(np.square(overoptimisation.predict(curve, kl_M[n:]) - gain_M[n:]))))


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gains of both methods, and the fitted forms."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for (name, form), color in zip(FORMS.items(), ("best_of_n", "ppo"), strict=True):
            for number, measured in enumerate(measured_S):
                kl_M, gain_M = (measured[name][axis] for axis in ("kl", "gain"))
                ax.plot(np.sqrt(kl_M), gain_M, ".", color=plots.color(color), alpha=0.5)
                line_K = np.linspace(0, kl_M.max(), 60)
                gains_K = overoptimisation.predict(overoptimisation.fit(kl_M, gain_M, form=form), line_K)
                ax.plot(np.sqrt(line_K), gains_K, color=plots.color(color), label=None if number else name)
        ax.set_xlabel("square root of the KL")
        ax.set_ylabel("gain in gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C35",
    paper="Gao et al. 2023, Figure 1",
    claim="Gold utility follows d (a − b d) for best of n and d (a − b log d) for RL, where d is the root of the KL.",
    published="fits to n of at most 1,000 predict n = 60,000",
    differs="n is at most 128, and its KL is measured, because answers repeat. Gold utility is that of the "
    "built-in world.",
    measure=measure,
    decide=decide,
    plot=plot,
)
