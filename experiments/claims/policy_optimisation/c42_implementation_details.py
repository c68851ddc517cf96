"""C42: PPO gains from normalised advantages, a large batch and a moving reference (Xu et al. 2024, Tables 3 and 11).

The three details are added one after the other to a baseline with a batch of 32 answers and without normalised
advantages. All policies have the same number of optimiser steps. The score of the reward model, which they optimise, is
measured on held-out prompts. A last policy has all details, except the moving reference, and a large KL coefficient.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from launch.settings import PPO
from recipe import rl_methods

from claims import model_stages as ms
from claims import trial as trial_lib
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import parallel, types
from rlhf_jax.report import plots
from rlhf_jax.train import estimators, ppo

SMALL_BATCH = 32
STEPS = ("baseline", "+ normalised advantages", "+ large batch", "+ moving reference")
LARGE_KL = "large KL coefficient"
REFERENCE_DECAY = 0.9


class WithoutWhitening(trial_lib.Programs):
    """Compiled steps whose advantages are not normalised."""

    def compiled_ppo(self, settings: PPO) -> parallel.JitStep:
        """Returns the PPO iteration."""
        options: dict[str, Any] = rl_methods.train_step_options(settings) | {
            "estimate": partial(estimators.gae, whiten=False)
        }
        return parallel.jit_step(ppo.make_train_step(self.rl_functions(), **options))


def train_without_whitening(trial: Trial, start: types.Params, reward: types.Params, **changes: Any) -> dict[str, Any]:
    """Returns what `model_stages.train_policy` does, for advantages that are not normalised."""
    programs = WithoutWhitening(trial.cfg, trial.spec, prompt_width=trial.task.prompt_width)
    return ms.train_policy(dataclasses.replace(trial, shared=programs), start, reward, **changes)


def measure(trial: Trial) -> Measured:
    """Trains the policies; returns score, KL and gold utility of each."""
    recipe = ms.Recipe(trial)
    inputs = (recipe.start, recipe.reward)
    small = min(SMALL_BATCH, trial.settings.ppo.batch // 2)
    policies = {
        "baseline": trial.result(train_without_whitening, *inputs, batch=small),
        "+ normalised advantages": trial.result(ms.train_policy, *inputs, batch=small),
        "+ large batch": trial.result(ms.train_policy, *inputs),
        "+ moving reference": trial.result(ms.train_policy, *inputs, reference_ema=REFERENCE_DECAY),
        LARGE_KL: trial.result(ms.train_policy, *inputs, kl_coef=1.0),
    }
    measured = {}
    for name, policy in policies.items():
        answers = trial.result(ms.answer, policy, *inputs).value
        measured[name] = {each: float(np.mean(answers[each])) for each in ("score", "kl", "gold")}
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares each policy with the one before it."""
    score = {name: np.array([measured[name]["score"] for measured in measured_S]) for name in (*STEPS, LARGE_KL)}
    return [
        verdicts.above("score with all details − baseline", score[STEPS[-1]] - score[STEPS[0]]),
        *(
            verdicts.above(f"score: {after} − before", score[after] - score[before])
            for before, after in itertools.pairwise(STEPS)
        ),
        verdicts.above("score with KL coefficient 0.055 − 1", score["+ large batch"] - score[LARGE_KL]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the scores."""
    names = (*STEPS, LARGE_KL)
    score_SA = np.array([[measured[name]["score"] for name in names] for measured in measured_S])
    with plots.axes(height=2.6) as (svg, (ax,)):
        ax.plot(score_SA.T, range(len(names)), ".", color=plots.color("ppo"), alpha=0.5)
        ax.plot(score_SA.mean(axis=0), range(len(names)), "|", color=plots.color("ppo"), markersize=14)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel("score of the reward model")
    return svg[0]


CLAIM = Claim(
    id="C42",
    paper="Xu et al. 2024, Tables 3 and 11",
    claim="PPO gains from normalised advantages, a large batch and a moving reference; a large KL coefficient hurts.",
    published="pass@5 on APPS: 18.0, 38.1, 42.3, 44.4 %; reward on HH 0.706, 0.716, 0.716, 0.718, with beta 0.2 0.629",
    differs="Scores of the reward model replace pass@5. The policies have the same number of optimiser steps, so a "
    "small batch also means fewer answers. The decay of the reference, which the paper does not report, is 0.9.",
    measure=measure,
    decide=decide,
    plot=plot,
)
