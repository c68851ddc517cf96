"""Distributions over the vocabulary at each token, for distillation and for the exact KL between two models.

For distillation, `token_top_k` returns the teacher's k most likely tokens and their log-probabilities, and
`token_listed_logprobs` returns the student's log-probabilities of the same tokens. `losses.distill` compares the two
and treats the rest of the vocabulary as one additional class. In context distillation (Bai et al. 2022, A.1), teacher
and student process the same response after different prompts, whose widths (``prompt_width``) may also differ.
`token_kl` compares full distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from rlhf_jax import kl, masking, types
from rlhf_jax.lm import alignment, chunking, config
from rlhf_jax.losses import supervised


class TopK(NamedTuple):
    """The K most likely tokens at each position, in order of decreasing probability; both arrays are ``[B,L,K]``."""

    logprobs: jax.Array
    """float32, normalised over the whole vocabulary."""
    ids: jax.Array
    """int32 token ids."""


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
    """Returns, for each token, the ``k`` tokens that are most likely after the real tokens before it.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        k: Number of tokens to keep, at most V.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T,K]``.
        temperature: Positive divisor of the logits.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        `TopK` of two arrays ``[B,L,K]``, or ``[B,T,K]`` with ``prompt_width``; 0 at padding and at the first real token
        of each sequence.
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
    """Returns the log-probabilities of K given tokens at each position, normalised over the whole vocabulary.

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        ids_BLK: int32 ids of the K tokens at each position; ``[B,T,K]`` with ``prompt_width``.
        cfg: The model, as an `LMConfig` or an `ApplyFn`.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T,K]``.
        temperature: Positive divisor of the logits.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        float32 ``[B,L,K]``, or ``[B,T,K]`` with ``prompt_width``; 0 at padding and at the first real token of each
        sequence.
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
    other_tokens_BL: jax.Array | None = None,
    other_mask_BL: jax.Array | None = None,
    other_prompt_width: int | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """Returns the exact KL(first model || other model), in nats, between the distributions that predict each token.

    For example, the two models are policy and reference for the KL of a rollout, or teacher and student for
    distillation. Gradients flow to the parameters of both. In context distillation, the other model reads the same
    response after another prompt (``other_tokens_BL``).

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
        cfg: The first model, as an `LMConfig` or an `ApplyFn`.
        other_cfg: The other model, by default ``cfg``. The vocabularies must have the same size.
        mask_BL: bool, True at real tokens; by default, as in `lm.token_map`.
        segments_BL: int32 segment ids of packed rows, counted from 1; 0 at padding.
        prompt_width: Width P of the prompt; the result then covers only the response, ``[B,T]``.
        other_tokens_BL: int32 tokens that the other model reads, with the same response after a prompt of width
            ``other_prompt_width``; by default ``tokens_BL``. It requires ``prompt_width``.
        other_mask_BL: bool, True at the real tokens of ``other_tokens_BL``; None if all are real.
        other_prompt_width: Width of the other model's prompt.
        temperature: Positive divisor of the logits of both models.
        chunk: Number of columns for which logits are computed at a time; by default, as in `lm.token_map`.

    Returns:
        float32 ``[B,L]``, or ``[B,T]`` with ``prompt_width``; 0 at padding and at the first real token of each
        sequence.

    Raises:
        ValueError: The vocabularies or the responses differ in size, or ``other_tokens_BL`` is given without both
            widths.
    """
    masks = (mask_BL, segments_BL, prompt_width)
    hidden, apply = alignment.hidden_states(params, tokens_BL, cfg, *masks)
    if other_tokens_BL is not None:
        if prompt_width is None or other_prompt_width is None:
            raise ValueError("other_tokens_BL requires prompt_width and other_prompt_width")
        masks = (other_mask_BL, None, other_prompt_width)
    other_tokens_BL = tokens_BL if other_tokens_BL is None else other_tokens_BL
    other_hidden, other_apply = alignment.hidden_states(other_params, other_tokens_BL, other_cfg or cfg, *masks)
    if hidden.shape[1] != other_hidden.shape[1]:
        raise ValueError(
            f"the responses have {hidden.shape[1]} and {other_hidden.shape[1]} columns; they must be equal"
        )

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
