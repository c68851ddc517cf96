"""Keys and values of the tokens read so far."""

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
    """A value like any other: a forward pass returns a longer one, and the old one still holds.

    One array a layer rather than one for all: carried through a decoding loop, each is then updated in place.
    """

    keys: tuple[jax.Array, ...]
    """A layer each: ``[B,G,S,C]``."""
    values: tuple[jax.Array, ...]
    mask_BS: jax.Array
    """bool, True where a slot holds a real token."""
    positions_BS: jax.Array
    """int32, the position of each token, which a sliding window is measured in."""
    length: jax.Array
    """int32: slots filled so far, padding included; the next token goes to this slot. A scalar, or ``[B]`` where rows
    are at different places (:mod:`rlhf_jax.generation.continuous`)."""

    @property
    def slots(self) -> int:
        """How many tokens there is room for."""
        return self.mask_BS.shape[1]


def create(cfg: config.LMConfig, *, batch: int, slots: int) -> KVCache:
    """Return an empty cache with room for ``slots`` tokens in each of ``batch`` rows.

    The caller keeps within the room: where the length is traced, a write past the end cannot be noticed.
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
    """Return the cache with L more slots, real or not, and where they stand; :func:`append_layer` has the keys."""

    def put(slots_BS: jax.Array, new_BL: jax.Array) -> jax.Array:
        return _put(slots_BS, new_BL.astype(slots_BS.dtype), cache.length, axis=1)

    return dataclasses.replace(
        cache,
        mask_BS=put(cache.mask_BS, mask_BL),
        positions_BS=put(cache.positions_BS, positions_BL),
        length=cache.length + mask_BL.shape[1],
    )


def append_layer(slots_BGSC: jax.Array, new_BGLC: jax.Array, length: jax.Array) -> jax.Array:
    """Write L new keys (or values) of one layer behind the ``length`` that are there."""
    return _put(slots_BGSC, new_BGLC.astype(slots_BGSC.dtype), length, axis=2)


def _put(slots: jax.Array, new: jax.Array, length: jax.Array, *, axis: int) -> jax.Array:
    if length.ndim == 0:
        return lax.dynamic_update_slice_in_dim(slots, new, length, axis=axis)
    one_row = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(one_row)(slots, new, length)
