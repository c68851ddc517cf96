"""Token ids and their embeddings, whose table may be sharded or resized, and learned and rotary positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from rlhf_jax import parallel, types
from rlhf_jax.lm import config, weights

Angles = tuple[jax.Array, jax.Array]
"""Cosine and sine of the rotary angles, float32 ``[B,1,L,half]``, where half is ``cfg.rope_width // 2``."""


def embed(
    params: types.Params, tokens_BL: jax.Array, mask_BL: jax.Array, positions_BL: jax.Array, cfg: config.LMConfig
) -> jax.Array:
    """Returns the input of the first layer, ``[B,L,D]`` in the compute dtype.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        mask_BL: bool, True at real tokens; the ids of padding are ignored.
        positions_BL: int32 positions.
        cfg: Architecture.

    Returns:
        Sum of token embeddings and, if there are any, learned positions, scaled if ``cfg.embed_scale`` is set. Real
        tokens with an id outside the vocabulary are NaN.
    """
    table_VD = params["embed"]["tokens"]
    # Padding may have any id, even one outside the vocabulary, so id 0 is looked up instead.
    inside_BL = (tokens_BL >= 0) & (tokens_BL < table_VD.shape[0])
    ids_BL = jnp.where(mask_BL & inside_BL, tokens_BL, 0)
    # Learned positions are added before the sum is cast to the compute dtype.
    dtype = table_VD.dtype if cfg.positions == "learned" else cfg.compute_dtype
    x_BLD = _rows(table_VD, ids_BL) if weights.is_unstacked(params) else look_up(table_VD, ids_BL, dtype)
    if cfg.positions == "learned":
        table_LD = params["embed"]["positions"]
        table_LD = table_LD if weights.is_unstacked(params) else parallel.gather_weight(table_LD, None, "embed")
        x_BLD = x_BLD + table_LD[positions_BL + cfg.position_offset]
    # A gather clamps its indices, so an id outside the vocabulary would silently get the last row.
    x_BLD = jnp.where((inside_BL | ~mask_BL)[..., None], x_BLD.astype(cfg.compute_dtype), jnp.nan)
    return x_BLD * jnp.asarray(cfg.d_model**0.5, x_BLD.dtype) if cfg.embed_scale else x_BLD


def look_up(table_VD: jax.Array, tokens_BL: jax.Array, dtype: Any) -> jax.Array:
    """Returns ``table_VD[tokens_BL]`` in ``dtype``, ``[B,L,D]``; ids must be in [0, V).

    If a mesh axis shards both the rows and the features, each device gathers all features of its shard of the
    vocabulary and looks up the tokens of its rows there. The gradient is summed on each device in the table's dtype
    before it is reduce-scattered. With plain indexing, XLA would exchange the rows of all devices or all-reduce the
    gradient.
    """
    mesh = parallel.active_mesh()
    rows = None if mesh is None else parallel.spec(("batch", "length"), mesh, shape=tokens_BL.shape)
    where = None if mesh is None else parallel.spec(("vocab", "embed"), mesh, shape=table_VD.shape)
    if rows is None or where is None:
        return _rows(table_VD, tokens_BL).astype(dtype)
    over_vocab, over_features = where
    if over_features is None or over_features not in (rows[0] or ()):
        # Devices with different features have the same rows, so plain indexing suffices.
        return _rows(parallel.gather_weight(table_VD, "vocab", "embed"), tokens_BL).astype(dtype)

    def look_up_shard(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = lax.all_gather(table, over_features, axis=1, tiled=True)
        if over_vocab is None:
            return _rows(table, tokens).astype(dtype)
        places = tokens - lax.axis_index(over_vocab) * table.shape[0]
        here = (places >= 0) & (places < table.shape[0])
        found = _rows(table, jnp.where(here, places, 0)).astype(dtype)
        # Only one device has a non-zero term, so the sum is exact in any dtype.
        return lax.psum(jnp.where(here[..., None], found, jnp.zeros((), dtype)), over_vocab)

    return jax.shard_map(look_up_shard, in_specs=(where, rows), out_specs=PartitionSpec(*rows, None))(
        table_VD, tokens_BL
    )


def _rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns ``table_VD[ids]`` for ids in [0, V), without the operations that handle other ids."""
    return table_VD.at[ids].get(mode="promise_in_bounds", wrap_negative_indices=False)


def rotary_angles(positions_BL: jax.Array, theta: float, scaling: Any, cfg: config.LMConfig) -> Angles | None:
    """Returns the cosine and sine of the rotary angles, or None if the model has no rotary positions.

    Args:
        positions_BL: int32 positions.
        theta: Base of the frequencies.
        scaling: `config.LinearScaling`, `config.Llama3Scaling` or None.
        cfg: Architecture.

    Returns:
        Two float32 arrays ``[B,1,L,cfg.rope_width // 2]``, or None.
    """
    if cfg.positions != "rope":
        return None
    half = cfg.rope_width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if isinstance(scaling, config.LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, config.Llama3Scaling):
        turns = frequencies * (scaling.length / (2 * jnp.pi))
        kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    angles = positions_BL.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BHLC: jax.Array, rotation: Angles) -> jax.Array:
    """Rotates features i and i + n of each head by the i-th of the position's n angles (Su et al. 2021)."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x_BHLC[..., :half].astype(jnp.float32), x_BHLC[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHLC.dtype)
    return jnp.concatenate([rotated, x_BHLC[..., 2 * half :]], axis=-1)


def check_ids(ids: Any, vocab_size: int, *, mask: Any = None, name: str = "token ids") -> None:
    """Raises ValueError if an array in host memory has an id outside the vocabulary.

    JAX arrays are not read, because that would wait for the device, and cannot be while a function is traced. In a
    compiled program, an id outside the vocabulary gives NaN.

    Args:
        ids: Integers, as a NumPy array or nested lists of equal length.
        vocab_size: Number of ids of the model, `LMConfig.vocab_size`.
        mask: bool, True at real tokens, as a NumPy array; the ids of padding are not checked. By default, all tokens
            are real. If it is a JAX array, nothing is checked.
        name: Name of the ids in the message.

    Raises:
        ValueError: An id is negative or at least ``vocab_size``.
    """
    if isinstance(ids, jax.Array) or isinstance(mask, jax.Array):
        return
    ids = np.asarray(ids)
    bad = (ids < 0) | (ids >= vocab_size) if mask is None else np.asarray(mask) & ((ids < 0) | (ids >= vocab_size))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} contain the id {int(ids[where])} at {list(where)}, but the model has {vocab_size} ids, 0 to "
            f"{vocab_size - 1}; if tokens were added to the tokenizer, resize the model with lm.resize"
        )


def resize(params: types.Params, cfg: config.LMConfig, vocab_size: int) -> tuple[types.Params, config.LMConfig]:
    """Returns the parameters and the configuration of the model with a vocabulary of ``vocab_size`` ids.

    New rows of the embedding, and of the output layer if it is not tied, are the mean of all old rows (Hewitt 2021), so
    that the new tokens have a moderate logit after any text. ``transformers`` draws new rows around the same mean. If
    the vocabulary shrinks, the last rows are removed. All other parameters, including a scalar head, are shared with
    ``params``; so are adapters. Leading axes, as of a stack of models, are kept.

    >>> import jax
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params, cfg = lm.resize(lm.init(jax.random.key(0), cfg), cfg, 300)
    >>> cfg.vocab_size, params["embed"]["tokens"].shape
    (300, (300, 64))

    Args:
        params: Parameters of the model.
        cfg: Architecture.
        vocab_size: New size, at least 1, such as ``len(tokenizer)``.

    Returns:
        ``(params, cfg)``.

    Raises:
        ValueError: ``vocab_size`` is below 1.
    """
    resized = dataclasses.replace(cfg, vocab_size=vocab_size)
    changed = {"embed": {**params["embed"], "tokens": _resized(params["embed"]["tokens"], vocab_size, axis=-2)}}
    if "unembed" in params:
        changed["unembed"] = {"kernel": _resized(params["unembed"]["kernel"], vocab_size, axis=-1)}
    return {**params, **changed}, resized


def _resized(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    old = x.shape[axis]
    if size == old:
        return x
    if size < old:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    mean = jnp.mean(x, axis=axis, keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
    shape = list(x.shape)
    shape[axis] = size - old
    return jnp.concatenate([x, jnp.broadcast_to(mean, shape)], axis=axis)
