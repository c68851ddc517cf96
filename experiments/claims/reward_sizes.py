"""Reward models of several sizes, and how policies and the best of n samples exploit them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from recipe import stages

from claims import model_stages as ms
from claims import sample_pool, trajectories
from claims.result_store import Result
from claims.trial import Programs, Trial
from rlhf_jax import diagnostics, types

SIZES = ("1 x 16", "1 x 32", "2 x 64")
"""Sizes of the smaller reward models. The largest has the size of the policy."""
NS = (1, 2, 4, 8, 16, 32, 64)


def train(
    trial: Trial, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]], *, size: str
) -> types.Params:
    """Returns a reward model of one of the smaller sizes, which starts from an SFT model of this size."""
    own = ms.sized(trial, size)
    return stages.train_reward_model(own, start, ms.train_rows(own, compared[0]))


_programs = functools.cache(Programs)


def optimise(
    trial: Trial, start: types.Params, reward: types.Params, *, size: str, at: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns what `trajectories.follow` does without a KL penalty, with a reward model and critic of another size."""
    cfg: Any = ms.sized(trial, size).cfg
    programs = _programs(
        trial.cfg,
        trial.spec,  # type: ignore[arg-type]  # frozen, thus hashable
        prompt_width=trial.task.prompt_width,
        reward_cfg=cfg,
    )
    own = dataclasses.replace(trial, shared=programs, sampler=programs.sampler(trial.task))
    return trajectories.follow(own, start, stages.normalise_scores(own, reward, start), at=at, kl_coef=0.0)


def curve(scores_PN: np.ndarray, gold_PN: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the gains in score and gold utility of best of n over a single sample, one for each of `NS`.

    Scores are in units of their standard deviation within a prompt.
    """
    gold_PN = gold_PN[:, : scores_PN.shape[1]]
    unit = np.sqrt(np.mean(np.var(scores_PN, axis=1)))
    means = {
        "proxy": diagnostics.best_of_n_mean(scores_PN, scores_PN / max(unit, 1e-9), NS).mean(axis=0),
        "gold": diagnostics.best_of_n_mean(scores_PN, gold_PN, NS).mean(axis=0),
    }
    return {name: mean - mean[0] for name, mean in means.items()}


def rewards_of_sizes(trial: Trial, recipe: ms.Recipe) -> dict[str, Result]:
    """Returns the reward models of the smaller sizes."""
    return {
        size: trial.result(train, recipe.start_of(size), recipe.compared, size=size)
        for size in SIZES[:: 3 if trial.quick else 1]
    }


def measure_sizes(trial: Trial) -> tuple[Result, dict[str, dict[str, np.ndarray]]]:
    """Returns the sampled answers, as a stored result, and the curve of the reward model of each size."""
    recipe = ms.Recipe(trial)
    sampled, rewards = sample_pool.pool(trial, recipe), rewards_of_sizes(trial, recipe)
    score, samples = sample_pool.score, {"samples": NS[-1]}
    scores = {size: trial.result(score, reward, sampled, size=size, **samples) for size, reward in rewards.items()}
    scores[ms.LARGEST] = trial.result(score, recipe.reward, sampled, **samples)
    return sampled, {size: curve(scores_PN.value, sampled.value["gold"]) for size, scores_PN in scores.items()}
