"""Aligns model outputs with the tokens that they predict. All shifting by one column is done in this module.

The output of a model in column j predicts the next token. Functions of tokens in :mod:`rlhf_jax.lm` instead align their
results with the predicted token: entry i of the log-probabilities belongs to token i, and entry i of the values is the
value before token i. Both are computed from the output at the last real token before token i (in packed rows, in the
same segment), and are 0 if there is no such token.

`token_map` turns any function of logits into a function of tokens with this alignment and computes the logits in chunks
of columns. The functions of tokens in :mod:`rlhf_jax.lm.logprobs` and :mod:`rlhf_jax.lm.distributions` that require
logits call it or `map_hidden`, which accepts the hidden states of several models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.lm import chunking, config, transformer


@functools.cache
def _own_apply_fn(cfg: config.LMConfig, columns: tuple[int, int] | None) -> types.ApplyFn:
    forward = functools.partial(transformer.forward, cfg=cfg, columns=columns)
    return types.ApplyFn(forward=forward, logits=functools.partial(transformer.logits, cfg=cfg))


def apply_fn(cfg: config.LMConfig | types.ApplyFn, columns: tuple[int, int] | None = None) -> types.ApplyFn:
    """Returns the model as an `ApplyFn`; an `ApplyFn` is returned unchanged.

    With an `LMConfig`, ``columns``, the range of columns whose hidden states are needed, is passed to `lm.forward`.
    Calls with equal arguments return the same object.
    """
    return cfg if isinstance(cfg, types.ApplyFn) else _own_apply_fn(cfg, columns)


def token_map(
    fn: Callable[..., Any],
    params: types.Params,
    tokens_BL: jax.Array,
    *arrays: jax.Array,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    chunk: int | None = None,
) -> Any:
    """Applies ``fn`` to the logits that predict each token and to the token's entries in ``arrays``.

    Args:
        fn: Maps logits ``[b, c, V]`` and arrays ``[b, c, ...]`` to a pytree of arrays ``[b, c, ...]``. It is called for
            one chunk of b rows and c columns at a time, and must treat rows and columns independently.
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        *arrays: Arrays ``[B, L, ...]``, or ``[B, T, ...]`` with ``prompt_width``; entry i belongs to token i.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens. By default, ``segments_BL > 0`` if segments are given, else True everywhere.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt, for rows with a prompt in columns ``[0, P)`` and a response after it. The
            result then covers only the T = L - P columns of the response, and only their logits are computed. Every
            row must have a real token in column P - 1.
        chunk: Number of columns for which logits are computed at a time. By default, as many as fit in 64 MB
            on one CPU, or in 256 MB per device on a GPU, a TPU or a mesh.

    Returns:
        A pytree of arrays ``[B, L, ...]``, or ``[B, T, ...]`` with ``prompt_width``; 0 at padding and at the first real
        token of each sequence.

    Raises:
        ValueError: ``prompt_width`` leaves no prompt or no response, or is combined with ``segments_BL``.
    """
    hidden, apply = hidden_states(params, tokens_BL, cfg, mask_BL, segments_BL, prompt_width)
    return map_hidden(
        lambda hidden, *arrays: fn(apply.logits(params, hidden), *arrays),
        (hidden,),
        arrays,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        prompt_width=prompt_width,
        vocab=chunking.vocab_of(apply, params, hidden),
        chunk=chunk,
    )


def hidden_states(
    params: types.Params,
    tokens_BL: jax.Array,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    prompt_width: int | None,
) -> tuple[jax.Array, types.ApplyFn]:
    """Runs the model and returns the hidden states that a function of tokens requires.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; None if all tokens are real or segments are given.
        segments_BL: int32 segment ids of packed rows; None for rows that are not packed.
        prompt_width: Width P of the prompt; the result then covers only the columns that predict the response.

    Returns:
        ``(hidden, apply)``: hidden states ``[B, L, D]``, or ``[B, T, D]`` with ``prompt_width``, and the model as an
        `ApplyFn`.

    Raises:
        ValueError: ``prompt_width`` is not in [1, L - 1], or is combined with ``segments_BL``.
    """
    if prompt_width is None:
        apply = apply_fn(cfg)
        return apply.forward(params, tokens_BL, **forward_masks(mask_BL, segments_BL)).hidden_BLD, apply
    L = tokens_BL.shape[1]
    if not 1 <= prompt_width < L:
        raise ValueError(f"prompt_width is {prompt_width}; it must be in [1, {L - 1}]")
    if segments_BL is not None:
        raise ValueError("prompt_width and segments_BL cannot be combined: a packed row has no single prompt width")
    apply = apply_fn(cfg, (prompt_width - 1, L - 1))
    return apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD[:, prompt_width - 1 : -1], apply


def map_hidden(
    fn: Callable[..., Any],
    hiddens: tuple[jax.Array, ...],
    arrays: tuple[jax.Array, ...],
    *,
    mask_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    prompt_width: int | None,
    vocab: int,
    chunk: int | None,
) -> Any:
    """Applies ``fn`` to the hidden states that predict each token and to the token's entries in ``arrays``.

    Args:
        fn: Maps hidden states ``[b, c, D]`` and arrays ``[b, c, ...]`` to a pytree of arrays ``[b, c, ...]``.
        hiddens: Hidden states from `hidden_states`, one array for each model.
        arrays: As in `token_map`.
        mask_BL: As in `token_map`.
        segments_BL: As in `token_map`.
        prompt_width: As in `token_map`.
        vocab: Number of floats that ``fn`` computes for each token, such as V for logits.
        chunk: As in `token_map`.

    Returns:
        As in `token_map`.
    """
    mask_BL = real(mask_BL, segments_BL)
    if prompt_width is not None:
        mask_BT = None if mask_BL is None else mask_BL[:, prompt_width:]
        arrays = tuple(zero_unless(mask_BT, x) for x in arrays)
        mapped = chunking.over_columns(fn, *hiddens, *arrays, vocab=vocab, chunk=chunk)
        return jax.tree.map(lambda x: zero_unless(mask_BT, x), mapped)
    if mask_BL is None:
        shifted = (x[:, :-1] for x in hiddens)
        mapped = chunking.over_columns(fn, *shifted, *(x[:, 1:] for x in arrays), vocab=vocab, chunk=chunk)
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2)), mapped)
    # Arrays and results are shifted instead of hidden states, which are D times larger.
    L = mask_BL.shape[1]
    next_BL = next_real(mask_BL)
    column_BL = jnp.minimum(next_BL, L - 1)
    has_next_BL = mask_BL & (next_BL < L) & same_segment(segments_BL, column_BL)
    arrays = tuple(zero_unless(has_next_BL, _take(x, column_BL)) for x in arrays)
    mapped = chunking.over_columns(fn, *hiddens, *arrays, vocab=vocab, chunk=chunk)
    return jax.tree.map(lambda x: from_previous_real(x, mask_BL, segments_BL), mapped)


def from_previous_real(x_BL: jax.Array, mask_BL: jax.Array | None, segments_BL: jax.Array | None = None) -> jax.Array:
    """Returns, for each real token, the entry at the last real token before it, ``[B,L,...]``.

    In packed rows, the two tokens must be in the same segment. The result is 0 at padding and at real tokens without
    such a previous token.
    """
    mask_BL = real(mask_BL, segments_BL)
    if mask_BL is None:
        return jnp.pad(x_BL[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x_BL.ndim - 2))
    previous_BL = previous_real(mask_BL)
    column_BL = jnp.maximum(previous_BL, 0)
    has_previous_BL = mask_BL & (previous_BL >= 0) & same_segment(segments_BL, column_BL)
    return zero_unless(has_previous_BL, _take(x_BL, column_BL))


def real(mask_BL: jax.Array | None, segments_BL: jax.Array | None) -> jax.Array | None:
    """Returns ``mask_BL`` or, by default, ``segments_BL > 0``; None means that all tokens are real."""
    return segments_BL > 0 if mask_BL is None and segments_BL is not None else mask_BL


def forward_masks(mask_BL: jax.Array | None, segments_BL: jax.Array | None) -> dict[str, Any]:
    """Returns the masks of a forward pass as keyword arguments; ``segments_BL`` is included only if it is given."""
    masked = {"mask_BL": real(mask_BL, segments_BL)}
    return masked if segments_BL is None else masked | {"segments_BL": segments_BL}


def same_segment(segments_BL: jax.Array | None, column_BL: jax.Array) -> jax.Array | bool:
    """Returns whether tokens ``[b, l]`` and ``[b, column_BL[b, l]]`` are in the same segment; True without segments."""
    return True if segments_BL is None else jnp.take_along_axis(segments_BL, column_BL, axis=1) == segments_BL


def next_real(mask_BL: jax.Array) -> jax.Array:
    """Returns the column of the first real token after each column; L if there is none."""
    L = mask_BL.shape[1]
    at_or_after = lax.cummin(jnp.where(mask_BL, jnp.arange(L)[None, :], L), axis=1, reverse=True)
    return jnp.pad(at_or_after[:, 1:], ((0, 0), (0, 1)), constant_values=L)


def previous_real(mask_BL: jax.Array) -> jax.Array:
    """Returns the column of the last real token before each column; -1 if there is none."""
    L = mask_BL.shape[1]
    at_or_before = lax.cummax(jnp.where(mask_BL, jnp.arange(L)[None, :], -1), axis=1)
    return jnp.pad(at_or_before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _take(x_BL: jax.Array, column_BL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BL, column_BL.reshape(*column_BL.shape, *[1] * (x_BL.ndim - 2)), axis=1)


def zero_unless(where_BL: jax.Array | None, x_BL: jax.Array) -> jax.Array:
    """Returns ``x_BL``, ``[B,L,...]``, with zeros where ``where_BL`` is False; None means True everywhere."""
    if where_BL is None:
        return x_BL
    return jnp.where(where_BL.reshape(*where_BL.shape, *[1] * (x_BL.ndim - 2)), x_BL, jnp.zeros((), x_BL.dtype))
