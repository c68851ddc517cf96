"""Log-probabilities, values and scores of tokens, each aligned with the token it is about (see :mod:`.alignment`).

Each function has two forms. ``x(params, ..., cfg=cfg)`` is for this library's own model; ``x_with(apply, params, ...)``
takes any model as a :class:`rlhf_jax.types.ApplyFn`, the scalar ones reading ``params["head"]`` beside it.

The ``response_`` forms are for rollouts: a static prompt width P whose last column is real in every row, and a
contiguous response behind it, so that only columns ``[P-1:-1]`` are turned into logits.

Logits of long rows over a large vocabulary need not fit in memory: only a part of them exists at a time, forward and
backward. ``chunk`` says how many columns; by default as many as take 64 MB, which is all of them for a small model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.lm import alignment, config, heads, transformer


class TokenStats(NamedTuple):
    """What a policy thinks of given tokens: log-probability of each, and the entropy of what it was drawn from."""

    logprobs: jax.Array
    entropy: jax.Array


@functools.cache
def apply_fn(cfg: config.LMConfig, columns: tuple[int, int] | None = None) -> types.ApplyFn:
    """Return this library's model as the pair (forward, logits). The same arguments give the same object.

    ``columns`` as in `lm.forward`, where the caller looks at those alone.
    """
    forward = functools.partial(transformer.forward, cfg=cfg, columns=columns)
    return types.ApplyFn(forward=forward, logits=functools.partial(transformer.logits, cfg=cfg))


def answering(cfg: config.LMConfig, tokens_BL: jax.Array, prompt_width: int) -> types.ApplyFn:
    """The model for one who looks at the columns that a response is predicted from, and at no other."""
    return apply_fn(cfg, (max(prompt_width - 1, 0), tokens_BL.shape[1] - 1))


def token_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,L]`` float32: log p(token_i | real tokens before it), of ``softmax(logits / temperature)``.

    0 at the first real token of a row and at padding, which may stand anywhere. In packed rows, ``segments_BL`` names
    the sequence that each token belongs to (0 at padding): then 0 at the first real token of each segment, and
    the tokens before are those of its segment.
    """
    return token_logprobs_with(
        apply_fn(cfg),
        params,
        tokens_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        temperature=temperature,
        chunk=chunk,
    )


def values(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """``[B,L]`` float32: the value BEFORE token i, read off the scalar head at the real token before it.

    0 at the first real token of a row (of a segment) and at padding. With a response in columns P and on, ``[:, P:]``
    is V_t.
    """
    return values_with(apply_fn(cfg), params, tokens_BL, mask_BL=mask_BL, segments_BL=segments_BL)


def score(
    params: types.Params, tokens_BL: jax.Array, *, cfg: config.LMConfig, mask_BL: jax.Array | None = None
) -> jax.Array:
    """``[B]`` float32: the scalar head at the last real token, gain and bias applied; a row of padding gets 0.

    ``[B, H]`` where the model has several heads.
    """
    last_B = _last_real(tokens_BL, mask_BL)
    reading = transformer.forward(params, tokens_BL, cfg=cfg, mask_BL=mask_BL, columns=last_B)
    return _at(heads.scalar(params, reading.hidden_BLD), last_B)


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
        answering(cfg, tokens_BL, prompt_width),
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
        answering(cfg, tokens_BL, prompt_width),
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
    apply = answering(cfg, tokens_BL, prompt_width)
    return response_values_with(apply, params, tokens_BL, prompt_width=prompt_width, mask_BL=mask_BL)


def greedy_matches(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,L]`` bool: token i is the one that greedy decoding would give after the real tokens before it.

    A whole answer whose every token matches is what greedy decoding gives, so exact answers are scored in one pass.
    False at the first real token of a row (of a segment) and at padding.
    """
    return greedy_matches_with(apply_fn(cfg), params, tokens_BL, mask_BL=mask_BL, segments_BL=segments_BL, chunk=chunk)


def token_logprobs_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`token_logprobs` of any model; only a model that packed rows are given to has to know ``segments_BL``."""
    return alignment.token_map_with(
        apply,
        params,
        _logprobs_at(temperature),
        tokens_BL,
        tokens_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        chunk=chunk,
    )


def values_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """:func:`values` of any model."""
    out = apply.forward(params, tokens_BL, **alignment.reading(mask_BL, segments_BL))
    return alignment.from_previous_real(heads.value(params, out.hidden_BLD), mask_BL, segments_BL)


def score_with(
    apply: types.ApplyFn, params: types.Params, tokens_BL: jax.Array, *, mask_BL: jax.Array | None = None
) -> jax.Array:
    """:func:`score` of any model."""
    made_BL = heads.scalar(params, apply.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD)
    return _at(made_BL, _last_real(tokens_BL, mask_BL))


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
    return alignment.response_map_with(
        apply,
        params,
        _logprobs_at(temperature),
        tokens_BL,
        tokens_BL[:, prompt_width:],
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        chunk=chunk,
    )


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

    def stats(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenStats:
        return TokenStats(
            logprobs=selected_logprobs(logits_BTV, targets_BT, temperature=temperature),
            entropy=entropy(logits_BTV, temperature=temperature),
        )

    return alignment.response_map_with(
        apply,
        params,
        stats,
        tokens_BL,
        tokens_BL[:, prompt_width:],
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        chunk=chunk,
    )


def response_values_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """:func:`response_values` of any model."""
    hidden_BTD = alignment.response_hidden(apply, params, tokens_BL, prompt_width=prompt_width, mask_BL=mask_BL)
    values_BT = heads.value(params, hidden_BTD)
    return values_BT if mask_BL is None else jnp.where(mask_BL[:, prompt_width:], values_BT, 0.0)


def greedy_matches_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`greedy_matches` of any model."""
    return alignment.token_map_with(
        apply,
        params,
        lambda logits_BLV, targets_BL: jnp.argmax(logits_BLV, axis=-1) == targets_BL,
        tokens_BL,
        tokens_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        chunk=chunk,
    )


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


def _last_real(tokens_BL: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
    """Column of the last real token of each row, ``[B]``; -1 where there is none."""
    B, L = tokens_BL.shape
    if mask_BL is None:
        return jnp.full(B, L - 1)
    return jnp.max(jnp.where(mask_BL, jnp.arange(L)[None, :], -1), axis=1)


def _at(x_BL: jax.Array, column_B: jax.Array) -> jax.Array:
    """One entry of each row, ``[B, L, ...] -> [B, ...]``; 0 for column -1."""
    # A sum over one chosen column: its gradient is a product, where a gather's would be a scatter.
    here_BL = jnp.arange(x_BL.shape[1])[None, :] == column_B[:, None]
    return jnp.sum(jnp.where(here_BL if x_BL.ndim == 2 else here_BL[..., None], x_BL, 0.0), axis=1)


def _logprobs_at(temperature: jax.Array | float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return functools.partial(selected_logprobs, temperature=temperature)
