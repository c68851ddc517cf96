"""C36b: for a reward model, more comparisons are better than more epochs (Gao et al. 2023, Figure 6).

A reward model that is trained on four times as many comparisons for one epoch should select better answers than one
that is trained for four epochs. Compared is the gold utility of the best of 64 samples of the SFT model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import reward_fits, sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.trial import MANY_COMPARISONS, Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.report import plots

ALL = "all of the data"
QUARTER = {"a quarter of the data": 1, "a quarter, four epochs": 4}
"""Epochs of the reward models that are trained on a quarter of the comparisons."""
BEST_OF = 64


def measure(trial: Trial) -> Measured:
    """Returns the gain in gold utility of the best of 64 by each reward model."""
    recipe = ms.Recipe(trial)
    pool, rewards = sample_pool.pool(trial, recipe), {ALL: recipe.reward}
    for name, epochs in QUARTER.items():
        rewards[name] = trial.result(train_on_quarter, recipe.start, recipe.compared, epochs=epochs)
    measured, gold_PN = {}, pool.value["gold"][:, :BEST_OF]
    for name, reward in rewards.items():
        scores_PN = trial.result(sample_pool.score, reward, pool, samples=BEST_OF).value
        best_P = diagnostics.best_of_n_mean(scores_PN, gold_PN, [BEST_OF])
        measured[name] = {"gain": float(np.mean(best_P, dtype=np.float64) - np.mean(gold_PN, dtype=np.float64))}
    return measured


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
    """Compares more data with more epochs."""
    more_S = [each[ALL]["gain"] - each["a quarter, four epochs"]["gain"] for each in measured_S]
    return [verdicts.above("gold gain of the best of 64, four times the data − four epochs", more_S)]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain of each reward model."""
    names = [ALL, *QUARTER]
    with plots.axes(height=2.2) as (svg, (ax,)):
        for measured in measured_S:
            ax.plot([measured[name]["gain"] for name in names], "o-", color=plots.color("reward_model"), alpha=0.5)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("gain in gold utility")
    return svg[0]


CLAIM = Claim(
    id="C36b",
    paper="Gao et al. 2023, Figure 6",
    claim="For a reward model, more comparisons are better than more epochs.",
    published="validation loss .686 with 2000 pairs, .655 with 8000, .684 with 2000 and four epochs",
    differs="The gold utility of selected answers replaces the validation loss. The minimum of about 2000 comparisons "
    "is not tested. Labels are those of simulated labelers instead of the gold model.",
    measure=measure,
    decide=decide,
    plot=plot,
    changes=MANY_COMPARISONS,
)
