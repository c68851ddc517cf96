"""Measures how likely held-out text is under a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from recipe import stages, tasks

from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.train import state as state_lib


def mean_loss(trial: Trial, params: types.Params, rows: types.TokenBatch) -> float:
    """Returns the mean loss of the tokens that the loss mask of ``rows`` selects, in nats.

    The compiled step of SFT computes it, with a learning rate of 0, so that no other program is compiled.
    """
    batch, n, key = trial.settings.pretrain.batch, len(rows.tokens_BL), jax.random.key(0)
    state = state_lib.create(jax.tree.map(jnp.array, params), trial.supervised_tx)
    total = 0.0
    for first in range(0, n, batch):
        place = np.arange(first, first + batch)
        part = tasks.token_batch(rows, np.minimum(place, n - 1))
        chosen_BL = part.loss_mask_BL & (place < n)[:, None]  # the last row fills up the last batch
        part = dataclasses.replace(part, loss_mask_BL=chosen_BL)
        state, metrics = trial.supervised_step(state, None, stages.hyper(0.0), part, key)
        total += float(metrics["loss"].sum)
    return total / int(np.sum(rows.loss_mask_BL))
