"""One number a sequence from packed rows, where :mod:`rlhf_jax.data.packing` has put several side by side.

Token-wise functions take packed rows with ``segments_BL``. These turn what is one number a row elsewhere, a score or a
sum over a response, into one a sequence; they are what reward models, DPO and its relatives need. A sequence that is in
no row (segment 0) gets 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking, types
from rlhf_jax.lm import alignment, config, heads, logprobs


def packed_scores(
    params: types.Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    places: types.Places,
    *,
    cfg: config.LMConfig,
) -> jax.Array:
    """The scalar head at the last token of each sequence, float32, in the shape of ``places``; `lm.score` unpacked.

    With H as one more axis at the end where the model has several heads.
    """
    return packed_scores_with(logprobs.apply_fn(cfg), params, tokens_BL, segments_BL, places)


def packed_scores_with(
    apply: types.ApplyFn,
    params: types.Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    places: types.Places,
) -> jax.Array:
    """:func:`packed_scores` of any model whose forward pass knows ``segments_BL``."""
    hidden_BLD = apply.forward(params, tokens_BL, **alignment.reading(None, segments_BL)).hidden_BLD
    made_BL = heads.scalar(params, hidden_BLD)
    made = made_BL[places.row, places.end]
    there = places.segment > 0
    return jnp.where(there if made.ndim == there.ndim else there[..., None], made, 0.0)


def packed_sums(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Sum of ``x_BL`` over each sequence, float32, in the shape of ``places``.

    Of log-probabilities over the tokens of responses (``where_BL`` is then the loss mask) this is what the policy
    and reference arguments of `losses.dpo` are. What stands where ``where_BL`` is False is never read.
    """
    # Each sequence looks through its whole row. Adding every token to its sequence's sum instead would be a scatter,
    # and on a GPU the order in which that adds, and so the last bits, change from run to run.
    mine = (segments_BL[places.row] == places.segment[..., None]) & (places.segment[..., None] > 0)
    if where_BL is not None:
        mine &= where_BL[places.row]
    return masking.masked_sum(x_BL[places.row], where=mine, axis=-1)


def packed_means(
    x_BL: jax.Array, segments_BL: jax.Array, places: types.Places, *, where_BL: jax.Array | None = None
) -> jax.Array:
    """Mean of ``x_BL`` over each sequence: :func:`packed_sums` by the number of tokens, as IPO, ORPO and SimPO want."""
    ones_BL = jnp.ones(x_BL.shape, jnp.float32)
    counts = packed_sums(ones_BL, segments_BL, places, where_BL=where_BL)
    return packed_sums(x_BL, segments_BL, places, where_BL=where_BL) / jnp.maximum(counts, 1.0)
