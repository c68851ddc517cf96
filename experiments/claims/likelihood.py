"""Measures how likely held-out text is under a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from claims.trial import Trial
from rlhf_jax import lm, types

CHUNK = 128
"""Rows per call, fixed so that the program compiles once."""


def mean_loss(trial: Trial, params: types.Params, rows: types.TokenBatch) -> float:
    """Returns the mean loss of the tokens that the loss mask of ``rows`` selects, in nats."""
    logprobs = _logprobs(trial.cfg)
    total, n = 0.0, len(rows.tokens_BL)
    for first in range(0, n, CHUNK):
        at = np.minimum(np.arange(first, first + CHUNK), n - 1)
        loss_BL = -np.asarray(logprobs(params, rows.tokens_BL[at], mask_BL=rows.mask_BL[at]), np.float64)
        chosen_BL = np.asarray(rows.loss_mask_BL)[at] & (np.arange(first, first + CHUNK) < n)[:, None]
        total += loss_BL[chosen_BL].sum()
    return float(total / np.sum(rows.loss_mask_BL))


@functools.cache
def _logprobs(cfg: lm.LMConfig) -> Callable[..., jax.Array]:
    return jax.jit(partial(lm.token_logprobs, cfg=cfg))
