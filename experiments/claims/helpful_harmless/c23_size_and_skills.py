"""C23: RL harms the capabilities of small models more than those of large ones (Bai et al. 2022, Figures 3 and 28).

PPO trains SFT models of four sizes against one reward model. The probe is the mean log-probability per token of
held-out pretraining text, which includes skill problems such as copying and sorting. Its change by PPO is regressed on
the logarithm of the number of parameters: the slope must be positive. The sign of the changes themselves is not tested,
since the models are far smaller than those that gain in the paper (Figures 28 and 29).

The probe was chosen with seed 100. The accuracy on skill problems, which is drawn as well, does not serve: the smallest
models solve none of them and so have nothing to lose.
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
    """Regresses the change of the log-probability on the logarithm of the size."""
    slopes_S = [slope(each) for each in measured_S]
    name = "change of the log-probability of pretraining text by PPO, nats per token, per doubling of the parameters"
    return [verdicts.above(name, slopes_S)]


def slope(measured: Measured) -> float:
    """Returns the change of the log-probability that a doubling of the number of parameters adds."""
    changes = [each["before"]["pretraining_loss"] - each["after"]["pretraining_loss"] for each in measured.values()]
    return float(np.polyfit([ms.LOG_SIZES[size] for size in measured], changes, 1)[0])


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the loss on pretraining text and the skill accuracy, before and after PPO, against the size."""
    sizes = [ms.LOG_SIZES[size] for size in measured_S[0]]
    axes_of = {"pretraining_loss": "loss on pretraining text", "skill_accuracy": "skill accuracy"}
    with plots.axes(height=4.4, rows=(1, 1)) as (svg, axes):
        for (probed, label), ax in zip(axes_of.items(), axes, strict=True):
            for name, color, model in (("before", "sft_mix", "SFT"), ("after", "ppo", "PPO")):
                value_SN = np.array([[each[name][probed] for each in run.values()] for run in measured_S])
                ax.plot(sizes, value_SN.T, ".", color=plots.color(color), alpha=0.4)
                ax.plot(sizes, value_SN.mean(axis=0), "-", color=plots.color(color), label=model)
            ax.set_ylabel(label)
        axes[-1].set_xlabel("base-2 logarithm of the number of parameters in the layers")
        axes[-1].legend()
    return svg[0]


CLAIM = Claim(
    id="C23",
    paper="Bai et al. 2022 (helpful and harmless), Figures 3, 28 and 29",
    claim="RL harms the capabilities of small models more than those of large ones.",
    published="zero-shot accuracy: a loss below about 10 billion parameters, a gain at 13 and 52 billion, except on "
    "TriviaQA",
    differs="The largest model is 32 times as large as the smallest. All sizes have one reward model. The probe is the "
    "log-probability of pretraining text, since the smallest models solve no skill problem; the accuracy on these, "
    "which is drawn, falls more for large models with seed 100.",
    measure=measure,
    decide=decide,
    plot=plot,
)
