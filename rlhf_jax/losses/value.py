"""Losses of the critic; any shape, unreduced, with the factor 1/2."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking


def squared_value(values: jax.Array, returns: jax.Array) -> jax.Array:
    """``(V - R)^2 / 2``; no gradient flows through the returns."""
    masking.check_same_shape(values=values, returns=returns)
    return 0.5 * jnp.square(masking.as_float32(values) - jax.lax.stop_gradient(masking.as_float32(returns)))


def clipped_value(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """``max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2``, as in the code of Ziegler 2019.

    Args:
        values: of the critic being trained.
        old_values: of the critic at rollout time; no gradient flows through them.
        returns: the targets, fixed through the epochs; no gradient flows through them.
        clip: c.
    """
    return jnp.maximum(squared_value(values, returns), squared_value(_clip(values, old_values, clip), returns))


def value_is_clipped(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """True where the clipped branch of ``clipped_value`` is the larger; its mean is the clip fraction."""
    return squared_value(_clip(values, old_values, clip), returns) > squared_value(values, returns)


def explained_variance(
    values: jax.Array,
    returns: jax.Array,
    *,
    where: jax.Array | bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """``1 - mean((V - R)^2) / var(R)`` over the mask, a scalar: 1 is perfect, 0 no better than a constant.

    Returns 0 where the returns do not vary.
    """
    error = 2.0 * masking.masked_mean(squared_value(values, returns), where=where, axis_name=axis_name)
    variance = masking.masked_var(returns, where=where, axis_name=axis_name)
    return jnp.where(variance > 0, 1.0 - error / jnp.where(variance > 0, variance, 1.0), 0.0)


def _clip(values: jax.Array, old_values: jax.Array, clip: float | jax.Array) -> jax.Array:
    masking.check_same_shape(values=values, old_values=old_values)
    old_values = jax.lax.stop_gradient(masking.as_float32(old_values))
    return jnp.clip(masking.as_float32(values), old_values - clip, old_values + clip)
