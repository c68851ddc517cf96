"""Which column predicts which token. The only place where anything is shifted by one.

A model's output in column j is about what comes AFTER the token there. Everything that :mod:`rlhf_jax.lm` returns is
aligned with the token it is about: entry i of a log-probability is that of token i, entry i of a value is the value
before token i, and both come from the column of the real token before i: in the same segment, where rows are packed.

``token_map_with`` and ``response_map_with`` turn any function of logits into one of tokens, aligned like that and
without ever holding the logits of all columns. Every function of :mod:`rlhf_jax.lm.logprobs` and
:mod:`rlhf_jax.lm.distributions` that reads logits is one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.lm import chunking


def token_map_with(
    apply: types.ApplyFn,
    params: types.Params,
    fn: Callable[..., Any],
    tokens_BL: jax.Array,
    *arrays_BL: jax.Array,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    chunk: int | None = None,
) -> Any:
    """``fn(logits, *arrays)`` for every token, of the logits that the token was predicted from.

    Args:
        apply: any model.
        params: its parameters.
        fn: maps ``logits [b, c, V]`` and the arrays' ``[b, c, ...]`` to a pytree of ``[b, c, ...]``, each column by
            itself. Of a part of the columns at a time, see ``chunk``.
        tokens_BL: what the model reads.
        *arrays_BL: ``[B, L, ...]``, entry i about token i: the tokens themselves, or a teacher's candidates for each.
        mask_BL: true at real tokens; None means ``segments_BL > 0``, or all.
        segments_BL: int32, which sequence of a packed row a token belongs to, 0 at padding; see `data.packing`.
        chunk: columns of logits made at a time. None: as many as take little memory, all where all do.

    Returns:
        A pytree of ``[B, L, ...]``, zero at the first real token of each row (each segment) and at padding.
    """
    hidden_BLD = apply.forward(params, tokens_BL, **reading(mask_BL, segments_BL)).hidden_BLD
    return by_token(
        lambda hidden, *arrays: fn(apply.logits(params, hidden), *arrays),
        (hidden_BLD,),
        arrays_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        vocab=chunking.vocab_of(apply, params, hidden_BLD),
        chunk=chunk,
    )


def response_map_with(
    apply: types.ApplyFn,
    params: types.Params,
    fn: Callable[..., Any],
    tokens_BL: jax.Array,
    *arrays_BT: jax.Array,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    chunk: int | None = None,
) -> Any:
    """``token_map_with(...)[:, P:]`` at the price of T columns of logits; arrays and result are ``[B, T, ...]``.

    For rollouts: column P - 1 is real in every row, and a contiguous response stands behind it. Zero off the mask.
    Raises ``ValueError`` for a ``prompt_width`` that leaves no prompt or no response.
    """
    hidden_BTD = response_hidden(apply, params, tokens_BL, prompt_width=prompt_width, mask_BL=mask_BL)
    if mask_BL is not None:
        arrays_BT = tuple(_zero_unless(mask_BL[:, prompt_width:], x) for x in arrays_BT)
    made = chunking.over_columns(
        lambda hidden, *arrays: fn(apply.logits(params, hidden), *arrays),
        hidden_BTD,
        *arrays_BT,
        vocab=chunking.vocab_of(apply, params, hidden_BTD),
        chunk=chunk,
    )
    return made if mask_BL is None else jax.tree.map(lambda x: _zero_unless(mask_BL[:, prompt_width:], x), made)


def response_hidden(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """Hidden states ``[B,T,D]`` before each token of a response that begins in column ``prompt_width``."""
    if not 1 <= prompt_width < tokens_BL.shape[1]:
        raise ValueError(f"prompt_width is {prompt_width}; it must be in [1, {tokens_BL.shape[1] - 1}]")
    return apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD[:, prompt_width - 1 : -1]


def by_token(
    fn: Callable[..., Any],
    hiddens_BLD: tuple[jax.Array, ...],
    arrays_BL: tuple[jax.Array, ...],
    *,
    mask_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    vocab: int,
    chunk: int | None,
) -> Any:
    """``fn(*hiddens, *arrays)`` with each token's array entries beside the hidden states it is predicted from."""
    mask_BL = real(mask_BL, segments_BL)
    if mask_BL is None:
        hiddens = (x[:, :-1] for x in hiddens_BLD)
        made = chunking.over_columns(fn, *hiddens, *(x[:, 1:] for x in arrays_BL), vocab=vocab, chunk=chunk)
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2)), made)
    # Each column's own token is looked up and the results are moved after: moving hidden states costs D times more.
    L = mask_BL.shape[1]
    next_BL = next_real(mask_BL)
    column_BL = jnp.minimum(next_BL, L - 1)
    has_next_BL = mask_BL & (next_BL < L) & same_segment(segments_BL, column_BL)
    arrays_BL = tuple(_zero_unless(has_next_BL, _take(x, column_BL)) for x in arrays_BL)
    made = chunking.over_columns(fn, *hiddens_BLD, *arrays_BL, vocab=vocab, chunk=chunk)
    return jax.tree.map(lambda x: from_previous_real(x, mask_BL, segments_BL), made)


def from_previous_real(
    made_BL: jax.Array, mask_BL: jax.Array | None, segments_BL: jax.Array | None = None
) -> jax.Array:
    """What was made in the column of the real token before each real token, ``[B,L,...]``; 0 where there is none."""
    mask_BL = real(mask_BL, segments_BL)
    if mask_BL is None:
        return jnp.pad(made_BL[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (made_BL.ndim - 2))
    previous_BL = previous_real(mask_BL)
    column_BL = jnp.maximum(previous_BL, 0)
    has_previous_BL = mask_BL & (previous_BL >= 0) & same_segment(segments_BL, column_BL)
    return _zero_unless(has_previous_BL, _take(made_BL, column_BL))


def real(mask_BL: jax.Array | None, segments_BL: jax.Array | None) -> jax.Array | None:
    """The mask: as given, else where there is a segment; None where neither is given and every token is real."""
    return segments_BL > 0 if mask_BL is None and segments_BL is not None else mask_BL


def reading(mask_BL: jax.Array | None, segments_BL: jax.Array | None) -> dict[str, Any]:
    """Keyword arguments of a forward pass. Only packed rows name segments: other models need not know the word."""
    masked = {"mask_BL": real(mask_BL, segments_BL)}
    return masked if segments_BL is None else masked | {"segments_BL": segments_BL}


def same_segment(segments_BL: jax.Array | None, column_BL: jax.Array) -> jax.Array | bool:
    """Whether each token and the one in the given column belong to one sequence."""
    return True if segments_BL is None else jnp.take_along_axis(segments_BL, column_BL, axis=1) == segments_BL


def next_real(mask_BL: jax.Array) -> jax.Array:
    """Column of the first real token after each column; L where there is none."""
    L = mask_BL.shape[1]
    at_or_after = lax.cummin(jnp.where(mask_BL, jnp.arange(L)[None, :], L), axis=1, reverse=True)
    return jnp.pad(at_or_after[:, 1:], ((0, 0), (0, 1)), constant_values=L)


def previous_real(mask_BL: jax.Array) -> jax.Array:
    """Column of the last real token before each column; -1 where there is none."""
    L = mask_BL.shape[1]
    at_or_before = lax.cummax(jnp.where(mask_BL, jnp.arange(L)[None, :], -1), axis=1)
    return jnp.pad(at_or_before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _take(x_BL: jax.Array, column_BL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BL, column_BL.reshape(*column_BL.shape, *[1] * (x_BL.ndim - 2)), axis=1)


def _zero_unless(where_BL: jax.Array, x_BL: jax.Array) -> jax.Array:
    return jnp.where(where_BL.reshape(*where_BL.shape, *[1] * (x_BL.ndim - 2)), x_BL, jnp.zeros((), x_BL.dtype))
