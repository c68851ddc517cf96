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

NETS: dict[str, dict[str, int]] = {
    "1 x 16": {"layers": 1, "width": 16, "heads": 2, "mlp": 32},
    "1 x 32": {"layers": 1, "width": 32, "heads": 4, "mlp": 64},
    "2 x 64": {"layers": 2, "width": 64, "heads": 4, "mlp": 128},
    "2 x 96": {"layers": 2, "width": 96, "heads": 4, "mlp": 256},
}
"""The --net settings of models that are smaller than those of most claims, by layers x width."""
LARGEST = "3 x 96"
"""The size of models in most claims."""
LOG_SIZES = {
    size: float(np.log2(net["layers"] * (4 * net["width"] ** 2 + 3 * net["width"] * net["mlp"])))
    for size, net in (NETS | {LARGEST: {"layers": 3, "width": 96, "mlp": 256}}).items()
}
"""Base-2 logarithm of the number of parameters in the layers, smallest first."""


def pretrain(trial: Trial, *, size: str = LARGEST) -> types.Params:
    """Returns the base model."""
    return stages.pretrain(sized(trial, size))


def fine_tune(trial: Trial, base: types.Params, *, epochs: int, mix: float, size: str = LARGEST) -> types.Params:
    """Returns the base model after SFT on the demonstrations, with the share ``mix`` of pretraining rows."""
    return stages.supervised(sized(trial, size), "sft_mix" if mix else "sft", base, epochs=epochs, mix=mix)


def sized(trial: Trial, size: str, *, policy_only: bool = False) -> Trial:
    """Returns a trial with models of another size; with ``policy_only``, only the policy is of that size."""
    if size == LARGEST:
        return trial
    return trial.with_net(NETS["1 x 16" if trial.quick else size], policy_only=policy_only)


def compare(trial: Trial, sft: types.Params, start: types.Params) -> tuple[types.Comparisons, dict[str, Any]]:
    """Returns ranked answers of both SFT models, those for validation at the end, and facts about the labels."""
    return comparison_data.sample_and_rank(trial, [sft, start], "comparisons")


PARTS = {
    "first half": slice(0, None, 2),
    "second half": slice(1, None, 2),
    **{f"quarter {i + 1}": slice(i, None, 4) for i in range(4)},
}
"""Parts of the comparisons."""


def train_reward_model(
    trial: Trial, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]], *, part: str = "all"
) -> types.Params:
    """Returns a reward model with normalised scores, trained on all comparisons or on one of `PARTS` of them."""
    rows = train_rows(trial, compared[0])
    if part != "all":
        rows = jax.tree.map(lambda x: x[PARTS[part]], rows)
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
    trial: Trial,
    start: types.Params,
    reward: types.Params,
    *,
    ptx_coef: float = 0.0,
    size: str = LARGEST,
    **changes: Any,
) -> dict[str, Any]:
    """Returns the ``policy`` that RL trains with the changed --ppo settings, and the logged numbers by iteration."""
    own = sized(trial, size, policy_only=True).with_ppo(**changes)
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
    trial: Trial, policy: types.Params, start: types.Params, reward: types.Params, *, seed: int = 0, size: str = LARGEST
) -> dict[str, np.ndarray]:
    """Returns what a policy's answers to the held-out prompts are worth, one row per prompt.

    ``features`` are those of the labelers; they include the length. ``size`` is that of ``policy`` and ``start``.
    """
    key = jax.random.fold_in(trial.key("evaluate"), seed)
    sampler = sized(trial, size, policy_only=True).sampler
    return worth(sampler(policy.get("policy", policy), start, reward, trial.task.eval_prompts, key))


def worth(answers: policy_sampling.Answers) -> dict[str, np.ndarray]:
    """Returns gold utility, score, KL and the labelers' features of each answer."""
    return {
        "gold": np.asarray(answers.gold.total),
        "score": answers.scores_B,
        "kl": answers.kl_B,
        "features": np.asarray(labelers.features(answers.gold)),
    }


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
        self._trial, settings = trial, trial.settings.sft
        self.base: Result = trial.result(pretrain)
        self.sft: Result = trial.result(fine_tune, self.base, epochs=settings.epochs, mix=0.0)
        self.start: Result = trial.result(fine_tune, self.base, epochs=settings.mix_epochs, mix=settings.mix)
        self.compared: Result = trial.result(compare, self.sft, self.start)
        self.reward: Result = trial.result(train_reward_model, self.start, self.compared)

    def base_of(self, size: str) -> Result:
        """Returns the base model of a size."""
        return self.base if size == LARGEST else self._trial.result(pretrain, size=size)

    def start_of(self, size: str) -> Result:
        """Returns the SFT model of a size from which RL starts."""
        if size == LARGEST:
            return self.start
        settings = self._trial.settings.sft
        options: dict[str, Any] = {"epochs": settings.mix_epochs, "mix": settings.mix, "size": size}
        return self._trial.result(fine_tune, self.base_of(size), **options)
