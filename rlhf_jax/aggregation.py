"""Reductions of a batch of token losses to a scalar. They differ in the weights of the tokens.

A reduction computes one weight per row and one divisor from the mask of the whole batch. The loss therefore does not
depend on how the rows are distributed over micro-batches and devices::

    weights_B, total = sequence_mean(mask_BT)
    loss = weighted_sum(losses_BT, weights_B, where=mask_BT) / total

For a mask ``m`` and token losses ``l`` of n non-empty responses, the reduced losses are:

* `token_mean` (PPO): ``sum(m l) / sum(m)``;
* `sequence_mean` (GRPO, Shao 2024): the mean over responses of ``sum_t(m l) / sum_t(m)``;
* `sequence_sum` (REINFORCE and RLOO, Ahmadian 2024): ``sum(m l) / n``, the mean over responses of ``sum_t(m l)``;
* `constant_mean` (Dr. GRPO, Liu 2025): ``sum(m l) / (n T)``, where T is the response width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import masking

Reduction = Callable[..., tuple[jax.Array, jax.Array]]
"""``(mask_BT, axis_name=None) -> (weights_B, total)``; ``total`` is the divisor, summed over ``axis_name``."""


def token_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Weights every token of the batch equally, so that long responses count more than short ones."""
    count = masking.masked_count(mask_BT, where=mask_BT, axis_name=axis_name)
    return jnp.ones(mask_BT.shape[0]), _at_least_one(count)


def sequence_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Weights every response equally, so that a token of a long response counts less; ignores empty rows."""
    lengths_B = jnp.sum(mask_BT, axis=1)
    return 1.0 / jnp.maximum(lengths_B, 1), _count_responses(mask_BT, axis_name)


def sequence_sum(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Averages the summed token losses of the responses, so that policy gradients are unbiased."""
    return jnp.ones(mask_BT.shape[0]), _count_responses(mask_BT, axis_name)


def constant_mean(mask_BT: jax.Array, *, axis_name: masking.AxisName = None) -> tuple[jax.Array, jax.Array]:
    """Divides the sum over all tokens by the number of non-empty responses times the padded width of ``mask_BT``."""
    return jnp.ones(mask_BT.shape[0]), _count_responses(mask_BT, axis_name) * mask_BT.shape[1]


def weighted_sum(
    losses_BT: jax.Array, weights_B: jax.Array, *, where: jax.Array, axis_name: masking.AxisName = None
) -> jax.Array:
    """Returns ``sum_b weights_b sum_t losses_bt`` over the mask.

    Args:
        losses_BT: Unreduced token losses.
        weights_B: Weight of each row, from a reduction.
        where: ``[B, T]``, True at the tokens to include.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which to sum.

    Returns:
        A scalar; divide it by the reduction's ``total``.
    """
    return masking.masked_sum(losses_BT * weights_B[:, None], where=where, axis_name=axis_name)


def _count_responses(mask_BT: jax.Array, axis_name: masking.AxisName) -> jax.Array:
    nonempty_B = jnp.any(mask_BT, axis=1)
    return _at_least_one(masking.masked_count(nonempty_B, where=nonempty_B, axis_name=axis_name))


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)
