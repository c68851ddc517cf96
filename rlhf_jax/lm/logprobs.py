"""Log-probabilities, entropies, values and scores of tokens.

Each function takes the model as ``cfg``: an `LMConfig` for the model of this library, or a `rlhf_jax.types.ApplyFn`
for any other. Scalar heads are read from ``params["head"]``.

Entry i of a result belongs to token i (see :mod:`rlhf_jax.lm.alignment`). With ``prompt_width=P`` the result covers the
columns from P on, the response of a rollout, and only their logits are computed.

Logits are computed for ``chunk`` columns at a time, in the forward and the backward pass, so that ``[B,L,V]`` never
exists in float32. By default a chunk takes 64 MB, which is all columns of a small model.
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
    """Log-probability of each token, and entropy in nats of the distribution that it was drawn from; float32."""

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
    """Returns log p(token_i | real tokens before it), under ``softmax(logits / temperature)``.

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
        cfg: The model: an `LMConfig`, or an `ApplyFn` for any other model.
        mask_BL: bool, True at real tokens; padding may be anywhere. By default ``segments_BL > 0``, or all True.
        segments_BL: int32, the sequence of a packed row that each token belongs to; 0 at padding.
        prompt_width: P; the result then is ``[B,T]``, for the response that begins in column P.
        temperature: Divides the logits; above 0.
        chunk: Number of columns of logits computed at a time.

    Returns:
        ``[B,L]`` float32, or ``[B,T]`` with ``prompt_width``. 0 at padding and at the first real token of each row
        and segment.

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
    """Returns `token_logprobs` and the entropy of each token's distribution in nats, from one pass.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: As in `token_logprobs`, like all arguments below.
        mask_BL: bool, True at real tokens.
        segments_BL: int32, the sequence of a packed row that each token belongs to.
        prompt_width: P; the results then are ``[B,T]``.
        temperature: Divides the logits; above 0.
        chunk: Number of columns of logits computed at a time.

    Returns:
        `TokenStats` of two ``[B,L]`` arrays, or ``[B,T]`` with ``prompt_width``.
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
    """Returns whether each token is the one that greedy decoding chooses after the real tokens before it.

    If every token of an answer matches, greedy decoding gives that answer, so one pass finds exact matches.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: As in `token_logprobs`, like all arguments below.
        mask_BL: bool, True at real tokens.
        segments_BL: int32, the sequence of a packed row that each token belongs to.
        prompt_width: P; the result then is ``[B,T]``.
        chunk: Number of columns of logits computed at a time.

    Returns:
        bool ``[B,L]``, or ``[B,T]`` with ``prompt_width``; False where `token_logprobs` is 0 by definition.
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
    """Returns the value BEFORE each token: the scalar head at the last real token before it.

    Args:
        params: Parameters of the critic, with one head.
        tokens_BL: int32 tokens.
        cfg: As in `token_logprobs`, like all arguments below.
        mask_BL: bool, True at real tokens.
        segments_BL: int32, the sequence of a packed row that each token belongs to.
        prompt_width: P; the result then is V_t of the response, ``[B,T]``.

    Returns:
        ``[B,L]`` float32, or ``[B,T]`` with ``prompt_width``; 0 where `token_logprobs` is 0 by definition.

    Raises:
        ValueError: ``params`` have no head or several.
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
    """Returns the reward of each row: the scalar head at its last real token, gain and bias applied.

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
        cfg: The model: an `LMConfig`, or an `ApplyFn` for any other model.
        mask_BL: bool, True at real tokens; by default all.

    Returns:
        ``[B]`` float32, or ``[B,H]`` with several heads; 0 for a row of padding.
    """
    last_B = _last_real(tokens_BL, mask_BL)
    if isinstance(cfg, types.ApplyFn):
        out = cfg.forward(params, tokens_BL, mask_BL=mask_BL)
    else:
        out = transformer.forward(params, tokens_BL, cfg=cfg, mask_BL=mask_BL, columns=last_B)
    return _at(heads.scalar(params, out.hidden_BLD), last_B)


def selected_logprobs(logits: jax.Array, targets: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns ``log_softmax(logits / temperature)`` at one target each: ``[..., V]``, ``[...] -> [...]``, float32.

    >>> import jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> print(round(float(lm.selected_logprobs(jnp.zeros(4), jnp.array(2))), 4))
    -1.3863

    Raises:
        ValueError: The shapes disagree.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {logits.shape} and targets {targets.shape} must agree except for the vocabulary")
    scaled = logits.astype(jnp.float32) / temperature
    # One-hot and sum fuse into one pass; the gradient of a gather would be a scatter.
    hot = lax.broadcasted_iota(targets.dtype, scaled.shape, scaled.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(hot, scaled, 0.0), axis=-1) - jax.nn.logsumexp(scaled, axis=-1)


def entropy(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns the entropy in nats of ``softmax(logits / temperature)``: ``[..., V] -> [...]``, float32.

    >>> import jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> print(round(float(lm.entropy(jnp.zeros(4))), 4))
    1.3863
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def _last_real(tokens_BL: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
    """Returns the column of the last real token of each row, ``[B]``; -1 for a row of padding."""
    B, L = tokens_BL.shape
    if mask_BL is None:
        return jnp.full(B, L - 1)
    return jnp.max(jnp.where(mask_BL, jnp.arange(L)[None, :], -1), axis=1)


def _at(x_BL: jax.Array, column_B: jax.Array) -> jax.Array:
    """Returns one entry of each row, ``[B, L, ...] -> [B, ...]``; 0 for column -1."""
    # Summed over one selected column, because the gradient of a gather would be a scatter.
    here_BL = jnp.arange(x_BL.shape[1])[None, :] == column_B[:, None]
    return jnp.sum(jnp.where(here_BL if x_BL.ndim == 2 else here_BL[..., None], x_BL, 0.0), axis=1)
