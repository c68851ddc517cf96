"""Reductions over masked arrays, right on one device and across many.

Losses elsewhere are unreduced; these functions turn them into scalars. Three rules hold for all of them:

* what stands where ``where`` is False is never read, NaN and infinity included, and receives a gradient of exactly 0;
* a NaN where ``where`` is True reaches the result;
* an empty mask gives 0 with zero gradients.

With ``axis_name`` the sums and the counts are added up across devices *before* the division. When masks differ between
devices a mean of local means weights tokens wrongly, and no later average can repair that.

A reduction cannot repair a NaN *derivative* of the function that made ``x``: the chain rule multiplies it by 0, which
is NaN again. Where off-mask inputs may be anything, pass them through ``masked_fill`` before that function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None

WHITEN_EPSILON = 1e-8


def as_float32(x: jax.Array | float) -> jax.Array:
    """Promotes to at least float32: bfloat16, integers and booleans are widened, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_rank(rank: int, **arrays: jax.Array | float) -> None:
    """Raises ValueError unless every array (passed under its own name) has ``rank`` dimensions."""
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {jnp.shape(array)}")


def check_same_shape(**arrays: jax.Array | float) -> None:
    """Raises ValueError unless all arrays have one shape; scalars go with any.

    Broadcasting ``[B]`` against ``[B, 1]`` is never meant in a loss, and silently makes ``[B, B]``.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items() if jnp.ndim(array) > 0}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, got {shapes}")


def masked_fill(x: jax.Array, *, where: jax.Array | bool, value: float = 0.0) -> jax.Array:
    """``x`` in at least float32 with ``value`` where ``where`` is False; no gradient flows there.

    Args:
        x: any shape.
        where: boolean (or 0/1), a scalar or of the rank of ``x`` and broadcastable to it.
        value: what to put off the mask.
    """
    x, where = _prepare(x, where)
    return jnp.where(where, x, value)


def masked_sum(
    x: jax.Array,
    *,
    where: jax.Array | bool,
    axis: Axis = None,
    axis_name: str | tuple[str, ...] | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """Sum of the elements of ``x`` at which ``where`` is True, over ``axis`` and over the devices of ``axis_name``."""
    x, where = _prepare(x, where)
    return _psum(jnp.sum(jnp.where(where, x, 0.0), axis=axis, keepdims=keepdims), axis_name)


def masked_count(
    x: jax.Array,
    *,
    where: jax.Array | bool,
    axis: Axis = None,
    axis_name: str | tuple[str, ...] | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """How many elements of ``x`` are on the mask, as int32, with the axes of ``masked_sum``."""
    _, where = _prepare(x, where)
    # Integers, because a float32 sum of ones stops growing at 2^24 tokens.
    return _psum(jnp.sum(where, axis=axis, keepdims=keepdims, dtype=jnp.int32), axis_name)


def masked_mean(
    x: jax.Array,
    *,
    where: jax.Array | bool,
    axis: Axis = None,
    axis_name: str | tuple[str, ...] | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """Mean of the elements of ``x`` at which ``where`` is True; 0 where there are none.

    Args:
        x: any shape; computed in at least float32.
        where: boolean (or 0/1), a scalar or of the rank of ``x`` and broadcastable to it.
        axis: as in ``jnp.mean``.
        axis_name: mesh, ``vmap`` or ``pmap`` axes over which sum and count are added before dividing.
        keepdims: as in ``jnp.mean``.

    Raises:
        ValueError: if the rank of ``where`` is neither 0 nor that of ``x``.
    """
    total = masked_sum(x, where=where, axis=axis, axis_name=axis_name, keepdims=keepdims)
    count = masked_count(x, where=where, axis=axis, axis_name=axis_name, keepdims=keepdims)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def masked_var(
    x: jax.Array,
    *,
    where: jax.Array | bool,
    axis: Axis = None,
    axis_name: str | tuple[str, ...] | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """Population variance (ddof 0) of the elements of ``x`` at which ``where`` is True; 0 where there are none."""
    mean = masked_mean(x, where=where, axis=axis, axis_name=axis_name, keepdims=True)
    # Filled before subtracting and squaring: the square of a NaN has a NaN derivative.
    square = jnp.square(masked_fill(x, where=where) - mean)
    return masked_mean(square, where=where, axis=axis, axis_name=axis_name, keepdims=keepdims)


def masked_whiten(
    x: jax.Array,
    *,
    where: jax.Array | bool,
    shift_mean: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Scales ``x`` to unit variance over the mask: ``(x - mean) * rsqrt(var + 1e-8)``.

    Population variance over all elements on the mask (Ziegler 2019). Rewards are whitened with ``shift_mean=False``
    before GAE, advantages with ``shift_mean=True`` after the returns are formed.

    Args:
        x: any shape.
        where: as in ``masked_mean``.
        shift_mean: if False the mean is added back after scaling.
        axis_name: axes over which mean and variance are taken jointly.

    Returns:
        Array shaped as ``x``, 0 off the mask.
    """
    filled = masked_fill(x, where=where)
    mean = masked_mean(x, where=where, axis_name=axis_name)
    whitened = (filled - mean) * jax.lax.rsqrt(masked_var(x, where=where, axis_name=axis_name) + WHITEN_EPSILON)
    return masked_fill(whitened if shift_mean else whitened + mean, where=where)


whiten = masked_whiten


def largest(x: jax.Array, *, axis_name: str | tuple[str, ...] | None = None) -> jax.Array:
    """The largest element of ``x``, over the devices of ``axis_name`` too; for logs, no gradient flows."""
    x = jnp.max(jax.lax.stop_gradient(x))
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def _prepare(x: jax.Array, where: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    x, where = as_float32(x), jnp.asarray(where).astype(bool)
    if where.ndim not in (0, x.ndim):
        raise ValueError(f"where must be a scalar or have the rank of x, got {where.shape} and {x.shape}")
    return x, jnp.broadcast_to(where, x.shape)


def _psum(x: jax.Array, axis_name: str | tuple[str, ...] | None) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
