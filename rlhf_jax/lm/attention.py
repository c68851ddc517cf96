"""Softmax attention and its masks."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.lm import config

_HIDDEN = -1e30
"""Score of masked keys; finite, so that the softmax of a fully masked row is not NaN."""


def attend(
    queries_BHLC: jax.Array, keys_BGSC: jax.Array, values_BGSC: jax.Array, seen_BLS: jax.Array, *, cfg: config.LMConfig
) -> jax.Array:
    """Returns softmax attention, ``[B,H,L,C]``.

    With "einsum" or "auto" as ``cfg.attention``, scores and softmax are computed in float32, and a query that attends
    to no key has the mean of the values as its output and finite gradients.

    Args:
        queries_BHLC: Queries.
        keys_BGSC: Keys. H is a multiple of G, and each group of H / G consecutive query heads shares a key head
            (Ainslie et al. 2023).
        values_BGSC: Values.
        seen_BLS: bool, True if query l attends to key s.
        cfg: Architecture; ``attn_scale``, ``attn_softcap`` and ``attention`` are used.

    Returns:
        Attention output in the dtype of ``values_BGSC``.
    """
    if cfg.attention in ("xla", "cudnn"):
        return attend_by(cfg.attention, queries_BHLC, keys_BGSC, values_BGSC, seen_BLS, cfg=cfg)
    B, H, L, C = queries_BHLC.shape
    G, S = keys_BGSC.shape[1:3]
    # The queries of each group are stacked, so that a group needs only one matmul for any H / G.
    grouped = (queries_BHLC * cfg.attn_scale).reshape(B, G, (H // G) * L, C)
    scores = jnp.einsum("bgmc,bgsc->bgms", grouped, keys_BGSC, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cfg.attn_softcap)
    scores = jnp.where(seen_BLS[:, None], scores.reshape(B, H, L, S), _HIDDEN)
    weights = jax.nn.softmax(scores).astype(values_BGSC.dtype).reshape(B, G, (H // G) * L, S)
    return jnp.einsum("bgms,bgsc->bgmc", weights, values_BGSC).reshape(B, H, L, C)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Returns ``cap * tanh(x / cap)``, which limits x to [-cap, cap] (Gemma 2); returns x if ``cap`` is 0."""
    return cap * jnp.tanh(x / cap) if cap > 0 else x


def causal(mask_BL: jax.Array, segments_BL: jax.Array | None = None) -> jax.Array:
    """Returns the causal mask ``[B,L,L]``: tokens attend to themselves and to earlier real tokens of their segment.

    Padding tokens also attend to themselves, so that no row of the mask is empty. Real tokens never attend to padding.
    """
    columns = jnp.arange(mask_BL.shape[1])
    seen_BLL = visible(columns[None, :], columns, mask_BL)
    if segments_BL is None:
        return seen_BLL
    return seen_BLL & (segments_BL[:, :, None] == segments_BL[:, None, :])


def visible(query_columns_BL: jax.Array, key_columns_S: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Returns the mask ``[B,L,S]``, in which a query attends to its own column and to real keys in earlier columns.

    ``query_columns_BL`` may have shape ``[1,L]`` if the columns are the same in all rows.
    """
    before = key_columns_S[None, None, :] < query_columns_BL[:, :, None]
    itself = key_columns_S[None, None, :] == query_columns_BL[:, :, None]
    return (before & mask_BS[:, None, :]) | itself


def attend_by(
    kernel: Literal["xla", "cudnn"],
    queries_BHLC: jax.Array,
    keys_BGSC: jax.Array,
    values_BGSC: jax.Array,
    seen_BLS: jax.Array,
    *,
    cfg: config.LMConfig,
) -> jax.Array:
    """Computes `attend` with ``jax.nn.dot_product_attention``, which does not support a soft cap.

    Args:
        kernel: Implementation that ``jax.nn.dot_product_attention`` uses.
        queries_BHLC: Queries.
        keys_BGSC: Keys.
        values_BGSC: Values.
        seen_BLS: bool, True if query l attends to key s.
        cfg: Architecture; only ``attn_scale`` is used.

    Returns:
        Attention output ``[B,H,L,C]``.
    """
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (queries_BHLC, keys_BGSC, values_BGSC))
    out = jax.nn.dot_product_attention(
        query, key, value, mask=seen_BLS[:, None], scale=cfg.attn_scale, implementation=kernel
    )
    return jnp.swapaxes(out, 1, 2)
