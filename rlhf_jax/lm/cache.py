"""Keys and values of the tokens read so far."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

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
    length: jax.Array
    """int32 scalar: slots filled so far, padding included; the next token goes to this slot."""

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
    return KVCache(
        keys=tuple(jnp.zeros(shape, cfg.compute_dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, cfg.compute_dtype) for _ in layers),
        mask_BS=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def append_mask(cache: KVCache, mask_BL: jax.Array) -> KVCache:
    """Return the cache with L more slots marked real or not; the keys and values are for :func:`append_layer`."""
    mask_BS = lax.dynamic_update_slice_in_dim(cache.mask_BS, mask_BL, cache.length, axis=1)
    return dataclasses.replace(cache, mask_BS=mask_BS, length=cache.length + mask_BL.shape[1])


def append_layer(slots_BGSC: jax.Array, new_BGLC: jax.Array, length: jax.Array) -> jax.Array:
    """Write L new keys (or values) of one layer behind the ``length`` that are there."""
    return lax.dynamic_update_slice_in_dim(slots_BGSC, new_BGLC.astype(slots_BGSC.dtype), length, axis=2)
