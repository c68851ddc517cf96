"""Assignment of rows to minibatches and of random keys to rows, independent of the number of devices.

The rows of a batch form ``shards`` blocks of adjacent rows, and a minibatch takes the same number of rows from each
block. If the number of devices divides ``shards``, each device holds whole blocks and no row leaves its device. The
order of the rows depends on ``shards``, which is a setting, but not on the number of devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.data import errors
from rlhf_jax.masking import AxisName


def row_keys(rng: jax.Array, rows: int, *, axis_name: AxisName = None) -> jax.Array:
    """Returns keys for this device's ``rows`` rows, a slice of the keys of the whole batch; ``rng`` is consumed."""
    if axis_name is None:
        return jax.random.split(rng, rows)
    keys = jax.random.split(rng, rows * lax.psum(1, axis_name))
    return lax.dynamic_slice_in_dim(keys, lax.axis_index(axis_name) * rows, rows)


def minibatches(
    rng: jax.Array, rows: int, *, epochs: int, count: int, shards: int = 1, axis_name: AxisName = None
) -> jax.Array:
    """Draws the rows of each minibatch; every epoch draws a new permutation of each block.

    Args:
        rng: Key; consumed.
        rows: Number of rows of this device; a multiple of ``count`` times the number of blocks per device.
        epochs: Number of passes over the rows.
        count: Minibatches per epoch.
        shards: Number of blocks over all devices; a multiple of the number of devices.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        ``[U, S, R]`` int32: for each of the U = epochs * count updates, R row indices within each of the S blocks of
        this device.

    Raises:
        ValueError: If the rows or shards are not divisible as required.

    Example:

        >>> import jax
        >>> from rlhf_jax.train import minibatches
        >>> rows_USR = minibatches.minibatches(jax.random.key(0), 8, epochs=2, count=4)
        >>> rows_USR.shape
        (8, 1, 2)
        >>> sorted(rows_USR[:4].ravel().tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    devices = 1 if axis_name is None else lax.psum(1, axis_name)
    if shards < 1 or shards % devices:
        raise ValueError(f"shards is {shards}; it must be a multiple of the number of devices, {devices}")
    local_shards = shards // devices
    if rows % (local_shards * count):
        blocks = "" if local_shards == 1 else f" with equally many rows from each of {local_shards} shards"
        size = errors.counted(rows, "responses")
        raise ValueError(f"a batch of {size} does not divide evenly into {count} minibatches{blocks}")
    keys_E = jax.random.split(rng, epochs)
    if shards == 1:
        keys_ES = keys_E[:, None]
    else:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * local_shards
        fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
        keys_ES = fold(keys_E, first + jnp.arange(local_shards))
    orders_ESB = jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, rows // local_shards)))(keys_ES)
    orders_ESUR = orders_ESB.reshape(epochs, local_shards, count, -1)
    return jnp.swapaxes(orders_ESUR, 1, 2).reshape(epochs * count, local_shards, -1)


def take(batch: Any, rows_SR: jax.Array) -> Any:
    """Selects rows ``rows_SR[s]`` from each block s of the ``[B, ...]`` leaves; returns ``[S * R, ...]`` leaves."""

    def leaf(x: jax.Array) -> jax.Array:
        blocks = x.reshape(rows_SR.shape[0], -1, *x.shape[1:])
        return jax.vmap(lambda block, rows_R: block[rows_R])(blocks, rows_SR).reshape(-1, *x.shape[1:])

    return jax.tree.map(leaf, batch)


def split_updates(batch: Any, updates: int, *, shards: int) -> Any:
    """Splits ``[B, ...]`` leaves into ``[updates, B / updates, ...]``: each update gets the next rows of every block.

    Raises ``ValueError`` if B is not divisible by ``updates * shards``.
    """

    def leaf(x: jax.Array) -> jax.Array:
        if x.shape[0] % (updates * shards):
            raise ValueError(
                f"the number of rows, {x.shape[0]}, must be a multiple of {updates} updates x {shards} shards"
            )
        blocks = x.reshape(shards, updates, -1, *x.shape[1:])
        return jnp.swapaxes(blocks, 0, 1).reshape(updates, -1, *x.shape[1:])

    return jax.tree.map(leaf, batch)
