"""Log-probabilities, entropies and values of tokens, and scores of rows.

The argument ``cfg`` is an `LMConfig` for the model of this library, or a `rlhf_jax.types.ApplyFn` for any other model.
Scalar heads are read from ``params["head"]``.

Entry i of a result belongs to token i (see :mod:`rlhf_jax.lm.alignment`). With ``prompt_width=P``, the result covers
only the response, which starts in column P, and logits are computed only for the response.

Logits are computed for ``chunk`` columns at a time in both the forward and the backward pass, so that large float32
logits ``[B,L,V]`` are never in memory as a whole. By default, the logits of a chunk take at most 64 MB on one
CPU, or 256 MB per device on a GPU, a TPU or a mesh, which is enough for all columns of a small model.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.lm import alignment, config, heads, transformer


class TokenStats(NamedTuple):
    """Log-probability of each token, and entropy of the distribution that predicts it, in nats; both float32."""

    logprobs: jax.Array
    entropy: jax.Array


def token_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """Returns log p(token_i | real tokens before token i) under ``softmax(logits / temperature)``.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.init(jax.random.key(0), cfg)
    >>> tokens_BL = jnp.array([[5, 6, 7, 8]])
    >>> lm.token_logprobs(params, tokens_BL, cfg=cfg).shape
    (1, 4)
    >>> lm.token_logprobs(params, tokens_BL, cfg=cfg, prompt_width=3).shape
    (1, 1)

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; padding may be in any column. By default, ``segments_BL > 0`` if segments
            are given, else True everywhere.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T]``.
        temperature: Positive divisor of the logits.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        float32 ``[B,L]``, or ``[B,T]`` with ``prompt_width``; 0 at padding and at the first real token of each
        sequence.

    Raises:
        ValueError: ``prompt_width`` leaves no prompt or no response, or is combined with ``segments_BL``.
    """
    fn = functools.partial(selected_logprobs, temperature=temperature)
    masks = {"mask_BL": mask_BL, "segments_BL": segments_BL, "prompt_width": prompt_width}
    return alignment.token_map(fn, params, tokens_BL, tokens_BL[:, prompt_width:], cfg=cfg, chunk=chunk, **masks)


def token_stats(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """Returns log-probabilities and entropies of tokens from one forward pass.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the results then cover only the response, ``[B,T]``.
        temperature: Positive divisor of the logits.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        `TokenStats` of two arrays ``[B,L]``, or ``[B,T]`` with ``prompt_width``; 0 at padding and at the first real
        token of each sequence.
    """

    def stats(logits: jax.Array, targets: jax.Array) -> TokenStats:
        logprobs = selected_logprobs(logits, targets, temperature=temperature)
        return TokenStats(logprobs, entropy(logits, temperature=temperature))

    masks = {"mask_BL": mask_BL, "segments_BL": segments_BL, "prompt_width": prompt_width}
    return alignment.token_map(stats, params, tokens_BL, tokens_BL[:, prompt_width:], cfg=cfg, chunk=chunk, **masks)


def greedy_matches(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """Returns whether greedy decoding would choose each token after the real tokens before it.

    If all tokens of an answer match, greedy decoding generates that answer, so measuring exact matches requires only
    one forward pass.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T]``.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        bool ``[B,L]``, or ``[B,T]`` with ``prompt_width``; False at padding and at the first real token of each
        sequence.
    """
    masks = {"mask_BL": mask_BL, "segments_BL": segments_BL, "prompt_width": prompt_width}
    fn = lambda logits, targets: jnp.argmax(logits, axis=-1) == targets  # noqa: E731
    return alignment.token_map(fn, params, tokens_BL, tokens_BL[:, prompt_width:], cfg=cfg, chunk=chunk, **masks)


def values(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
) -> jax.Array:
    """Returns the value before each token, which is the output of the scalar head at the last real token before it.

    Args:
        params: Parameters of the critic, with a single head.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T]``.

    Returns:
        float32 ``[B,L]``, or ``[B,T]`` with ``prompt_width``; 0 at padding and at the first real token of each
        sequence.

    Raises:
        ValueError: ``params`` have no head, or several heads.
    """
    hidden, _ = alignment.hidden_states(params, tokens_BL, cfg, mask_BL, segments_BL, prompt_width)
    values = heads.value(params, hidden)
    if prompt_width is None:
        return alignment.from_previous_real(values, mask_BL, segments_BL)
    return alignment.zero_unless(None if mask_BL is None else mask_BL[:, prompt_width:], values)


def score(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """Returns the score of each row, which is the output of the scalar head at the row's last real token.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg), cfg)
    >>> padded_BL, mask_BL = jnp.array([[5, 6, 0]]), jnp.array([[True, True, False]])
    >>> scores_B = lm.score(params, padded_BL, cfg=cfg, mask_BL=mask_BL)
    >>> bool(jnp.allclose(scores_B, lm.score(params, padded_BL[:, :2], cfg=cfg), atol=1e-5))
    True

    Args:
        params: Parameters of the reward model, with one head or several.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; by default, all tokens are real.

    Returns:
        float32 ``[B]``, or ``[B,H]`` with several heads; 0 for rows that contain only padding.
    """
    last_B = _last_real(tokens_BL, mask_BL)
    if isinstance(cfg, types.ApplyFn):
        out = cfg.forward(params, tokens_BL, mask_BL=mask_BL)
    else:
        out = transformer.forward(params, tokens_BL, cfg=cfg, mask_BL=mask_BL, columns=last_B)
    return _at(heads.scalar(params, out.hidden_BLD), last_B)


def selected_logprobs(logits: jax.Array, targets: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns float32 ``log_softmax(logits / temperature)`` at the targets: ``[..., V], [...] -> [...]``.

    >>> import jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> print(round(float(lm.selected_logprobs(jnp.zeros(4), jnp.array(2))), 4))
    -1.3863

    Targets outside [0, V) have the log-probability NaN.

    Raises:
        ValueError: ``logits`` without its last axis and ``targets`` have different shapes.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets have shape {targets.shape}; logits {logits.shape} require {logits.shape[:-1]}")
    scaled = logits.astype(jnp.float32) / temperature
    # A masked sum, which XLA fuses with the mask, is used because the gradient of a gather would be a slow scatter.
    hot = lax.broadcasted_iota(targets.dtype, scaled.shape, scaled.ndim - 1) == targets[..., None]
    logprobs = jnp.sum(jnp.where(hot, scaled, 0.0), axis=-1) - jax.nn.logsumexp(scaled, axis=-1)
    return jnp.where((targets >= 0) & (targets < scaled.shape[-1]), logprobs, jnp.nan)


def entropy(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns the float32 entropy, in nats, of ``softmax(logits / temperature)``: ``[..., V] -> [...]``.

    >>> import jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> print(round(float(lm.entropy(jnp.zeros(4))), 4))
    1.3863
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    # A token of probability 0 contributes 0, also to the gradient: 0 times -infinity would be NaN.
    return -jnp.sum(jnp.exp(logp) * jnp.where(jnp.isneginf(logp), 0.0, logp), axis=-1)


def _last_real(tokens_BL: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
    """Returns the column of the last real token of each row, ``[B]``; -1 for rows that contain only padding."""
    B, L = tokens_BL.shape
    if mask_BL is None:
        return jnp.full(B, L - 1)
    return jnp.max(jnp.where(mask_BL, jnp.arange(L)[None, :], -1), axis=1)


def _at(x_BL: jax.Array, column_B: jax.Array) -> jax.Array:
    """Returns one entry of each row, ``[B, L, ...] -> [B, ...]``; 0 for column -1."""
    # The entry is selected by a masked sum, because the gradient of a gather would be a slow scatter.
    here_BL = jnp.arange(x_BL.shape[1])[None, :] == column_B[:, None]
    return jnp.sum(jnp.where(here_BL if x_BL.ndim == 2 else here_BL[..., None], x_BL, 0.0), axis=1)
