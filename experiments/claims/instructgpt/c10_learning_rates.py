"""C10: PPO-ptx tolerates higher learning rates than PPO, and needs enough text (Ouyang et al. 2022, Fig. 38 and E.11).

PPO and PPO-ptx are trained with several learning rates. A rate is too large if the loss on held-out text rises by more
than 1 nat above that of the SFT model. PPO-ptx is also trained with several amounts of pretraining text per answer;
with little text, the loss on held-out text is higher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from recipe import tasks

from claims import likelihood, verdicts
from claims import model_stages as ms
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots

METHODS = ("PPO", "PPO-ptx")
RATES = (1, 4, 16)
"""Factors on the default learning rate of the policy."""
RATIOS = (0.0625, 0.25, 1)
"""Rows of pretraining text per answer."""
ITERATIONS = 8
DIVERGED = 1.0
"""Rise of the loss on held-out text, in nats, at which a learning rate is too large."""


def measure(trial: Trial) -> Measured:
    """Trains all policies; returns the rise of the loss on held-out text, and the gain in gold utility, of each."""
    recipe, iterations = ms.Recipe(trial), 2 if trial.quick else ITERATIONS
    arms: dict[str, dict[str, Any]] = {}
    for rate in RATES:
        arms[f"PPO, rate x {rate}"] = {"rate": rate, "ptx_coef": 0.0}
        arms[f"PPO-ptx, rate x {rate}"] = {"rate": rate, "ptx_coef": 1.0}
    for ratio in RATIOS[: 2 if trial.quick else None]:
        arms[f"PPO-ptx, ratio {ratio:g}"] = {"rate": 1, "ptx_coef": 1.0} | ({} if ratio == 1 else {"ptx_ratio": ratio})
    gold = float(np.mean(trial.result(ms.answer, recipe.start, recipe.start, recipe.reward).value["gold"]))
    loss = likelihood.mean_loss(trial, recipe.start.value, tasks.text_batch(trial.task.pretraining_held_out_BL))
    measured = {}
    for name, options in arms.items():
        end = trial.result(train_and_test, recipe.start, recipe.reward, iterations=iterations, **options).value
        measured[name] = {"gain": end["gold"] - gold, "rise": end["loss"] - loss}
    return measured


def train_and_test(
    trial: Trial, start: types.Params, reward: types.Params, *, rate: float, ptx_coef: float, **changes: Any
) -> dict[str, float]:
    """Trains a policy; returns its gold utility and its loss on held-out text.

    Args:
        trial: The trial.
        start: Parameters of the SFT model.
        reward: Parameters of the reward model.
        rate: Factor on the learning rate of the policy.
        ptx_coef: Weight of the pretraining loss.
        **changes: Other --ppo settings.
    """
    # A run that diverges must not stop; its steps with a non-finite gradient are skipped.
    own = dataclasses.replace(trial, settings=dataclasses.replace(trial.settings, max_skipped=10**6))
    learning_rate = rate * trial.settings.ppo.learning_rate
    trained = ms.train_policy(own, start, reward, ptx_coef=ptx_coef, learning_rate=learning_rate, **changes)
    rows = tasks.text_batch(trial.task.pretraining_held_out_BL)
    return {
        "gold": float(np.mean(ms.answer(trial, trained, start, reward)["gold"])),
        "loss": likelihood.mean_loss(trial, trained["policy"], rows),
    }


def threshold(rises: Sequence[float]) -> float:
    """Returns the base-2 logarithm of the factor at which the rise reaches `DIVERGED`, interpolated between `RATES`.

    It is the lowest factor if that diverges already, and the highest if none does.
    """
    log_rates = np.log2(RATES)
    for i, rise in enumerate(rises):
        if rise > DIVERGED:
            if i == 0:
                return float(log_rates[0])
            share = (DIVERGED - rises[i - 1]) / (rise - rises[i - 1])
            return float(log_rates[i - 1] + share * (log_rates[i] - log_rates[i - 1]))
    return float(log_rates[-1])


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the thresholds of the learning rate, and computes the slope of the loss against the amount of text."""
    ppo_S, ptx_S = (np.array([threshold(rises(measured, name)) for measured in measured_S]) for name in METHODS)
    ratios = {ratio: name for ratio in RATIOS if (name := f"PPO-ptx, ratio {ratio:g}") in measured_S[0]}
    losses_SR = np.array([[each[name]["rise"] for name in ratios.values()] for each in measured_S])
    slopes_S = np.polyfit(np.log2(list(ratios)), losses_SR.T, 1)[0]
    return [
        verdicts.above("learning rate at which PPO-ptx diverges − at which PPO does, in octaves", ptx_S - ppo_S),
        verdicts.below("change of the loss on held-out text per doubling of the training text", slopes_S),
    ]


def rises(measured: Measured, method: str) -> list[float]:
    """Returns the rise of the loss with each of `RATES`."""
    return [measured[f"{method}, rate x {rate}"]["rise"] for rate in RATES]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the rise of the loss against the learning rate."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in zip(METHODS, ("ppo", "ppo_ptx"), strict=True):
            rises_SR = np.array([rises(each, name) for each in measured_S])
            ax.plot(range(len(RATES)), rises_SR.T, ".", color=plots.color(color), alpha=0.4)
            ax.plot(range(len(RATES)), rises_SR.mean(axis=0), color=plots.color(color), label=name)
        ax.axhline(DIVERGED, color=plots.color("other"), linewidth=0.8)
        ax.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
        ax.set_xlabel("factor on the learning rate")
        ax.set_ylabel("rise of the loss on text (nats)")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C10",
    paper="Ouyang et al. 2022, Figure 38, E.8 and E.11",
    claim="PPO diverges at large learning rates, at which PPO-ptx does not; more pretraining text per episode keeps "
    "the pretraining loss lower.",
    published="without the pretraining loss, rates above 8.05e-6 diverge; with 4 rows of text per episode, the "
    "pretraining loss rises; with 8 it does not; 32 are better",
    differs="A third of the iterations of other claims. A rate counts as too large if the loss on text rises by more "
    "than 1 nat. In trials with two other seeds and 12 iterations, the gold utility of both methods fell at the same "
    "rates. The ratios are 1/16, 1/4 and 1. Batch sizes and the mix of the initial model are not tested.",
    measure=measure,
    decide=decide,
    plot=plot,
)
