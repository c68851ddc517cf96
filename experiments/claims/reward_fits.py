"""Trains reward models on parts of the comparisons and in other ways than the recipe, and measures them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from recipe import stages

from claims.trial import Trial
from rlhf_jax import lm, types
from rlhf_jax.data import batching
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

PAIRS_PER_BATCH = 4
"""Shuffled pairs per prompt of a batch. A batch then has about as many answers as a batch of whole prompts."""


def fit(
    trial: Trial,
    start: types.Params,
    rows: types.Comparisons,
    *,
    batch: int,
    epochs: int = 1,
    rate: float = 1.0,
    shuffled: bool = False,
    run: int = 0,
) -> types.Params:
    """Returns a reward model, whose scores are not normalised.

    Args:
        trial: The trial.
        start: Initial parameters.
        rows: The comparisons to train on.
        batch: Prompts per step.
        epochs: Number of passes over them.
        rate: Factor on the learning rate.
        shuffled: Whether to train on shuffled pairs instead of whole prompts.
        run: Number of the training run. Runs differ in the order of the prompts and the initial head.
    """
    settings, key = trial.settings.reward_model, trial.key("reward_model")
    key = jax.random.fold_in(key, 100 + run) if run else key
    if shuffled:
        rows, batch = pairs_of(rows), batch * PAIRS_PER_BATCH
    n = len(rows.ranks_BK)
    steps = epochs * (n // batch)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    params = lm.with_head(jax.random.fold_in(key, 1), start, trial.cfg)
    state = trial.fit(
        "reward_model",
        trial.reward_step,
        trial.create_on_mesh(partial(state_lib.create, tx=trial.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], rows),
        hyper_at=lambda i: stages.hyper(rate * settings.learning_rate * schedules.cosine(i, steps)),
    )
    return lm.heads.absorb_gain(state.params)


def pairs_of(rows: types.Comparisons) -> types.Comparisons:
    """Returns each pair of answers with different ranks as a comparison of its own."""
    b, i, j = np.nonzero(better(np.asarray(rows.ranks_BK), np.asarray(rows.where_BK)))
    tokens, mask = (np.stack([x[b, i], x[b, j]], axis=1) for x in map(np.asarray, (rows.tokens_BKL, rows.mask_BKL)))
    ranks = np.tile(np.array([1, 2], np.asarray(rows.ranks_BK).dtype), (len(b), 1))
    return dataclasses.replace(
        rows, tokens_BKL=tokens, mask_BKL=mask, ranks_BK=ranks, where_BK=np.ones(ranks.shape, bool)
    )


def better(ranks_BK: np.ndarray, where_BK: np.ndarray) -> np.ndarray:
    """Returns whether the first answer of a pair has the better rank, ``[B, K, K]``."""
    return (ranks_BK[:, :, None] < ranks_BK[:, None]) & where_BK[:, :, None] & where_BK[:, None]


def held_out(trial: Trial, comparisons: types.Comparisons, *, trained: int, limit: int) -> types.Comparisons:
    """Returns up to ``limit`` of the last comparisons that ask nothing that the first ``trained`` ones ask."""
    assert trial.task.world is not None
    asked_B = trial.task.world.compare_prompts.asked_B
    rows = np.flatnonzero(~np.isin(asked_B, asked_B[:trained]))[-limit:]
    return jax.tree.map(lambda x: x[rows], comparisons)


def score(trial: Trial, reward: types.Params, rows: Any) -> np.ndarray:
    """Returns the scores of all answers, ``[B, K]``; 0 for missing ones."""
    b, k = np.nonzero(rows.where_BK)
    scores_BK = np.zeros(rows.where_BK.shape)
    scores_BK[b, k] = trial.sampler.score(reward, rows.tokens_BKL[b, k], rows.mask_BKL[b, k])
    return scores_BK


def pair_numbers(scores_BK: np.ndarray, rows: Any) -> dict[str, float]:
    """Returns the mean log-loss of pairs with different ranks, in nats, and the share of them in the right order."""
    lead_BKK = scores_BK[:, :, None] - scores_BK[:, None]
    lead_N = lead_BKK[better(np.asarray(rows.ranks_BK), np.asarray(rows.where_BK))]
    right_N = np.where(lead_N == 0, 0.5, lead_N > 0)
    return {"loss": float(np.logaddexp(0, -lead_N).mean()), "accuracy": float(right_N.mean())}
