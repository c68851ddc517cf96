"""C23: RL lowers the zero-shot accuracy of small models and raises that of large ones (Bai et al. 2022, Fig. 3).

PPO trains SFT models of four sizes against one reward model. Skill problems such as copying and sorting, which are part
of the pretraining text and never of the prompts of RL, are answered before and after it. The change in accuracy is
regressed on the logarithm of the number of parameters: the slope must be positive. The sign of the changes themselves
is not tested, since the models are far smaller than those that gain in the paper (Figures 28 and 29).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots

SIZES = ("1 x 32", "2 x 64", "2 x 96", ms.LARGEST)


def measure(trial: Trial) -> Measured:
    """Returns the skill accuracy and the pretraining loss of each size before and after PPO."""
    recipe, measured = ms.Recipe(trial), {}
    for size in SIZES:
        start, sized = recipe.start_of(size), {} if size == ms.LARGEST else {"size": size}
        policy = trial.result(ms.train_policy, start, recipe.reward, **sized)
        models = {"before": start, "after": policy}
        measured[size] = {name: trial.result(probe, model, **sized).value for name, model in models.items()}
    return measured


def probe(trial: Trial, policy: types.Params, *, size: str = ms.LARGEST) -> dict[str, Any]:
    """Returns the skill accuracy and the pretraining loss of a policy of a size."""
    return ms.probe(ms.sized(trial, size, policy_only=True), policy)


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Regresses the change in skill accuracy on the logarithm of the size."""
    slopes_S = [slope(each) for each in measured_S]
    return [verdicts.above("change in skill accuracy by PPO for each doubling of the parameters", slopes_S)]


def slope(measured: Measured) -> float:
    """Returns the change in skill accuracy that a doubling of the number of parameters adds."""
    sizes = [ms.LOG_SIZES[size] for size in measured]
    return float(np.polyfit(sizes, [change(each) for each in measured.values()], 1)[0])


def change(measured: dict[str, dict[str, float]]) -> float:
    """Returns the skill accuracy after PPO minus that before it."""
    return measured["after"]["skill_accuracy"] - measured["before"]["skill_accuracy"]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the skill accuracy before and after PPO against the size."""
    sizes = [ms.LOG_SIZES[size] for size in measured_S[0]]
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color, label in (("before", "sft_mix", "SFT"), ("after", "ppo", "PPO")):
            accuracy_SN = np.array([[each[name]["skill_accuracy"] for each in run.values()] for run in measured_S])
            ax.plot(sizes, accuracy_SN.T, ".", color=plots.color(color), alpha=0.4)
            ax.plot(sizes, accuracy_SN.mean(axis=0), "-", color=plots.color(color), label=label)
        ax.set_xlabel("base-2 logarithm of the number of parameters in the layers")
        ax.set_ylabel("skill accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C23",
    paper="Bai et al. 2022 (helpful and harmless), Figures 3, 28 and 29",
    claim="RL lowers the zero-shot accuracy of small models more than that of large ones.",
    published="a loss below about 10 billion parameters, a gain at 13 and 52 billion, except on TriviaQA",
    differs="The largest model is 32 times as large as the smallest. All sizes have one reward model, and the skills "
    "are copying, sorting, sums and looking up.",
    measure=measure,
    decide=decide,
    plot=plot,
)
