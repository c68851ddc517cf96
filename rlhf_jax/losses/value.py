"""Critic losses and metrics. All arrays have the same shape; the losses are unreduced and include the factor 1/2."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking


def squared_value(values: jax.Array, returns: jax.Array) -> jax.Array:
    """Returns ``(V - R)^2 / 2``; no gradient flows through the returns."""
    masking.check_same_shape(values=values, returns=returns)
    return 0.5 * jnp.square(masking.as_float32(values) - jax.lax.stop_gradient(masking.as_float32(returns)))


def clipped_value(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """Computes ``max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2``, as in the code of Ziegler 2019.

    Args:
        values: V, from the critic being trained; any shape.
        old_values: Values from the critic at rollout time, of the same shape; no gradient flows through them.
        returns: R, the targets, which are fixed during all epochs; no gradient flows through them.
        clip: Clip range c, above 0, in the units of the values.

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> values, old_values, returns = jnp.array([1.0, 1.0]), jnp.array([0.0, 1.5]), jnp.array([2.0, 2.0])
        >>> print(losses.clipped_value(values, old_values, returns, clip=0.5))
        [1.125 0.5  ]
    """
    return jnp.maximum(squared_value(values, returns), squared_value(_clip(values, old_values, clip), returns))


def value_is_clipped(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """Returns True where the clipped branch of `clipped_value` is larger; the mean of the result is the clip fraction.

    Args:
        values: As in `clipped_value`.
        old_values: As in `clipped_value`.
        returns: As in `clipped_value`.
        clip: As in `clipped_value`.

    Returns:
        A boolean array with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.
    """
    return squared_value(_clip(values, old_values, clip), returns) > squared_value(values, returns)


def explained_variance(
    values: jax.Array,
    returns: jax.Array,
    *,
    where: jax.Array | bool = True,
    axis_name: masking.AxisName = None,
) -> jax.Array:
    """Returns ``1 - mean((V - R)^2) / var(R)`` over the mask; 1 is perfect, and 0 is no better than a constant.

    Args:
        values: V, of any shape.
        returns: R, of the same shape.
        where: Boolean mask, as in `masking.masked_mean`; all elements by default.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which the batch is split.

    Returns:
        A scalar; 0 if the returns do not vary.

    Raises:
        ValueError: If the shapes differ.
    """
    error = 2.0 * masking.masked_mean(squared_value(values, returns), where=where, axis_name=axis_name)
    variance = masking.masked_var(returns, where=where, axis_name=axis_name)
    return jnp.where(variance > 0, 1.0 - error / jnp.where(variance > 0, variance, 1.0), 0.0)


def _clip(values: jax.Array, old_values: jax.Array, clip: float | jax.Array) -> jax.Array:
    masking.check_same_shape(values=values, old_values=old_values)
    old_values = jax.lax.stop_gradient(masking.as_float32(old_values))
    return jnp.clip(masking.as_float32(values), old_values - clip, old_values + clip)
