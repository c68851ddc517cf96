"""The stages that claims share: models, comparisons, policies and answers. Each is a function of a `Trial`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from recipe import comparison_data, evaluation, policy_sampling, stages

from claims.result_store import Result
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.simulation import labelers
from rlhf_jax.train import ppo


def pretrain(trial: Trial) -> types.Params:
    """Returns the base model."""
    return stages.pretrain(trial)


def fine_tune(trial: Trial, base: types.Params, *, epochs: int, mix: float) -> types.Params:
    """Returns the base model after SFT on the demonstrations, with the share ``mix`` of pretraining rows."""
    return stages.supervised(trial, "sft_mix" if mix else "sft", base, epochs=epochs, mix=mix)


def compare(trial: Trial, sft: types.Params, start: types.Params) -> tuple[types.Comparisons, dict[str, Any]]:
    """Returns ranked answers of both SFT models, those for validation at the end, and facts about the labels."""
    return comparison_data.sample_and_rank(trial, [sft, start], "comparisons")


def train_reward_model(
    trial: Trial, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]], *, part: str = "all"
) -> types.Params:
    """Returns a reward model with normalised scores, trained on all comparisons or on one ``half`` of them."""
    rows = train_rows(trial, compared[0])
    if part != "all":
        rows = jax.tree.map(lambda x: x[{"first half": 0, "second half": 1}[part] :: 2], rows)
    reward = stages.train_reward_model(trial, start, rows)
    return stages.normalise_scores(trial, reward, start)


def train_rows(trial: Trial, comparisons: types.Comparisons) -> types.Comparisons:
    """Returns the training part of the comparisons."""
    assert trial.task.world is not None
    n = trial.task.world.n_compare
    return jax.tree.map(lambda x: x[:n], comparisons)


def validation_rows(trial: Trial, comparisons: types.Comparisons) -> types.Comparisons:
    """Returns the comparisons that no model is trained on."""
    assert trial.task.world is not None
    n = trial.task.world.n_compare
    return jax.tree.map(lambda x: x[n:], comparisons)


def train_policy(
    trial: Trial, start: types.Params, reward: types.Params, *, ptx_coef: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """Returns the ``policy`` that RL trains with the changed --ppo settings, and the logged numbers by iteration."""
    own = trial.with_ppo(**changes)
    rows: list[dict[str, float]] = []
    batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=ptx_coef)
    state = own.fit(
        "ppo",
        own.ppo_step,
        own.new_policy(start, reward),
        own.settings.ppo.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, reward),
        log=lambda step, floats: rows.append(floats),
    )
    logged = {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[0]}
    return {"policy": state.ema, "logged": logged}


def answer(
    trial: Trial, policy: types.Params, start: types.Params, reward: types.Params, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns what a policy's answers to the held-out prompts are worth, one row per prompt.

    ``features`` are those of the labelers; they include the length.
    """
    key = jax.random.fold_in(trial.key("evaluate"), seed)
    return _worth(trial.sampler(policy.get("policy", policy), start, reward, trial.task.eval_prompts, key))


def _worth(answers: policy_sampling.Answers) -> dict[str, np.ndarray]:
    return {
        "gold": np.asarray(answers.gold.total),
        "score": answers.scores_B,
        "kl": answers.kl_B,
        "features": np.asarray(labelers.features(answers.gold)),
    }


def answer_often(
    trial: Trial, policy: types.Params, start: types.Params, reward: types.Params, *, prompts: int, samples: int
) -> dict[str, np.ndarray]:
    """Returns the same of ``samples`` answers to each of the first held-out prompts, ``[prompts, samples, ...]``."""
    asked = trial.task.eval_prompts.at(np.repeat(np.arange(prompts), samples))
    key = jax.random.fold_in(trial.key("evaluate"), 1000)
    worth = _worth(trial.sampler(policy.get("policy", policy), start, reward, asked, key))
    return {name: x.reshape(prompts, samples, *x.shape[1:]) for name, x in worth.items()}


def probe(trial: Trial, policy: types.Params) -> dict[str, Any]:
    """Returns the skill accuracy and the pretraining loss of a policy."""
    found = evaluation.make_probe(trial)(policy.get("policy", policy))
    return {name: found[name][0] for name in ("pretraining_loss", "skill_accuracy")} | {
        skill: accuracy[0] for skill, accuracy in found["skills"].items()
    }


class Recipe:
    """The results that most claims start from, none of which is computed before it is used."""

    def __init__(self, trial: Trial) -> None:
        """Stores the trial."""
        settings = trial.settings.sft
        self.base: Result = trial.result(pretrain)
        self.sft: Result = trial.result(fine_tune, self.base, epochs=settings.epochs, mix=0.0)
        self.start: Result = trial.result(fine_tune, self.base, epochs=settings.mix_epochs, mix=settings.mix)
        self.compared: Result = trial.result(compare, self.sft, self.start)
        self.reward: Result = trial.result(train_reward_model, self.start, self.compared)
