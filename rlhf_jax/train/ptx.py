"""The pretraining part of PPO-ptx (InstructGPT 3.5, Eq 2): its loss, and what its coefficient amounts to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import aggregation, masking
from rlhf_jax.train import sft
from rlhf_jax.train.minibatches import AxisName
from rlhf_jax.train.ppo_state import Models
from rlhf_jax.types import Params


def ptx_loss(models: Models, policy: Params, rows: sft.TokenBatch, *, axis_name: AxisName = None) -> jax.Array:
    """Mean negative log-probability of the pretraining tokens (InstructGPT Eq 2, second part); per token."""
    if models.token_logprobs is None:
        raise ValueError("Batch.ptx was given, but Models.token_logprobs was not")
    logprobs_BL = sft.batch_logprobs(models.token_logprobs, policy, rows)
    return -masking.masked_mean(logprobs_BL, where=rows.loss_mask_BL, axis_name=axis_name)


def coefficients(
    ptx_coef: jax.Array | float,
    rows: sft.TokenBatch,
    mask_BT: jax.Array,
    *,
    weights_B: jax.Array,
    total: jax.Array,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """``ptx_coef``, a factor of :func:`ptx_loss`, in the two normalisations that a published number may be meant in.

    InstructGPT's 27.8 comes without one. The same gradient, up to a factor of the whole objective, is that of:

    - ``ptx_coef_per_token``: both parts as means over their tokens;
    - ``ptx_coef_per_sequence``: both as means over their sequences of sums over tokens, as Eq 2 has it. It is the
      other one times the mean length of an answer by the mean length of a pretraining row, in tokens that count.

    ``weights_B`` and ``total`` are what a `reductions.Reduction` makes of the answers' ``mask_BT``.
    """
    ones_BT = jnp.ones(mask_BT.shape)
    # What the policy loss would be, were it 1 at every token; in a mean over tokens it is 1.
    scale = aggregation.weighted_sum(ones_BT, weights_B, where=mask_BT, axis_name=axis_name) / total
    per_token = ptx_coef / jnp.maximum(scale, 1e-8)
    lengths = _mean_length(mask_BT, axis_name), _mean_length(rows.loss_mask_BL, axis_name)
    return {"ptx_coef_per_token": per_token, "ptx_coef_per_sequence": per_token * lengths[0] / lengths[1]}


def _mean_length(mask: jax.Array, axis_name: AxisName) -> jax.Array:
    """Of the rows that are not empty; at least 1."""
    tokens, rows = (masking.masked_count(x, where=x, axis_name=axis_name) for x in (mask, jnp.any(mask, axis=1)))
    return jnp.maximum(tokens, 1) / jnp.maximum(rows, 1)
