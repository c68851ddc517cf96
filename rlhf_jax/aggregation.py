"""How the token losses of a batch of answers become one number: which token weighs how much.

A reduction looks at the mask of a whole batch and says what each row's tokens are multiplied by and what the sum is
divided by, so that micro-batches and devices add up to the same number however the rows are dealt out to them::

    weights_B, total = sequence_mean(mask_BT)
    loss = weighted_sum(losses_BT, weights_B, where=mask_BT) / total

Three are published under three names: PPO averages over tokens, GRPO over answers of averages over tokens (Shao 2024),
and the gradient of a whole answer's log-probability is a sum over its tokens (Ahmadian 2024; Liu 2025 divides that sum
by a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import masking

Reduction = Callable[..., tuple[jax.Array, jax.Array]]
"""``(mask_BT, axis_name=None) -> (weights_B, total)``; with an ``axis_name`` the total is that of all devices."""


def token_mean(mask_BT: jax.Array, *, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """Every token of the batch weighs the same: long answers weigh more than short ones."""
    count = masking.masked_count(mask_BT, where=mask_BT, axis_name=axis_name)
    return jnp.ones(mask_BT.shape[0]), _at_least_one(count)


def sequence_mean(mask_BT: jax.Array, *, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """Every answer weighs the same, and so a token of a long one less (GRPO); empty rows do not count."""
    lengths_B = jnp.sum(mask_BT, axis=1)
    return 1.0 / jnp.maximum(lengths_B, 1), _answers(mask_BT, axis_name)


def sequence_sum(mask_BT: jax.Array, *, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """The mean over answers of sums over tokens: the gradient of expected reward, unbiased (REINFORCE, RLOO)."""
    return jnp.ones(mask_BT.shape[0]), _answers(mask_BT, axis_name)


def constant_mean(mask_BT: jax.Array, *, axis_name: Any = None) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens by batch size and width T, the same constant for all lengths (Dr. GRPO, Liu 2025)."""
    return jnp.ones(mask_BT.shape[0]), _answers(mask_BT, axis_name) * mask_BT.shape[1]


def weighted_sum(losses_BT: jax.Array, weights_B: jax.Array, *, where: jax.Array, axis_name: Any = None) -> jax.Array:
    """``sum_b weights_b sum_t losses_bt`` over the mask."""
    return masking.masked_sum(losses_BT * weights_B[:, None], where=where, axis_name=axis_name)


def _answers(mask_BT: jax.Array, axis_name: Any) -> jax.Array:
    some_B = jnp.any(mask_BT, axis=1)
    return _at_least_one(masking.masked_count(some_B, where=some_B, axis_name=axis_name))


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)
