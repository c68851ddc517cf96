"""Who gets which rows and which keys, so that any number of devices makes the same minibatches and the same samples.

Rows are dealt in ``shards`` blocks of neighbours, and a minibatch takes as many rows of each: with as many devices as
shards, or fewer, no row ever leaves its device. What is drawn depends on the number of shards, which is a setting, and
never on that of devices: a device of an ``axis_name`` has whole blocks, and knows which.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | tuple[str, ...] | None


def row_keys(rng: jax.Array, rows: int, *, axis_name: AxisName = None) -> jax.Array:
    """A key for each of this device's ``rows``: its part of those of the whole batch. ``rng`` is consumed."""
    if axis_name is None:
        return jax.random.split(rng, rows)
    every = jax.random.split(rng, rows * lax.psum(1, axis_name))
    return lax.dynamic_slice_in_dim(every, lax.axis_index(axis_name) * rows, rows)


def minibatches(
    rng: jax.Array, rows: int, *, epochs: int, count: int, shards: int = 1, axis_name: AxisName = None
) -> jax.Array:
    """``[U, S, R]`` int32: for each of the ``epochs * count`` updates, R rows of each block, counted within it.

    Every epoch permutes each block anew. S are the blocks of this device, all of them without an ``axis_name``;
    ``rows`` are this device's, too. ``rng`` is consumed.
    """
    devices = 1 if axis_name is None else lax.psum(1, axis_name)
    if shards < 1 or shards % devices:
        raise ValueError(f"shards is {shards}; it must be a multiple of the {devices} devices that share a batch")
    own = shards // devices
    if rows % (own * count):
        of = "" if own == 1 else f" of {own} shards"
        raise ValueError(f"a batch of {rows} answers does not divide into {count} minibatches{of}")
    keys_E = jax.random.split(rng, epochs)
    if shards == 1:
        keys_ES = keys_E[:, None]
    else:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * own
        fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
        keys_ES = fold(keys_E, first + jnp.arange(own))
    orders_ESB = jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, rows // own)))(keys_ES)
    orders_ESUR = orders_ESB.reshape(epochs, own, count, -1)
    return jnp.swapaxes(orders_ESUR, 1, 2).reshape(epochs * count, own, -1)


def take(batch: Any, rows_SR: jax.Array) -> Any:
    """The rows of each block of ``[B, ...]`` leaves, block after block: ``[S * R, ...]``."""

    def leaf(x: jax.Array) -> jax.Array:
        blocks = x.reshape(rows_SR.shape[0], -1, *x.shape[1:])
        return jax.vmap(lambda block, rows_R: block[rows_R])(blocks, rows_SR).reshape(-1, *x.shape[1:])

    return jax.tree.map(leaf, batch)


def in_turn(batch: Any, updates: int, *, shards: int) -> Any:
    """``[B, ...]`` leaves as ``[updates, B / updates, ...]``: each update has the next rows of each block."""

    def leaf(x: jax.Array) -> jax.Array:
        if x.shape[0] % (updates * shards):
            raise ValueError(f"{x.shape[0]} rows do not divide into {updates} updates of {shards} shards")
        dealt = x.reshape(shards, updates, -1, *x.shape[1:])
        return jnp.swapaxes(dealt, 0, 1).reshape(updates, -1, *x.shape[1:])

    return jax.tree.map(leaf, batch)
