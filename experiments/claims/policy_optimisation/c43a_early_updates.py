"""C43a: PyTorch's Adam makes larger first updates than TensorFlow 1's ("N implementation details" 2023).

TensorFlow 1 adds epsilon before the bias correction, so in the first steps its epsilon is effectively larger. Both arms
train on the same rollout, with a new optimiser, b2 0.999 and no gradient clipping, as in Ziegler et al. (2019). The
rollout has one minibatch and is used in two epochs, so the change of the policy is that of the first step. Adam's
epsilon matters relative to the gradients. Those of a model with 300 times fewer parameters than GPT-2 are about 17
times larger, so epsilon is 1e-4 instead of 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

ARMS = {"PyTorch": False, "TensorFlow 1": True}
ONE_BATCH: dict[str, Any] = {
    "iterations": 1,
    "minibatches": 1,
    "epochs": 2,
    "warmup": 0,
    "adam_b2": 0.999,
    "adam_eps": 1e-4,
    "max_grad_norm": None,
}


def measure(trial: Trial) -> Measured:
    """Takes two optimiser steps on one rollout with each Adam; returns how far the policy moved."""
    recipe, measured = ms.Recipe(trial), {}
    for name, tf1 in ARMS.items():
        trained = trial.result(ms.train_policy, recipe.start, recipe.reward, adam_tf1=tf1, **ONE_BATCH)
        logged = trained.value["logged"]
        measured[name] = {each: float(logged[each][0]) for each in ("approx_kl", "clip_fraction")}
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the KL of the update and the share of clipped tokens."""
    kl_SA, clipped_SA = (
        np.array([[measured[arm][name] for arm in ARMS] for measured in measured_S])
        for name in ("approx_kl", "clip_fraction")
    )
    ratio_S = np.log(kl_SA[:, 0] / kl_SA[:, 1])
    return [
        verdicts.above("log of the ratio of the KL of the update, PyTorch / TensorFlow 1", ratio_S, float(np.log(2))),
        verdicts.above("share of clipped tokens, PyTorch − TensorFlow 1", clipped_SA[:, 0] - clipped_SA[:, 1]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the share of clipped tokens against the KL of the update."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        for name, color in zip(ARMS, ("ppo", "sft")):
            x, y = ([measured[name][each] for measured in measured_S] for each in ("approx_kl", "clip_fraction"))
            ax.plot(x, y, "o", color=plots.color(color), label=name)
        plots.log_x(ax)
        ax.set_xlabel("approximate KL of the update")
        ax.set_ylabel("share of clipped tokens")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C43a",
    paper='"The N implementation details of RLHF with PPO" 2023, section on Adam',
    claim="PyTorch's Adam makes more aggressive early updates than TensorFlow 1's.",
    published="first updates: approximate KL 2.37e-3 against 3.7e-4, share of clipped tokens 2.0 % against 0.5 %",
    differs="The learning rate is 6e-4 instead of 1e-5, and epsilon 1e-4 instead of 1e-5, because the model is small "
    "and its gradients are larger. The size of the effect depends on epsilon relative to the gradients.",
    measure=measure,
    decide=decide,
    plot=plot,
)
