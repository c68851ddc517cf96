"""The pretraining term of PPO-ptx (InstructGPT, Eq 2): its loss, and its coefficient in two normalisations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import aggregation, masking
from rlhf_jax.train import sft
from rlhf_jax.train.minibatches import AxisName
from rlhf_jax.train.ppo_state import Models
from rlhf_jax.types import Params


def ptx_loss(models: Models, policy: Params, rows: sft.TokenBatch, *, axis_name: AxisName = None) -> jax.Array:
    """Returns the mean negative log-probability of the pretraining tokens (InstructGPT Eq 2, second term).

    Args:
        models: The model functions that PPO calls; only ``token_logprobs`` is used here.
        policy: Parameters of the policy.
        rows: Pretraining rows; ``loss_mask_BL`` selects the tokens.
        axis_name: Name of the mapped axis over which the rows are split; None if they are not split.

    Returns:
        A float32 scalar, in nats per token.

    Raises:
        ValueError: If ``models.token_logprobs`` is None.
    """
    if models.token_logprobs is None:
        raise ValueError("Batch.ptx needs Models.token_logprobs, which is None")
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
    """Converts ``ptx_coef``, the weight of :func:`ptx_loss`, to two common normalisations of the losses.

    InstructGPT does not state the normalisation of its coefficient 27.8. Each returned coefficient belongs to one of
    the normalisations below. An objective with that normalisation and coefficient has the same gradient as `ppo.update`
    with ``ptx_coef``, up to a constant factor. This requires that all elements of ``weights_B`` are equal, as with
    every reduction except `aggregation.sequence_mean`.

    - ``ptx_coef_per_token`` is for an objective in which both terms are means over their tokens.
    - ``ptx_coef_per_sequence`` is for an objective in which both terms are means over sequences of sums over tokens, as
      in Eq 2. It equals ``ptx_coef_per_token`` times the mean length of a response, divided by the mean length of a
      pretraining row.

    Args:
        ptx_coef: Weight gamma of the pretraining loss.
        rows: Pretraining rows.
        mask_BT: bool, the response tokens.
        weights_B: Weight of the tokens of each response, from an `aggregation.Reduction` applied to ``mask_BT``.
        total: Denominator from the same reduction.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        A dict with both coefficients, float32 scalars.
    """
    ones_BT = jnp.ones(mask_BT.shape)
    # The value of the reduced loss if every token had loss 1; exactly 1 if the reduction is a mean over tokens.
    scale = aggregation.weighted_sum(ones_BT, weights_B, where=mask_BT, axis_name=axis_name) / total
    per_token = ptx_coef / jnp.maximum(scale, 1e-8)
    lengths = _mean_length(mask_BT, axis_name), _mean_length(rows.loss_mask_BL, axis_name)
    return {"ptx_coef_per_token": per_token, "ptx_coef_per_sequence": per_token * lengths[0] / lengths[1]}


def _mean_length(mask: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the mean number of selected tokens over the rows that have any; at least 1."""
    tokens, rows = (masking.masked_count(x, where=x, axis_name=axis_name) for x in (mask, jnp.any(mask, axis=1)))
    return jnp.maximum(tokens, 1) / jnp.maximum(rows, 1)
