"""Reductions over masked arrays, correct on one device and under sharding.

Most losses in this library are unreduced; the functions in this module reduce them to scalars. Every reduction follows
three rules:

* elements where ``where`` is False are ignored, even if they are NaN or infinite, and their gradient is exactly 0;
* a NaN where ``where`` is True propagates to the result;
* a mask that selects nothing yields 0 with zero gradient.

With ``axis_name``, sums and counts are added across devices *before* the division. Averaging the local means instead
would weight elements incorrectly whenever the devices select different numbers of elements.

A reduction cannot mask a NaN *derivative* of the function that computed the reduced array, because the chain rule
multiplies the derivative by 0, and NaN times 0 is NaN. If the inputs of that function can be arbitrary outside the
mask, apply `masked_fill` to them first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None
AxisName = str | tuple[str, ...] | None


def as_float32(x: jax.Array | float) -> jax.Array:
    """Converts ``x`` to at least float32: float64 is kept, and all other types become float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_rank(rank: int, **arrays: jax.Array | float) -> None:
    """Raises ValueError unless every array, passed by name, has ``rank`` dimensions."""
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {jnp.shape(array)}")


def check_same_shape(**arrays: jax.Array | float) -> None:
    """Raises ValueError unless all arrays, passed by name, have the same shape; scalars are always accepted.

    Broadcasting ``[B]`` against ``[B, 1]`` would silently produce ``[B, B]``, which is always a mistake in a loss.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items() if jnp.ndim(array) > 0}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, got {shapes}")


def masked_fill(x: jax.Array, *, where: jax.Array | bool, value: float = 0.0) -> jax.Array:
    """Returns ``x`` in at least float32, with ``value`` wherever the mask ``where`` is False.

    No gradient flows through the replaced elements. The mask is as in `masked_mean`.
    """
    x, where = _prepare(x, where)
    return jnp.where(where, x, value)


def masked_sum(x: jax.Array, *, where: jax.Array | bool, axis: Axis = None, axis_name: AxisName = None) -> jax.Array:
    """Returns the sum of the elements of ``x`` selected by the mask ``where``.

    Args:
        x: Array of any shape; summed in at least float32.
        where: Boolean or 0/1 mask; a scalar, or an array of the same rank as ``x`` that broadcasts to its shape.
        axis: Axes to sum over, as in ``jnp.sum``; all axes by default.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which to add the sums.

    Returns:
        The sum; 0 if no element is selected.

    Raises:
        ValueError: If ``where`` is neither a scalar nor of the same rank as ``x``.
    """
    x, where = _prepare(x, where)
    return _psum(jnp.sum(jnp.where(where, x, 0.0), axis=axis), axis_name)


def masked_count(x: jax.Array, *, where: jax.Array | bool, axis: Axis = None, axis_name: AxisName = None) -> jax.Array:
    """Returns the number of elements of ``x`` selected by the mask ``where``, as int32.

    Args:
        x: Array of any shape; its values are not used.
        where: Mask, as in `masked_sum`.
        axis: Axes to count over, as in ``jnp.sum``; all axes by default.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which to add the counts.

    Returns:
        The count. Its type is int32 because a float32 sum of ones stops growing at 2^24.

    Raises:
        ValueError: If ``where`` is neither a scalar nor of the same rank as ``x``.
    """
    _, where = _prepare(x, where)
    return _psum(jnp.sum(where, axis=axis, dtype=jnp.int32), axis_name)


def masked_mean(x: jax.Array, *, where: jax.Array | bool, axis: Axis = None, axis_name: AxisName = None) -> jax.Array:
    """Returns the mean of the elements of ``x`` selected by the mask ``where``, their sum divided by their number.

    Args:
        x: Array of any shape; averaged in at least float32.
        where: Boolean or 0/1 mask; a scalar, or an array of the same rank as ``x`` that broadcasts to its shape.
        axis: Axes to average over, as in ``jnp.mean``; all axes by default.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which to add sums and counts before the division.

    Returns:
        The mean; 0 if no element is selected.

    Raises:
        ValueError: If ``where`` is neither a scalar nor of the same rank as ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> losses_BT = jnp.array([[1.0, 2.0, jnp.nan], [6.0, jnp.nan, jnp.nan]])
        >>> mask_BT = jnp.array([[True, True, False], [True, False, False]])
        >>> print(losses.masked_mean(losses_BT, where=mask_BT))
        3.0
    """
    total = masked_sum(x, where=where, axis=axis, axis_name=axis_name)
    count = masked_count(x, where=where, axis=axis, axis_name=axis_name)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def masked_var(x: jax.Array, *, where: jax.Array | bool, axis_name: AxisName = None) -> jax.Array:
    """Returns the population variance of the elements of ``x`` selected by the mask ``where``, as a scalar.

    The variance of an empty selection is 0. ``where`` and ``axis_name`` are as in `masked_mean`.
    """
    mean = masked_mean(x, where=where, axis_name=axis_name)
    # Masked elements are filled before squaring, because the square of a NaN has a NaN derivative.
    square = jnp.square(masked_fill(x, where=where) - mean)
    return masked_mean(square, where=where, axis_name=axis_name)


def global_max(x: jax.Array, *, axis_name: AxisName = None) -> jax.Array:
    """Returns the maximum of ``x`` over all elements and over ``axis_name``, without a gradient; used for logging."""
    x = jnp.max(jax.lax.stop_gradient(x))
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def _prepare(x: jax.Array, where: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    x, where = as_float32(x), jnp.asarray(where).astype(bool)
    if where.ndim not in (0, x.ndim):
        raise ValueError(f"where must be a scalar or have the same rank as x, got shapes {where.shape} and {x.shape}")
    return x, jnp.broadcast_to(where, x.shape)


def _psum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
