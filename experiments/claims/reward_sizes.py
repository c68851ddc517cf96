"""Reward models of several sizes, and the best of n samples of one policy by each of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from recipe import stages

from claims import model_stages as ms
from claims.trial import Trial
from rlhf_jax import diagnostics, types

NETS: dict[str, dict[str, int]] = {
    "1 x 16": {"layers": 1, "width": 16, "heads": 2, "mlp": 32},
    "1 x 32": {"layers": 1, "width": 32, "heads": 4, "mlp": 64},
    "2 x 64": {"layers": 2, "width": 64, "heads": 4, "mlp": 128},
}
"""Sizes of the smaller reward models: layers x width. The largest has the size of the policy."""
LARGEST = "3 x 96"
LOG_SIZES = {
    size: float(np.log2(net["layers"] * (4 * net["width"] ** 2 + 3 * net["width"] * net["mlp"])))
    for size, net in (NETS | {LARGEST: {"layers": 3, "width": 96, "mlp": 256}}).items()
}
"""Base-2 logarithm of the number of parameters in the layers, smallest first."""
PROMPTS, SAMPLES = 192, 64
NS = (1, 2, 4, 8, 16, 32, 64)


def train(trial: Trial, compared: tuple[types.Comparisons, dict[str, Any]], *, size: str) -> types.Params:
    """Returns a reward model of one of the smaller sizes, pretrained and fine-tuned like the largest."""
    own, settings = trial.with_net(NETS[size]), trial.settings.sft
    start = ms.fine_tune(own, ms.pretrain(own), epochs=settings.mix_epochs, mix=settings.mix)
    return stages.train_reward_model(own, start, ms.train_rows(own, compared[0]))


def sample(trial: Trial, start: types.Params, *, prompts: int, samples: int) -> dict[str, np.ndarray]:
    """Returns the rows and the gold utility of ``samples`` answers to each of the first held-out prompts."""
    asked = trial.task.eval_prompts.at(np.repeat(np.arange(prompts), samples))
    answers = trial.sampler(start, None, None, asked, jax.random.fold_in(trial.key("evaluate"), 2000))
    return {
        "tokens": answers.tokens_BL,
        "mask": answers.mask_BL,
        "gold": np.asarray(answers.gold.total).reshape(prompts, samples),
    }


def score(trial: Trial, reward: types.Params, pool: dict[str, np.ndarray], *, size: str = LARGEST) -> np.ndarray:
    """Returns the scores of sampled answers, ``[prompts, samples]``."""
    own = trial if size == LARGEST else trial.with_net(NETS[size])
    return own.sampler.score(reward, pool["tokens"], pool["mask"]).reshape(pool["gold"].shape)


def curve(scores_PN: np.ndarray, gold_PN: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the gains in score and gold utility of best of n over a single sample, one for each of `NS`.

    Scores are in units of their standard deviation within a prompt.
    """
    scores_PN = np.round(scores_PN, 4)  # equal answers may differ in rounding
    unit = np.sqrt(np.mean(np.var(scores_PN, axis=1)))
    ns = [n for n in NS if n <= scores_PN.shape[1]]
    means = {
        "proxy": diagnostics.best_of_n_mean(scores_PN, scores_PN / max(unit, 1e-9), ns).mean(axis=0),
        "gold": diagnostics.best_of_n_mean(scores_PN, gold_PN, ns).mean(axis=0),
    }
    return {name: mean - mean[0] for name, mean in means.items()}


def measure_sizes(trial: Trial) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """Returns the sampled answers, as a stored result, and the curve of the reward model of each size."""
    recipe = ms.Recipe(trial)
    prompts, samples = (16, 16) if trial.quick else (PROMPTS, SAMPLES)
    pool = trial.result(sample, recipe.start, prompts=prompts, samples=samples)
    rewards = {size: trial.result(train, recipe.compared, size=size) for size in list(NETS)[:: 3 if trial.quick else 1]}
    scores = {size: trial.result(score, reward, pool, size=size) for size, reward in rewards.items()}
    scores[LARGEST] = trial.result(score, recipe.reward, pool)
    return pool, {size: curve(scores_PN.value, pool.value["gold"]) for size, scores_PN in scores.items()}
