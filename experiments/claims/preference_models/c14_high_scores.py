"""C14: preference models are less accurate if both answers score high (Bai et al. 2022, Figure 25).

Preference models of three sizes score samples of the SFT model. Their accuracy is the probability that a labeler agrees
with them about a pair of answers to a prompt. It is computed for the pairs whose scores are both at or above a
threshold. Scores have mean 0 for each size, and the thresholds are quantiles of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from claims import model_stages as ms
from claims import reward_sizes, sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

SIZES = (*reward_sizes.SIZES[1:], ms.LARGEST)
SAMPLES = reward_sizes.NS[-1]
PAIRED = 16
"""Answers to each prompt that form pairs."""
QUANTILES = np.linspace(0.0, 0.8, 9)


def measure(trial: Trial) -> Measured:
    """Returns the accuracy at each threshold, and the thresholds, for each size."""
    recipe = ms.Recipe(trial)
    pool, rewards = sample_pool.pool(trial, recipe), reward_sizes.rewards_of_sizes(trial, recipe)
    rewards[ms.LARGEST] = recipe.reward
    measured: Measured = {}
    for size in SIZES if not trial.quick else rewards:
        sizes = {} if size == ms.LARGEST else {"size": size}
        scored = trial.result(sample_pool.score, rewards[size], pool, samples=SAMPLES, **sizes)
        measured[size] = trial.result(test, pool, scored, recipe.compared).value
    return measured


def test(
    trial: Trial, pool: dict[str, np.ndarray], scores_PN: np.ndarray, compared: tuple[Any, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Returns the accuracy among pairs of answers whose scores reach each threshold, and the thresholds.

    Args:
        trial: The trial.
        pool: The answers, as `sample_pool.sample` returns them.
        scores_PN: Their scores.
        compared: The comparisons, whose labelers had the noise that is used.
    """
    assert trial.task.world is not None
    noise = jnp.float32(compared[1]["labeler_temperature"])
    judges = trial.task.world.pool.replace(temperature=noise)  # type: ignore[attr-defined]
    i, j = np.triu_indices(PAIRED, k=1)
    features: Any = pool["features"]
    share_PM = np.asarray(labelers.choice_share(judges, features[:, i], features[:, j]))
    scores_PN = scores_PN - scores_PN.mean()
    different_PM = np.where(pool["mask"], pool["tokens"], -1)[:, i] != np.where(pool["mask"], pool["tokens"], -1)[:, j]
    different_PM = different_PM.any(axis=-1)
    return accuracy_above(scores_PN[:, i], scores_PN[:, j], share_PM, different_PM, np.quantile(scores_PN, QUANTILES))


def accuracy_above(
    first_PM: np.ndarray, second_PM: np.ndarray, share_PM: np.ndarray, where_PM: np.ndarray, thresholds_H: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the mean probability of agreement for pairs whose scores are both at or above each threshold.

    Args:
        first_PM: Scores of the first answers.
        second_PM: Scores of the second answers.
        share_PM: Probability that a labeler prefers the first answer.
        where_PM: False for pairs that are left out.
        thresholds_H: The thresholds.
    """
    right_PM = np.where(first_PM == second_PM, 0.5, np.where(first_PM > second_PM, share_PM, 1 - share_PM))
    lower_PM = np.minimum(first_PM, second_PM)
    accuracy_H = [right_PM[where_PM & (lower_PM >= threshold)].mean() for threshold in thresholds_H]
    return {"threshold": thresholds_H, "accuracy": np.array(accuracy_H)}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the rank correlation of threshold and accuracy, averaged over the sizes."""
    correlation_S = [
        np.mean([stats.spearmanr(each["threshold"], each["accuracy"]).statistic for each in measured.values()])  # pyright: ignore[reportAttributeAccessIssue]
        for measured in measured_S
    ]
    return [verdicts.below("rank correlation of threshold and accuracy", correlation_S)]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracy against the threshold's quantile, one line per size."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for number, size in enumerate(measured_S[0]):
            accuracy_SH = np.array([each[size]["accuracy"] for each in measured_S])
            color, shade = plots.color("reward_model"), 0.4 + 0.3 * number
            ax.plot(QUANTILES, accuracy_SH.T, ".", color=color, alpha=0.2)
            ax.plot(QUANTILES, accuracy_SH.mean(axis=0), "o-", color=color, alpha=shade, label=size)
        ax.set_xlabel("threshold (quantile of the scores)")
        ax.set_ylabel("agreement with labelers")
        ax.legend(title="layers x width")
    return svg[0]


CLAIM = Claim(
    id="C14",
    paper="Bai et al. 2022, Figure 25",
    claim="Preference models are less accurate if both answers score above a threshold.",
    published="no number (figure); three possible causes are listed",
    differs="The pairs are samples of one policy, and the accuracy is the probability that simulated labelers agree, "
    "so that it does not depend on single labels.",
    measure=measure,
    decide=decide,
    plot=plot,
)
