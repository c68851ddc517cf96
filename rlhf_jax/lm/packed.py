"""One number per sequence from packed rows, which hold several sequences each (see :mod:`rlhf_jax.data.packing`).

Token-wise functions take packed rows with ``segments_BL``. The functions here return a score, a sum or a mean for each
sequence, as reward models and DPO need them. A sequence that is in no row (segment 0) gets 0.
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
    """Returns the scalar head at the last token of each sequence: `lm.score` for packed rows.

    Args:
        params: Parameters of the reward model.
        tokens_BL: int32 packed rows.
        segments_BL: int32, the sequence that each token belongs to, from 1; 0 at padding.
        places: Row, segment and last column of each sequence.
        cfg: The model; the forward pass of an `ApplyFn` must accept ``segments_BL``.

    Returns:
        float32 in the shape of ``places``, with a last axis H for several heads; 0 for a sequence that is in no row.
    """
    forward_pass = alignment.apply_fn(cfg).forward(params, tokens_BL, **alignment.forward_masks(None, segments_BL))
    scores = heads.scalar(params, forward_pass.hidden_BLD)[places.row, places.end]
    exists = places.segment > 0
    return jnp.where(exists if scores.ndim == exists.ndim else exists[..., None], scores, 0.0)


def packed_sums(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Returns the sum of ``x_BL`` over each sequence.

    Summed log-probabilities of responses are the arguments of `losses.dpo`.

    Args:
        x_BL: One number per token.
        segments_BL: int32, the sequence that each token belongs to, from 1; 0 at padding.
        places: Row, segment and last column of each sequence.
        where_BL: bool, the tokens to sum over, such as response tokens; by default all.

    Returns:
        float32 in the shape of ``places``.
    """
    # Each sequence sums over its whole row. A scatter-add by sequence would be non-deterministic on a GPU.
    mine = (segments_BL[places.row] == places.segment[..., None]) & (places.segment[..., None] > 0)
    if where_BL is not None:
        mine &= where_BL[places.row]
    return masking.masked_sum(x_BL[places.row], where=mine, axis=-1)


def packed_means(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Returns the mean of ``x_BL`` over each sequence, as IPO, ORPO and SimPO need it.

    Args:
        x_BL: As in `packed_sums`, like all arguments below.
        segments_BL: int32, the sequence that each token belongs to.
        places: Row, segment and last column of each sequence.
        where_BL: bool, the tokens to average over.

    Returns:
        float32 in the shape of ``places``.
    """
    ones_BL = jnp.ones(x_BL.shape, jnp.float32)
    counts = packed_sums(ones_BL, segments_BL, places, where_BL=where_BL)
    return packed_sums(x_BL, segments_BL, places, where_BL=where_BL) / jnp.maximum(counts, 1.0)
