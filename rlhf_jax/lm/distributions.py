"""Whole distributions over the vocabulary, compared token by token: distillation, and the exact KL of two models.

What a teacher thinks is kept as its k likeliest tokens and their log-probabilities (``token_top_k``); what the student
thinks of the same ones (``token_listed_logprobs``) goes with them into ``losses.distill``, whose last class is all the
rest of the vocabulary. ``token_kl`` compares all of it. As everywhere in :mod:`rlhf_jax.lm`, entry i is about token i,
and only a part of the logits exists at a time, forward and backward.

The two ends of context distillation (Bai et al. 2022, A.1) meet in the ``response_`` forms: teacher and student read
different prompts, of different widths, before the same response.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from rlhf_jax import kl, masking, types
from rlhf_jax.lm import alignment, chunking, config, logprobs
from rlhf_jax.losses import supervised


class TopK(NamedTuple):
    """The k likeliest tokens in the place of each token, ``[B,L,K]``, the likeliest first."""

    logprobs: jax.Array
    """float32, normalised over the whole vocabulary."""
    ids: jax.Array
    """int32."""


def token_top_k(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    k: int,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TopK:
    """The k likeliest tokens after the real tokens before each token; zero where there are none, and at padding."""
    return token_top_k_with(
        logprobs.apply_fn(cfg),
        params,
        tokens_BL,
        k=k,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        temperature=temperature,
        chunk=chunk,
    )


def token_listed_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    ids_BLK: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,L,K]`` float32: log p(ids_i | real tokens before token i), each normalised over the whole vocabulary."""
    return token_listed_logprobs_with(
        logprobs.apply_fn(cfg),
        params,
        tokens_BL,
        ids_BLK,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        temperature=temperature,
        chunk=chunk,
    )


def response_top_k(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    k: int,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TopK:
    """:func:`token_top_k` of the response alone, ``[B,T,K]``."""
    return response_top_k_with(
        logprobs.answering(cfg, tokens_BL, prompt_width),
        params,
        tokens_BL,
        k=k,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        temperature=temperature,
        chunk=chunk,
    )


def response_listed_logprobs(
    params: types.Params,
    tokens_BL: jax.Array,
    ids_BTK: jax.Array,
    *,
    cfg: config.LMConfig,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`token_listed_logprobs` of the response alone, ``[B,T,K]``."""
    return response_listed_logprobs_with(
        logprobs.answering(cfg, tokens_BL, prompt_width),
        params,
        tokens_BL,
        ids_BTK,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        temperature=temperature,
        chunk=chunk,
    )


def token_kl(
    params: types.Params,
    other_params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    other_cfg: config.LMConfig | None = None,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """``[B,L]`` float32: the exact KL(first model || other model) in nats where each token was drawn.

    Policy and reference for the KL of a rollout; teacher and student, in this order, for distillation. Gradients go
    to whichever is differentiated. 0 at the first real token of a row (of a segment) and at padding. ``other_cfg``
    is ``cfg`` where it is not given; the vocabularies must agree.
    """
    return token_kl_with(
        logprobs.apply_fn(cfg),
        params,
        logprobs.apply_fn(other_cfg or cfg),
        other_params,
        tokens_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        temperature=temperature,
        chunk=chunk,
    )


def token_top_k_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    k: int,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TopK:
    """:func:`token_top_k` of any model."""
    return alignment.token_map_with(
        apply,
        params,
        lambda logits: TopK(*supervised.top_k_logprobs(_scaled(logits, temperature), k=k)),
        tokens_BL,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        chunk=chunk,
    )


def token_listed_logprobs_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    ids_BLK: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`token_listed_logprobs` of any model."""
    return alignment.token_map_with(
        apply,
        params,
        lambda logits, ids: supervised.gather_logprobs(_scaled(logits, temperature), ids),
        tokens_BL,
        ids_BLK,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        chunk=chunk,
    )


def response_top_k_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    k: int,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> TopK:
    """:func:`response_top_k` of any model."""
    return alignment.response_map_with(
        apply,
        params,
        lambda logits: TopK(*supervised.top_k_logprobs(_scaled(logits, temperature), k=k)),
        tokens_BL,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        chunk=chunk,
    )


def response_listed_logprobs_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    ids_BTK: jax.Array,
    *,
    prompt_width: int,
    mask_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`response_listed_logprobs` of any model."""
    return alignment.response_map_with(
        apply,
        params,
        lambda logits, ids: supervised.gather_logprobs(_scaled(logits, temperature), ids),
        tokens_BL,
        ids_BTK,
        prompt_width=prompt_width,
        mask_BL=mask_BL,
        chunk=chunk,
    )


def token_kl_with(
    apply: types.ApplyFn,
    params: types.Params,
    other_apply: types.ApplyFn,
    other_params: types.Params,
    tokens_BL: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> jax.Array:
    """:func:`token_kl` of any two models. Raises ``ValueError`` where their vocabularies differ in size."""
    reading = alignment.reading(mask_BL, segments_BL)
    hidden_BLD = apply.forward(params, tokens_BL, **reading).hidden_BLD
    other_BLD = other_apply.forward(other_params, tokens_BL, **reading).hidden_BLD

    def divergence(hidden: jax.Array, other: jax.Array) -> jax.Array:
        logits, other_logits = apply.logits(params, hidden), other_apply.logits(other_params, other)
        return kl.full(_scaled(logits, temperature), _scaled(other_logits, temperature))

    vocab = chunking.vocab_of(apply, params, hidden_BLD) + chunking.vocab_of(other_apply, other_params, other_BLD)
    return alignment.by_token(
        divergence,
        (hidden_BLD, other_BLD),
        (),
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        vocab=vocab,
        chunk=chunk,
    )


def _scaled(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return masking.as_float32(logits) / temperature
