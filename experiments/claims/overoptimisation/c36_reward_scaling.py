"""C36: larger reward models are over-optimised less, and more data beats more epochs (Gao et al. 2023, Fig. 3, 6, 13).

The gain in gold utility of best of n is fitted by ``d (alpha - beta d)``, where d is the square root of the KL, for
reward models of four sizes. Beta should fall with the size. A reward model that is trained on four times as many
comparisons for one epoch should select better answers than one that is trained for four epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import reward_fits, reward_sizes, sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.diagnostics import overoptimisation
from rlhf_jax.report import plots

QUARTER = {"a quarter of the data": 1, "a quarter, four epochs": 4}
"""Epochs of the reward models that are trained on a quarter of the comparisons."""


def measure(trial: Trial) -> Measured:
    """Returns the gains of best of n by each reward model."""
    recipe = ms.Recipe(trial)
    pool, curves = reward_sizes.measure_sizes(trial)
    for name, epochs in QUARTER.items():
        reward = trial.result(train_on_quarter, recipe.start, recipe.compared, epochs=epochs)
        scores_PN = trial.result(sample_pool.score, reward, pool, samples=reward_sizes.NS[-1]).value
        curves[name] = reward_sizes.curve(scores_PN, pool.value["gold"])
    return curves


def train_on_quarter(
    trial: Trial, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]], *, epochs: int
) -> types.Params:
    """Returns a reward model of the largest size that is trained on a quarter of the comparisons."""
    rows = ms.train_rows(trial, compared[0])
    quarter = len(rows.ranks_BK) // 4
    few = types.Comparisons(
        rows.tokens_BKL[:quarter], rows.mask_BKL[:quarter], rows.ranks_BK[:quarter], rows.where_BK[:quarter]
    )
    return reward_fits.fit(trial, start, few, batch=trial.settings.reward_model.batch, epochs=epochs)


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the slope of beta against the logarithm of the size, and compares data with epochs."""
    sizes = [name for name in measured_S[0] if name not in QUARTER]
    betas_SA = np.array([[beta(each[size]) for size in sizes] for each in measured_S])
    last_S = {name: np.array([each[name]["gold"][-1] for each in measured_S]) for name in measured_S[0]}
    return [
        verdicts.below(
            "beta of best of n, per doubling of the reward model",
            np.polyfit([ms.LOG_SIZES[size] for size in sizes], betas_SA.T, 1)[0],
        ),
        verdicts.above(
            "gold gain of the best of 64, four times the data − four epochs",
            last_S[ms.LARGEST] - last_S["a quarter, four epochs"],
        ),
    ]


def beta(curve: dict[str, np.ndarray]) -> float:
    """Returns beta of the fit of a curve."""
    kl = diagnostics.best_of_n_kl(reward_sizes.NS[: len(curve["gold"])])
    return overoptimisation.fit(kl, curve["gold"], form=overoptimisation.BEST_OF_N).beta.mean


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gold utility against the distance from the policy, one line per reward model."""
    with plots.axes(height=3.0) as (svg, (ax,)):
        sizes = [name for name in measured_S[0] if name not in QUARTER]
        for name in measured_S[0]:
            gold = np.mean([each[name]["gold"] for each in measured_S], axis=0)
            d = np.sqrt(diagnostics.best_of_n_kl(reward_sizes.NS[: len(gold)]))
            color, style = ("reward_model", "o-") if name in sizes else ("other", "s--")
            shade = 0.3 + 0.7 * (sizes if name in sizes else list(QUARTER)).index(name) / 3
            ax.plot(d, gold, style, color=plots.color(color), alpha=min(shade, 1.0), label=name)
        ax.set_xlabel("square root of the KL (nats)")
        ax.set_ylabel("gain in gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C36",
    paper="Gao et al. 2023, Figures 3, 6 and 13",
    claim="Larger reward models are over-optimised less (beta falls), and more data beats more epochs.",
    published="beta falls smoothly from 3M to 3B parameters; validation loss .686 with 2000 pairs, .655 with 8000, "
    ".684 with 2000 and four epochs",
    differs="Best of up to 64 only, not RL, so that alpha and the peak of RL are not tested, nor is the minimum of "
    "about 2000 comparisons. Labels are those of simulated labelers instead of the gold model.",
    measure=measure,
    decide=decide,
    plot=plot,
    minutes=6.0,
)
