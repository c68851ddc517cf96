"""The vocabulary of a model: a check of token ids on the host, and a change of its size."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types
from rlhf_jax.lm import config


def check_ids(ids: Any, vocab_size: int, *, mask: Any = None, name: str = "token ids") -> None:
    """Raises ValueError if an array in host memory has an id outside the vocabulary.

    JAX arrays are not read, because that would wait for the device, and cannot be while a function is traced. In a
    compiled program, an id outside the vocabulary gives NaN.

    >>> from rlhf_jax import lm
    >>> lm.check_ids([[3, 9]], 10)
    >>> lm.check_ids([[3, 10]], 10)
    Traceback (most recent call last):
    ...
    ValueError: token ids contain the id 10 at [0, 1], but the model has 10 ids, 0 to 9; if tokens were added ...

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
