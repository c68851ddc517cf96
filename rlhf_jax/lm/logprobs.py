"""Log-probabilities, values and scores of tokens. The only place where anything is shifted by one.

A model's output in column j is about what comes AFTER the token there. Everything here is aligned with the token it is
about: entry i of a log-probability is that of token i, entry i of a value is the value before token i, and both come
from the column of the real token before i.

Each function has two forms. ``x(params, ..., cfg=cfg)`` is for this library's own model; ``x_with(apply, params, ...)``
takes any model as a :class:`rlhf_jax.types.ApplyFn`, the scalar ones reading ``params["head"]`` beside it.

The ``response_`` forms are for rollouts: a static prompt width P whose last column is real in every row, and a
contiguous response behind it, so that only columns ``[P-1:-1]`` are turned into logits.

Logits of a long row over a large vocabulary need not fit in memory at once: with ``chunk``, those of so many columns
exist at a time, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.lm import config, heads, transformer


class TokenStats(NamedTuple):
    """What a policy thinks of given tokens: log-probability of each, and the entropy of what it was drawn from."""

    logprobs: jax.Array
    entropy: jax.Array


@functools.cache
def apply_fn(cfg: config.LMConfig) -> types.ApplyFn:
    """Return this library's model as the pair (forward, logits). The same ``cfg`` gives the same object."""
    return types.ApplyFn(
        forward=functools.partial(transformer.forward, cfg=cfg), logits=functools.partial(transformer.logits, cfg=cfg)
    )


def token_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,L]`` float32: log p(token_i | real tokens before it), of ``softmax(logits / temperature)``.

    0 at the first real token of a row and at padding, which may stand anywhere. ``chunk`` columns of logits are made
    at a time, or all at once.
    """
    return token_logprobs_with(apply_fn(cfg), params, tokens_BL, mask_BL=mask_BL, temperature=temperature, chunk=chunk)


def values(
    params: types.Params, tokens_BL: jax.Array, *, cfg: config.LMConfig, mask_BL: jax.Array | None = None
) -> jax.Array:
    """``[B,L]`` float32: the value BEFORE token i, read off the scalar head at the real token before it.

    0 at the first real token of a row and at padding. With a response in columns P and on, ``[:, P:]`` is V_t.
    """
    return values_with(apply_fn(cfg), params, tokens_BL, mask_BL=mask_BL)


def score(
    params: types.Params, tokens_BL: jax.Array, *, cfg: config.LMConfig, mask_BL: jax.Array | None = None
) -> jax.Array:
    """``[B]`` float32: the scalar head at the last real token, gain and bias applied; a row of padding gets 0."""
    return score_with(apply_fn(cfg), params, tokens_BL, mask_BL=mask_BL)


def response_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,T]`` float32: ``token_logprobs(...)[:, P:]`` at the price of T columns of logits. 0 off the mask."""
    return response_logprobs_with(
        apply_fn(cfg),
        params,
        tokens_BL,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        temperature=temperature,
        chunk=chunk,
    )


def response_stats(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """Return :func:`response_logprobs` and the entropy of each token's distribution (nats), both ``[B,T]``."""
    return response_stats_with(
        apply_fn(cfg),
        params,
        tokens_BL,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        temperature=temperature,
        chunk=chunk,
    )


def response_values(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """``[B,T]`` float32: the value before each response token; 0 off the mask."""
    return response_values_with(apply_fn(cfg), params, tokens_BL, prompt_width=prompt_width, mask_BL=mask_BL)


def greedy_matches(
    params: types.Params, tokens_BL: jax.Array, *, cfg: config.LMConfig, mask_BL: jax.Array
) -> jax.Array:
    """``[B,L]`` bool: token i is the one that greedy decoding would give after the real tokens before it.

    A whole answer whose every token matches is what greedy decoding gives, so exact answers are scored in one pass.
    False at the first real token of a row and at padding.
    """
    hidden_BLD = transformer.forward(params, tokens_BL, cfg=cfg, mask_BL=mask_BL).hidden_BLD
    given_BL = jnp.argmax(transformer.logits(params, hidden_BLD, cfg=cfg), axis=-1)
    previous_BL = previous_real(mask_BL)
    moved_BL = jnp.take_along_axis(given_BL, jnp.maximum(previous_BL, 0), axis=1)
    return mask_BL & (previous_BL >= 0) & (moved_BL == tokens_BL)


def token_logprobs_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`token_logprobs` of any model."""
    score = _logprobs_of(apply, params, temperature)
    hidden_BLD = apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD
    if mask_BL is None:
        return jnp.pad(_in_chunks(score, hidden_BLD[:, :-1], tokens_BL[:, 1:], chunk), ((0, 0), (1, 0)))
    # Each column's own target is scored first and the scalars are moved after: moving hidden states costs D times more.
    next_BL = next_real(mask_BL)
    targets_BL = jnp.take_along_axis(tokens_BL, jnp.minimum(next_BL, tokens_BL.shape[1] - 1), axis=1)
    targets_BL = jnp.where(mask_BL & (next_BL < tokens_BL.shape[1]), targets_BL, 0)
    return _from_previous_real(_in_chunks(score, hidden_BLD, targets_BL, chunk), mask_BL)


def values_with(
    apply: types.ApplyFn, params: types.Params, tokens_BL: jax.Array, *, mask_BL: jax.Array | None = None
) -> jax.Array:
    """:func:`values` of any model."""
    made_BL = heads.scalar(params, apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD)
    if mask_BL is None:
        return jnp.pad(made_BL[:, :-1], ((0, 0), (1, 0)))
    return _from_previous_real(made_BL, mask_BL)


def score_with(
    apply: types.ApplyFn, params: types.Params, tokens_BL: jax.Array, *, mask_BL: jax.Array | None = None
) -> jax.Array:
    """:func:`score` of any model."""
    made_BL = heads.scalar(params, apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD)
    if mask_BL is None:
        return made_BL[:, -1]
    columns_L = jnp.arange(tokens_BL.shape[1])
    last_B = jnp.max(jnp.where(mask_BL, columns_L[None, :], -1), axis=1)
    # A sum over one chosen column: its gradient is a product, where a gather's would be a scatter.
    return jnp.sum(jnp.where(columns_L[None, :] == last_B[:, None], made_BL, 0.0), axis=1)


def response_logprobs_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`response_logprobs` of any model."""
    score = _logprobs_of(apply, params, temperature)
    hidden_BTD, targets_BT = _response_columns(apply, params, tokens_BL, prompt_width, mask_BL)
    return _response_only(_in_chunks(score, hidden_BTD, targets_BT, chunk), mask_BL, prompt_width)


def response_stats_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """:func:`response_stats` of any model."""

    def score(hidden_BTD: jax.Array, targets_BT: jax.Array) -> TokenStats:
        logits_BTV = apply.logits(params, hidden_BTD)
        return TokenStats(
            logprobs=selected_logprobs(logits_BTV, targets_BT, temperature=temperature),
            entropy=entropy(logits_BTV, temperature=temperature),
        )

    hidden_BTD, targets_BT = _response_columns(apply, params, tokens_BL, prompt_width, mask_BL)
    stats = _in_chunks(score, hidden_BTD, targets_BT, chunk)
    return TokenStats(*(_response_only(x_BT, mask_BL, prompt_width) for x_BT in stats))


def response_values_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """:func:`response_values` of any model."""
    _check_width(tokens_BL, prompt_width)
    hidden_BLD = apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD
    return _response_only(heads.scalar(params, hidden_BLD[:, prompt_width - 1 : -1]), mask_BL, prompt_width)


def selected_logprobs(logits: jax.Array, targets: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """``log_softmax(logits / temperature)`` at one target each: ``[..., V]``, ``[...] -> [...]``, float32."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {logits.shape} and targets {targets.shape} must agree but for the vocabulary")
    scaled = logits.astype(jnp.float32) / temperature
    # One-hot and sum, fused by the compiler into one pass; the gradient of a gather would be a scatter.
    hot = lax.broadcasted_iota(targets.dtype, scaled.shape, scaled.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(hot, scaled, 0.0), axis=-1) - jax.nn.logsumexp(scaled, axis=-1)


def entropy(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Entropy in nats of ``softmax(logits / temperature)``: ``[..., V] -> [...]``, float32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


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


def _from_previous_real(made_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    previous_BL = previous_real(mask_BL)
    moved_BL = jnp.take_along_axis(made_BL, jnp.maximum(previous_BL, 0), axis=1)
    return jnp.where(mask_BL & (previous_BL >= 0), moved_BL, 0.0)


def _response_columns(
    apply: types.ApplyFn, params: types.Params, tokens_BL: jax.Array, prompt_width: int, mask_BL: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    _check_width(tokens_BL, prompt_width)
    hidden_BLD = apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD
    targets_BT = tokens_BL[:, prompt_width:]
    if mask_BL is not None:
        targets_BT = jnp.where(mask_BL[:, prompt_width:], targets_BT, 0)
    return hidden_BLD[:, prompt_width - 1 : -1], targets_BT


def _logprobs_of(apply: types.ApplyFn, params: types.Params, temperature: jax.Array | float) -> Callable:
    return lambda hidden, targets: selected_logprobs(apply.logits(params, hidden), targets, temperature=temperature)


def _in_chunks(score: Callable, hidden_BLD: jax.Array, targets_BL: jax.Array, chunk: int | None) -> Any:
    """``score(hidden, targets)`` of ``chunk`` columns at a time, logits being made again in the backward pass."""
    B, L = targets_BL.shape
    if chunk is None or chunk >= L:
        return score(hidden_BLD, targets_BL)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 column, or None")

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -L % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.swapaxes(padded.reshape(B, -1, chunk, *x.shape[2:]), 0, 1)

    made = lax.map(jax.checkpoint(lambda columns: score(*columns)), (split(hidden_BLD), split(targets_BL)))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(B, -1)[:, :L], made)


def _response_only(x_BT: jax.Array, mask_BL: jax.Array | None, prompt_width: int) -> jax.Array:
    return x_BT if mask_BL is None else jnp.where(mask_BL[:, prompt_width:], x_BT, 0.0)


def _check_width(tokens_BL: jax.Array, prompt_width: int) -> None:
    if not 1 <= prompt_width < tokens_BL.shape[1]:
        raise ValueError(f"prompt_width is {prompt_width}; it must be in [1, {tokens_BL.shape[1] - 1}]")
