"""Logs the loss of a reward model on held-out comparisons during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recipe import policy_sampling
from rlhf_jax import losses, types

TIMES = 8
"""Maximum number of measurements per stage. The alarm on the validation loss can be raised from the fifth on."""


def make_callback(
    score: Callable[..., np.ndarray],
    held_out: types.Comparisons,
    *,
    steps: int,
    loss: Callable[..., jax.Array] = losses.ranking,
    params_of: Callable[[Any], types.Params] = lambda state: state.params,
) -> Callable[[int, Any, Any], dict[str, float] | None]:
    """Returns a callback for `loop.fit` that logs ``validation_loss`` at up to `TIMES` steps, including the last.

    Args:
        score: ``score(params, tokens_BL, mask_BL)`` scores rows of tokens, as `Sampler.score` does.
        held_out: Held-out comparisons. At most `policy_sampling.CHUNK` answers, those to the first prompts, are scored.
        steps: Number of steps in the stage.
        loss: The loss of one prompt, a function of scores, ranks and mask.
        params_of: Returns the reward model's parameters, given a train state.

    Returns:
        The callback. If the reward model has several heads, their losses are averaged.
    """
    where_BK = np.asarray(held_out.where_BK)
    n = max(1, int(np.sum(np.cumsum(where_BK.sum(axis=1)) <= policy_sampling.CHUNK)))
    tokens_BKL, mask_BKL, ranks_BK, where_BK = (
        np.asarray(x)[:n] for x in (held_out.tokens_BKL, held_out.mask_BKL, held_out.ranks_BK, where_BK)
    )
    b, k = np.nonzero(where_BK)
    every = -(-steps // TIMES)

    @jax.jit
    def mean_loss(scores_BK: jax.Array) -> jax.Array:
        ranks, where = jnp.asarray(ranks_BK), jnp.asarray(where_BK)
        losses_B = jax.vmap(lambda s, r, w: loss(s, r, where_K=w))(scores_BK, ranks, where)
        return losses.masked_mean(losses_B, where=jax.vmap(losses.has_pairs)(ranks, where))

    def measure(done: int, state: Any, metrics: Any) -> dict[str, float] | None:
        del metrics
        if done % every and done != steps:
            return None
        scores_R = score(params_of(state), tokens_BKL[b, k], mask_BKL[b, k])
        heads_HR = scores_R[None] if scores_R.ndim == 1 else scores_R.T
        head_losses = []
        for scores in heads_HR:
            scores_BK = np.zeros(where_BK.shape, np.float32)
            scores_BK[b, k] = scores
            head_losses.append(float(mean_loss(jnp.asarray(scores_BK))))
        return {"validation_loss": float(np.mean(head_losses))}

    return measure
