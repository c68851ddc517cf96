"""The stages of claims about constitutional AI. Each is a function of a `Trial`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from constitution import ai_stages, harm_evaluation, red_team
from recipe import comparison_data

from claims import model_stages as ms
from claims import trial as trial_lib
from claims.trial import Trial
from rlhf_jax import feedback, types
from rlhf_jax.simulation import editor, harm_judge

_COMPARED = {"prompts": 600, "min_k": 4, "max_k": 4}
"""Settings of the labelers' comparisons, which have as many answers in each seed so that programs are shared."""
_RED_TEAM_SHARE = 0.5
"""Share of the red-team prompts in RL and in the evaluation."""


def sizes(trial: Trial, *, full: int, quick: int = 48) -> int:
    """Returns the number of prompts of a stage."""
    return quick if trial.quick else full


def train_helpful(trial: Trial, base: types.Params) -> types.Params:
    """Returns the helpful-only policy."""
    return ai_stages.train_helpful(trial, base)


def train_sl_cai(trial: Trial, base: types.Params, helpful: types.Params) -> types.Params:
    """Returns SL-CAI, from four revisions by the simulated editor."""
    simulated = editor.SimulatedEditor(seed=trial.settings.seed)
    revised = ai_stages.revise(trial, helpful, simulated, prompts=sizes(trial, full=800), rounds=4)
    rows = ai_stages.supervised_rows(trial, helpful, revised, benign=sizes(trial, full=800))
    return ai_stages.train_supervised(trial, base, rows)


def compare_helpfulness(trial: Trial, helpful: types.Params, sl_cai: types.Params) -> types.Comparisons:
    """Returns the labelers' comparisons of the helpfulness of answers to benign prompts."""
    changes = {"comparisons": {} if trial.quick else _COMPARED}
    own = dataclasses.replace(trial, settings=trial_lib.changed(trial.settings, changes))
    own = red_team.helpfulness_job(own)
    rows, _ = comparison_data.sample_and_rank(own, [helpful, sl_cai], "comparisons")
    return jax.tree.map(lambda x: x[: own.settings.comparisons.prompts], rows)


def train_preference_model(
    trial: Trial,
    sl_cai: types.Params,
    helpfulness: types.Comparisons,
    *,
    pairs: int,
    strength: float,
    overconfidence: float = 1.0,
    clamp: tuple[float, float] = (0.0, 1.0),
    hard: bool = False,
) -> types.Params:
    """Returns the preference model of the labelers' comparisons and of pairs that the simulated judge labels.

    Ties of the judge are left out, with hard labels and with soft ones.
    """
    assert trial.task.world is not None
    sampled = ai_stages.sample_pairs(trial, sl_cai, sizes(trial, full=pairs))
    judge = harm_judge.SimulatedJudge(
        trial.task.world.tables, strength=strength, overconfidence=overconfidence, seed=trial.settings.seed
    )
    labels = ai_stages.label_pairs(sampled.pairs, judge, seed=trial.settings.seed, principles=16, clamp=tuple(clamp))
    preference_N = np.where(feedback.is_tie(labels.preference_N), np.nan, labels.preference_N)
    rows = ai_stages.preference_rows(helpfulness, sampled, preference_N, hard=hard)
    return ai_stages.train_preference_model(red_team.rl_job(trial, red_team=_RED_TEAM_SHARE), sl_cai, rows)


def train_rl_cai(trial: Trial, sl_cai: types.Params, reward: types.Params, *, kl_coef: float) -> dict[str, Any]:
    """Returns RL-CAI: SL-CAI after PPO on red-team and benign prompts."""
    return ms.train_policy(red_team.rl_job(trial, red_team=_RED_TEAM_SHARE), sl_cai, reward, kl_coef=kl_coef)


def measure_policy(trial: Trial, policy: Any, sl_cai: types.Params, reward: types.Params) -> dict[str, Any]:
    """Returns means over held-out prompts of what `harm_evaluation.RATES` names, and of KL, score and its deviation."""
    prompts = harm_evaluation.held_out(trial, red_team_share=_RED_TEAM_SHARE)
    key = jax.random.fold_in(trial.key("evaluate"), 44)
    answers = trial.sampler(policy.get("policy", policy), sl_cai, reward, prompts, key)
    found = {name: float(np.nanmean(values)) for name, values in harm_evaluation.rates(answers).items()}
    refused = {"refused": float(np.mean(np.asarray(answers.gold.refused)))}
    deviation = {"deviation": ai_stages.score_deviation(reward)}
    return found | refused | deviation | {"kl": float(np.mean(answers.kl_B)), "score": float(np.mean(answers.scores_B))}
