"""C11: the accuracy of reward models is linear in the logarithms of parameters and data (Bai et al. 2022, Figure 7).

Reward models of three sizes are trained on three amounts of comparisons for one epoch. Their accuracy is the share of
pairs of answers to held-out prompts that they order as gold utility does. It is regressed on both logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from claims import model_stages as ms
from claims import reward_fits, sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots

SIZES = ("1 x 32", "2 x 64", ms.LARGEST)
SHARES = (9, 3, 1)
"""The comparisons are divided by these numbers."""
BATCH = 4
SAMPLES = 32


def measure(trial: Trial) -> Measured:
    """Returns the accuracy of each reward model."""
    recipe = ms.Recipe(trial)
    pool = sample_pool.pool(trial, recipe)
    return {
        f"{size}, 1 / {share}": {
            "accuracy": trial.result(
                train_and_test, recipe.start_of(size), recipe.compared, pool, size=size, share=share
            ).value
        }
        for size in SIZES
        for share in SHARES
    }


def train_and_test(
    trial: Trial,
    start: types.Params,
    compared: tuple[types.Comparisons, dict[str, Any]],
    pool: dict[str, np.ndarray],
    *,
    size: str,
    share: int,
) -> float:
    """Returns the accuracy of a reward model that is trained on a part of the comparisons."""
    own, rows = ms.sized(trial, size), ms.train_rows(trial, compared[0])
    few = jax.tree.map(lambda x: x[: len(rows.ranks_BK) // share], rows)
    reward = reward_fits.fit(own, start, few, batch=BATCH)
    scores_PN = sample_pool.score(trial, reward, pool, samples=SAMPLES, size=size)
    return accuracy(scores_PN, pool["gold"][:, :SAMPLES])


def accuracy(scores_PN: np.ndarray, gold_PN: np.ndarray) -> float:
    """Returns the share of pairs with different gold utility that the scores order alike; equal scores count half."""
    gold_PNN, score_PNN = (x[:, :, None] - x[:, None] for x in (gold_PN, scores_PN))
    better = gold_PNN > 1e-5
    return float(np.mean(np.where(score_PNN == 0, 0.5, score_PNN > 0)[better]))


def regress(measured: Measured) -> tuple[float, float, float]:
    """Returns the rise per doubling of the parameters and of the data, and the share of variance explained."""
    arms = {(size, share): measured[f"{size}, 1 / {share}"]["accuracy"] for size in SIZES for share in SHARES}
    x_AF = np.array([[1.0, ms.LOG_SIZES[size], -np.log2(share)] for size, share in arms])
    y_A = np.array(list(arms.values()))
    slope_F, *_ = np.linalg.lstsq(x_AF, y_A)
    return slope_F[1], slope_F[2], 1 - float(np.var(y_A - x_AF @ slope_F) / np.var(y_A))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the slopes and the share of the variance that they explain."""
    size_S, data_S, explained_S = zip(*(regress(each) for each in measured_S), strict=True)
    return [
        verdicts.above("accuracy per doubling of the parameters", size_S),
        verdicts.above("accuracy per doubling of the data", data_S),
        verdicts.above("share of variance explained", explained_S, 0.8),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws accuracy against the amount of data, one line per size."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for number, size in enumerate(SIZES):
            names = [f"{size}, 1 / {share}" for share in SHARES]
            accuracy_SD = np.array([[each[name]["accuracy"] for name in names] for each in measured_S])
            shade, labels = 0.4 + 0.3 * number, [f"1 / {share}" for share in SHARES]
            ax.plot(labels, accuracy_SD.T, ".", color=plots.color("reward_model"), alpha=0.3)
            ax.plot(labels, accuracy_SD.mean(axis=0), "o-", color=plots.color("reward_model"), alpha=shade, label=size)
        ax.set_xlabel("share of the comparisons")
        ax.set_ylabel("accuracy")
        ax.legend(title="layers x width")
    return svg[0]


CLAIM = Claim(
    id="C11",
    paper="Bai et al. 2022, Figures 7 and 32; Stiennon et al. 2020, Figure 6",
    claim="The accuracy of reward models rises linearly with the logarithms of parameters and of data.",
    published="0.72 + 0.007 ln(P / 1e11) + 0.015 ln(D / 8e4); data × 2: +1.1 points, size × 2: +1.8 points",
    differs="Three sizes, a factor of 30 apart in all, and 111 to 1,000 ranked prompts. The pairs are samples of one "
    "policy, and gold utility replaces human labels.",
    measure=measure,
    decide=decide,
    plot=plot,
)
