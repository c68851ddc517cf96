"""C32: a separate critic, which starts from the reward model, beats one on the policy's trunk (Stiennon et al. 2020).

The shared trunk has a zero head for the values, as in Ziegler et al. (2019), and two weights of the value loss, of
which the better is chosen on the other seeds. Compared is the final score of the reward model (Figure 11).
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
ARMS = {
    SEPARATE: {},
    "shared trunk, value weight 0.1": {"critic": "zero-head", "value_coef": 0.1},
    "shared trunk, value weight 1": {"critic": "zero-head", "value_coef": 1.0},
}


def measure(trial: Trial) -> Measured:
    """Trains a policy with each critic; returns its worth and the scores of its rollouts."""
    recipe, measured = ms.Recipe(trial), {}
    for name, changes in ARMS.items():
        policy = trial.result(ms.train_policy, recipe.start, recipe.reward, **changes)
        answers = trial.result(ms.answer, policy, recipe.start, recipe.reward).value
        measured[name] = {axis: float(np.mean(answers[axis], dtype=np.float64)) for axis in ("gold", "score", "kl")}
        measured[name]["course"] = policy.value["logged"]["reward"]
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the final scores."""
    score_SA = np.array([[measured[name]["score"] for name in ARMS] for measured in measured_S])
    S = len(score_SA)
    others = [np.delete(score_SA, s, axis=0) if S > 1 else score_SA for s in range(S)]
    best_S = np.array([1 + np.argmax(each.mean(axis=0)[1:]) for each in others])
    shared_S = score_SA[np.arange(S), best_S]
    return [verdicts.above("final score with a separate critic − with a shared trunk", score_SA[:, 0] - shared_S)]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the mean score of the rollouts in the course of training."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in zip(ARMS, ("ppo", "sft", "best_of_n"), strict=True):
            reward_SI = np.array([measured[name]["course"] for measured in measured_S])
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
    differs="The policy starts from the same SFT model in all arms, and each arm has the same number of iterations.",
    measure=measure,
    decide=decide,
    plot=plot,
)
