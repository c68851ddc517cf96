"""Reductions of the token losses of a batch to a scalar; they differ in the weight of each token.

A reduction maps the mask of the whole batch to one weight per row and one divisor, so that the sum over micro-batches
and devices does not depend on how the rows are distributed::

    weights_B, total = sequence_mean(mask_BT)
    loss = weighted_sum(losses_BT, weights_B, where=mask_BT) / total

With ``m`` the mask and ``l`` the token losses of n non-empty responses:

* `token_mean` (PPO): ``sum(m l) / sum(m)``;
* `sequence_mean` (GRPO, Shao 2024): the mean over responses of ``sum_t(m l) / sum_t(m)``;
* `sequence_sum` (REINFORCE and RLOO, Ahmadian 2024): ``sum(m l) / n``, as the gradient of the log-probability of a
  response is a sum over its tokens;
* `constant_mean` (Dr. GRPO, Liu 2025): ``sum(m l) / (n T)``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import masking

Reduction = Callable[..., tuple[jax.Array, jax.Array]]
"""``(mask_BT, axis_name=None) -> (weights_B, total)``; with ``axis_name`` the total counts the rows of all devices."""


def token_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Weights every token of the batch equally, so that long responses count more than short ones."""
    count = masking.masked_count(mask_BT, where=mask_BT, axis_name=axis_name)
    return jnp.ones(mask_BT.shape[0]), _at_least_one(count)


def sequence_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Weights every response equally, so that a token of a long response counts less; empty rows are ignored."""
    lengths_B = jnp.sum(mask_BT, axis=1)
    return 1.0 / jnp.maximum(lengths_B, 1), _count_responses(mask_BT, axis_name)


def sequence_sum(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Averages the token sums of the responses, which gives the unbiased gradient of the expected reward."""
    return jnp.ones(mask_BT.shape[0]), _count_responses(mask_BT, axis_name)


def constant_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Divides the sum over tokens by the number of responses times the width T, regardless of their lengths."""
    return jnp.ones(mask_BT.shape[0]), _count_responses(mask_BT, axis_name) * mask_BT.shape[1]


def weighted_sum(
    losses_BT: jax.Array, weights_B: jax.Array, *, where: jax.Array, axis_name: masking.AxisName = None
) -> jax.Array:
    """Returns ``sum_b weights_b sum_t losses_bt`` over the mask.

    Args:
        losses_BT: Token losses, unreduced.
        weights_B: Weight of each row, from a reduction.
        where: ``[B, T]``, True at the tokens that count.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which the sums are added.

    Returns:
        A scalar, to be divided by the total of the reduction.
    """
    return masking.masked_sum(losses_BT * weights_B[:, None], where=where, axis_name=axis_name)


def _count_responses(mask_BT: jax.Array, axis_name: masking.AxisName) -> jax.Array:
    nonempty_B = jnp.any(mask_BT, axis=1)
    return _at_least_one(masking.masked_count(nonempty_B, where=nonempty_B, axis_name=axis_name))


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)
