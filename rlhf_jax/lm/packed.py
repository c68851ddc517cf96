"""Scores, sums and means of the sequences in packed rows (see :mod:`rlhf_jax.data.packing`).

Functions that return one number per token, such as `lm.token_logprobs`, accept packed rows if they are passed
``segments_BL``. The functions in this module return one number per sequence, as reward models and DPO require. For
sequences that are not in any row (segment 0 in ``places``), the number is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking, types
from rlhf_jax.lm import alignment, config, heads


def packed_scores(
    params: types.Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    places: types.Places,
    *,
    cfg: config.LMConfig | types.ApplyFn,
) -> jax.Array:
    """Returns the score of each sequence, as `lm.score` does for rows that are not packed.

    Args:
        params: Parameters of the reward model.
        tokens_BL: int32 packed rows.
        segments_BL: int32 segment ids, counted from 1; 0 at padding.
        places: Row, segment and last column of each sequence.
        cfg: The model, as an `LMConfig` or an `ApplyFn`. The forward pass of an `ApplyFn` must accept ``segments_BL``.

    Returns:
        float32 with the shape of ``places.row`` and, if there are several heads, an additional last axis H.
    """
    forward_pass = alignment.apply_fn(cfg).forward(params, tokens_BL, **alignment.forward_masks(None, segments_BL))
    scores = heads.scalar(params, forward_pass.hidden_BLD)[places.row, places.end]
    exists = places.segment > 0
    return jnp.where(exists if scores.ndim == exists.ndim else exists[..., None], scores, 0.0)


def packed_sums(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Returns the sum of ``x_BL`` over each sequence.

    For example, `losses.dpo` requires the summed log-probabilities of responses.

    Args:
        x_BL: One number per token.
        segments_BL: int32 segment ids, counted from 1; 0 at padding.
        places: Row, segment and last column of each sequence.
        where_BL: bool, True at the tokens to sum over, such as response tokens; by default, all tokens.

    Returns:
        float32 with the shape of ``places.row``.
    """
    # Each sum runs over a whole row with a mask. A scatter-add by sequence would be non-deterministic on a GPU.
    mine = (segments_BL[places.row] == places.segment[..., None]) & (places.segment[..., None] > 0)
    if where_BL is not None:
        mine &= where_BL[places.row]
    return masking.masked_sum(x_BL[places.row], where=mine, axis=-1)


def packed_means(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Returns the mean of ``x_BL`` over each sequence, as IPO, ORPO and SimPO require.

    Args:
        x_BL: One number per token.
        segments_BL: int32 segment ids, counted from 1; 0 at padding.
        places: Row, segment and last column of each sequence.
        where_BL: bool, True at the tokens to average over; by default, all tokens.

    Returns:
        float32 with the shape of ``places.row``.
    """
    ones_BL = jnp.ones(x_BL.shape, jnp.float32)
    counts = packed_sums(ones_BL, segments_BL, places, where_BL=where_BL)
    return packed_sums(x_BL, segments_BL, places, where_BL=where_BL) / jnp.maximum(counts, 1.0)
