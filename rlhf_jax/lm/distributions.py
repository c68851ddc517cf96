"""Distributions over the whole vocabulary, token by token: distillation and the exact KL of two models.

A teacher's distribution is stored as its k most likely tokens and their log-probabilities (`token_top_k`).
`losses.distill` compares them with the student's log-probabilities of the same tokens (`token_listed_logprobs`); its
last class is the rest of the vocabulary. For context distillation (Bai et al. 2022, A.1), teacher and student read
different prompts before the same response, each with its own ``prompt_width``. `token_kl` compares whole distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from rlhf_jax import kl, masking, types
from rlhf_jax.lm import alignment, chunking, config
from rlhf_jax.losses import supervised


class TopK(NamedTuple):
    """The k most likely tokens at the position of each token, ``[B,L,K]``, most likely first."""

    logprobs: jax.Array
    """float32, normalised over the whole vocabulary."""
    ids: jax.Array
    """int32."""


def token_top_k(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    k: int,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TopK:
    """Returns, for each token, the k most likely continuations of the real tokens before it.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model: an `LMConfig`, or an `ApplyFn` for any other model.
        k: Number of tokens to keep, at most V.
        mask_BL: bool, True at real tokens; padding may be anywhere.
        segments_BL: int32, the sequence of a packed row that each token belongs to; 0 at padding.
        prompt_width: P; the result then is ``[B,T,K]``, for the response that begins in column P.
        temperature: Divides the logits; above 0.
        chunk: Number of columns of logits computed at a time.

    Returns:
        `TopK` of ``[B,L,K]``, or ``[B,T,K]`` with ``prompt_width``; 0 where `token_logprobs` is 0 by definition.
    """
    fn = lambda logits: TopK(*supervised.top_k_logprobs(_scaled(logits, temperature), k=k))  # noqa: E731
    masks = {"mask_BL": mask_BL, "segments_BL": segments_BL, "prompt_width": prompt_width}
    return alignment.token_map(fn, params, tokens_BL, cfg=cfg, chunk=chunk, **masks)


def token_listed_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    ids_BLK: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """Returns log p(ids_i | real tokens before token i), each normalised over the whole vocabulary.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        ids_BLK: int32, K candidates at the position of each token; ``[B,T,K]`` with ``prompt_width``.
        cfg: As in `token_top_k`, like all arguments below.
        mask_BL: bool, True at real tokens.
        segments_BL: int32, the sequence of a packed row that each token belongs to.
        prompt_width: P; the result then is ``[B,T,K]``.
        temperature: Divides the logits; above 0.
        chunk: Number of columns of logits computed at a time.

    Returns:
        ``[B,L,K]`` float32, or ``[B,T,K]`` with ``prompt_width``; 0 where `token_logprobs` is 0 by definition.
    """
    fn = lambda logits, ids: supervised.gather_logprobs(_scaled(logits, temperature), ids)  # noqa: E731
    masks = {"mask_BL": mask_BL, "segments_BL": segments_BL, "prompt_width": prompt_width}
    return alignment.token_map(fn, params, tokens_BL, ids_BLK, cfg=cfg, chunk=chunk, **masks)


def token_kl(
    params: types.Params,
    other_params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    other_cfg: config.LMConfig | types.ApplyFn | None = None,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """Returns the exact KL(model || other model) in nats of the distributions that each token was drawn from.

    The two models are policy and reference for the KL of a rollout, teacher and student for distillation. Gradients
    flow to both sets of parameters.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.init(jax.random.key(0), cfg)
    >>> print(float(lm.token_kl(params, params, jnp.array([[5, 6, 7]]), cfg=cfg).sum()))
    0.0

    Args:
        params: Parameters of the first model.
        other_params: Parameters of the other model.
        tokens_BL: int32 tokens.
        cfg: The first model.
        other_cfg: The other model, ``cfg`` by default; the vocabularies must have the same size.
        mask_BL: As in `token_top_k`, like all arguments below.
        segments_BL: int32, the sequence of a packed row that each token belongs to.
        prompt_width: P; the result then is ``[B,T]``.
        temperature: Divides the logits of both models; above 0.
        chunk: Number of columns of logits computed at a time.

    Returns:
        ``[B,L]`` float32, or ``[B,T]`` with ``prompt_width``; 0 where `token_logprobs` is 0 by definition.

    Raises:
        ValueError: The vocabularies differ in size.
    """
    masks = (mask_BL, segments_BL, prompt_width)
    hidden, apply = alignment.hidden_states(params, tokens_BL, cfg, *masks)
    other_hidden, other_apply = alignment.hidden_states(other_params, tokens_BL, other_cfg or cfg, *masks)

    def divergence(hidden: jax.Array, other_hidden: jax.Array) -> jax.Array:
        logits, other_logits = apply.logits(params, hidden), other_apply.logits(other_params, other_hidden)
        return kl.full(_scaled(logits, temperature), _scaled(other_logits, temperature))

    return alignment.map_hidden(
        divergence,
        (hidden, other_hidden),
        (),
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        prompt_width=prompt_width,
        vocab=chunking.vocab_of(apply, params, hidden) + chunking.vocab_of(other_apply, other_params, other_hidden),
        chunk=chunk,
    )


def _scaled(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return masking.as_float32(logits) / temperature
