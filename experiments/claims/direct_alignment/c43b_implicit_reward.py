"""C43b: DPO's implicit reward is less accurate than an explicit reward model ("N+ implementation details" 2024).

A reward model and DPO are trained on the same rankings, from the same SFT model, with all pairs of a prompt in one
batch. DPO's implicit reward is the log-ratio of its policy and the SFT model. Both are compared on held-out rankings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import reward_fits, verdicts
from claims.claim import Claim, Measured
from claims.direct_alignment import dpo_stages
from claims.trial import Trial
from rlhf_jax.report import plots

ARMS = ("reward model", "DPO")


def measure(trial: Trial) -> Measured:
    """Trains DPO; returns the accuracy of both rewards on the validation comparisons."""
    recipe = ms.Recipe(trial)
    policy = trial.result(dpo_stages.train_dpo, recipe.start, recipe.compared, beta=0.1)
    rewards = {
        "reward model": trial.result(dpo_stages.explicit_rewards, recipe.reward, recipe.compared),
        "DPO": trial.result(dpo_stages.implicit_rewards, policy, recipe.start, recipe.compared),
    }
    rows = ms.validation_rows(trial, recipe.compared.value[0])
    return {name: {"accuracy": reward_fits.pair_numbers(rewards[name].value, rows)["accuracy"]} for name in ARMS}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the two accuracies."""
    accuracy_SA = np.array([[measured[name]["accuracy"] for name in ARMS] for measured in measured_S])
    return [
        verdicts.above("accuracy of the reward model − of DPO's implicit reward", accuracy_SA[:, 0] - accuracy_SA[:, 1])
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracies of each seed."""
    with plots.axes(height=2.2) as (svg, (ax,)):
        for measured in measured_S:
            ax.plot([0, 1], [measured[name]["accuracy"] for name in ARMS], "o-", color=plots.color("reward_model"))
        ax.set_xticks([0, 1], ["reward model", "DPO's implicit reward"])
        ax.set_xlim(-0.5, 1.5)
        ax.set_ylabel("accuracy on held-out pairs")
    return svg[0]


CLAIM = Claim(
    id="C43b",
    paper='"The N+ implementation details of RLHF with PPO" 2024',
    claim="DPO's implicit reward is less accurate than an explicit reward model trained on the same comparisons.",
    published="accuracy of the reward model 62.8, 66.9 and 68.9 % with 1B, 2.8B and 6.9B parameters; DPO is lower",
    differs="Labels are rankings of 4 to 9 answers by simulated labelers. The learning rate of DPO is that of PPO, and "
    "beta is 0.1.",
    measure=measure,
    decide=decide,
    plot=plot,
)
