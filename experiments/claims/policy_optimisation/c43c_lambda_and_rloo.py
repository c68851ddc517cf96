"""C43c: lambda below 1 hurts, clipping rarely binds, and RLOO is at least as good as PPO (Ahmadian et al. 2024).

PPO is trained with four values of GAE's lambda, and RLOO with four answers to each prompt, all for the same number of
answers. The score of the reward model, which all of them optimise, is measured on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

DEFAULT = "lambda 0.95"
ARMS: dict[str, dict[str, Any]] = {
    "lambda 0": {"lambda_": 0.0},
    "lambda 0.5": {"lambda_": 0.5},
    DEFAULT: {},
    "lambda 1": {"lambda_": 1.0},
    "RLOO": {"method": "rloo", "samples": 4},
}
TOLERANCE = 0.05
"""By how much RLOO may be below PPO, in standard deviations of the score; RL gains about 0.6."""
LAMBDAS = (0.0, 0.5, 0.95, 1.0)


def measure(trial: Trial) -> Measured:
    """Trains the five policies; returns score, KL and gold utility of each, and the share of clipped tokens."""
    recipe, measured = ms.Recipe(trial), {}
    for name, changes in ARMS.items():
        policy = trial.result(ms.train_policy, recipe.start, recipe.reward, **changes)
        answers = trial.result(ms.answer, policy, recipe.start, recipe.reward).value
        clipped = float(np.mean(policy.value["logged"]["clip_fraction"]))
        measured[name] = {each: float(np.mean(answers[each])) for each in ("score", "kl", "gold")} | {
            "clipped": clipped
        }
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the scores, and computes the share of clipped tokens."""
    score_SA = np.array([[measured[name]["score"] for name in ARMS] for measured in measured_S])
    return [
        verdicts.above("rank correlation of lambda and score", rank_correlations(score_SA[:, :4])),
        verdicts.above("score with lambda 1 − with lambda 0", score_SA[:, 3] - score_SA[:, 0]),
        verdicts.below("share of clipped tokens, PPO", [each[DEFAULT]["clipped"] for each in measured_S], 0.05),
        verdicts.above("score of RLOO − PPO", score_SA[:, 4] - score_SA[:, 2], -TOLERANCE),
    ]


def rank_correlations(score_SL: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation of lambda and score for each seed."""
    return np.array([stats.spearmanr(LAMBDAS, score_L)[0] for score_L in score_SL])


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the scores."""
    score_SA = np.array([[measured[name]["score"] for name in ARMS] for measured in measured_S])
    with plots.axes(height=2.4) as (svg, (ax,)):
        ax.plot(range(len(ARMS)), score_SA.T, ".", color=plots.color("ppo"), alpha=0.5)
        ax.plot(range(len(ARMS)), score_SA.mean(axis=0), "_", color=plots.color("ppo"), markersize=14)
        ax.set_xticks(range(len(ARMS)), list(ARMS))
        ax.set_ylabel("score of the reward model")
    return svg[0]


CLAIM = Claim(
    id="C43c",
    paper="Ahmadian et al. 2024",
    claim="A lambda below 1 hurts PPO, its clipping rarely binds, and RLOO reaches at least the reward of PPO.",
    published="RLOO with 4 samples 77.9, 43.7 and 64.1 % against PPO 67.6, 29.2 and 32.0 %; less than 5 % clipped",
    differs="Rewards are scores of the reward model instead of win rates. PPO and RLOO have the same learning rate and "
    "KL coefficient, and neither is tuned separately.",
    measure=measure,
    decide=decide,
    plot=plot,
)
