"""Key-value cache for decoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from rlhf_jax import parallel
from rlhf_jax.lm import config


@struct.dataclass
class KVCache:
    """Keys and values of the tokens that a model has processed. Caches are immutable; `lm.forward` returns a new one.

    Each layer has separate arrays, so that XLA can update them in place in a decoding loop.
    """

    keys: tuple[jax.Array, ...]
    """One ``[B,G,S,C]`` array per layer."""
    values: tuple[jax.Array, ...]
    mask_BS: jax.Array
    """bool, True at slots that contain a real token."""
    positions_BS: jax.Array
    """int32 position of each token; sliding windows are measured in positions."""
    length: jax.Array
    """int32 number of filled slots, including slots with padding. The next token is written to the slot with this
    index. The shape is ``[]``, or ``[B]`` if rows have different lengths (see :mod:`rlhf_jax.generation.continuous`).
    """

    @property
    def slots(self) -> int:
        """Number of tokens that the cache can hold in each row."""
        return self.mask_BS.shape[1]


def create(cfg: config.LMConfig, *, batch: int, slots: int) -> KVCache:
    """Returns an empty cache with ``slots`` slots in each of ``batch`` rows.

    The number of filled slots is traced and cannot be checked, so callers must not append more than ``slots`` tokens.
    """
    shape = (batch, cfg.n_kv_heads, slots, cfg.d_head)
    layers = range(cfg.n_layers)

    def empty() -> jax.Array:
        return parallel.constrain(jnp.zeros(shape, cfg.compute_dtype), "batch", "kv_heads", None, None)

    return KVCache(
        keys=tuple(empty() for _ in layers),
        values=tuple(empty() for _ in layers),
        mask_BS=jnp.zeros((batch, slots), bool),
        positions_BS=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def append_tokens(cache: KVCache, mask_BL: jax.Array, positions_BL: jax.Array) -> KVCache:
    """Returns the cache with the mask and positions of L more tokens; `append_layer` adds their keys and values."""

    def put(slots_BS: jax.Array, new_BL: jax.Array) -> jax.Array:
        return _put(slots_BS, new_BL.astype(slots_BS.dtype), cache.length, axis=1)

    return dataclasses.replace(
        cache,
        mask_BS=put(cache.mask_BS, mask_BL),
        positions_BS=put(cache.positions_BS, positions_BL),
        length=cache.length + mask_BL.shape[1],
    )


def append_layer(slots_BGSC: jax.Array, new_BGLC: jax.Array, length: jax.Array) -> jax.Array:
    """Returns one layer's keys or values with L new ones written, starting at slot ``length``."""
    return _put(slots_BGSC, new_BGLC.astype(slots_BGSC.dtype), length, axis=2)


def _put(slots: jax.Array, new: jax.Array, length: jax.Array, *, axis: int) -> jax.Array:
    if length.ndim == 0:
        return lax.dynamic_update_slice_in_dim(slots, new, length, axis=axis)
    one_row = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(one_row)(slots, new, length)
