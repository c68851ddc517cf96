"""Metrics of PPO's rollouts and updates."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import kl, masking, metrics
from rlhf_jax.train.estimators import Scored
from rlhf_jax.train.minibatches import AxisName
from rlhf_jax.train.optim import nonfinite
from rlhf_jax.types import Rollout


def rollout_metrics(
    rollout: Rollout,
    raw_scores_B: jax.Array,
    entropy_BT: jax.Array,
    scored: Scored,
    returns_BT: jax.Array | None,
    *,
    axis_name: AxisName = None,
) -> dict[str, Any]:
    """Returns the metrics of a scored rollout, described in :func:`rlhf_jax.train.ppo.make_train_step`.

    Args:
        rollout: The sampled responses.
        raw_scores_B: Scores as `ppo.Models.score` returned them.
        entropy_BT: Entropy of the policy at each response token, in nats.
        scored: The batch that the advantage estimator received.
        returns_BT: Targets of the critic in units of reward; None without a critic.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        A dict of float32 scalars and `metrics.Metric`.
    """
    mask_BT, total = scored.mask_BT, partial(masking.masked_sum, axis_name=axis_name)
    mean = partial(metrics.mean_metric, axis_name=axis_name)
    kl_B = masking.masked_sum(kl.k1(scored.logprobs_BT, scored.reference_BT), where=mask_BT, axis=-1)
    gap_BT = jnp.where(mask_BT, rollout.logprobs_BT - scored.logprobs_BT, 0.0)
    weights_BT = masking.masked_fill(kl.ratio(scored.logprobs_BT, rollout.logprobs_BT), where=mask_BT)
    tokens = total(mask_BT, where=True)
    logs = {
        "reward": mean(raw_scores_B),
        "reward_std": jnp.sqrt(masking.masked_var(raw_scores_B, where=True, axis_name=axis_name)),
        "kl": mean(kl_B),
        "kl_coef": scored.kl_coef,
        "return": mean(scored.scores_B - scored.kl_coef * kl_B),
        "length": mean(rollout.lengths_B),
        "stopped": mean(rollout.finish_B == 1),
        "entropy": mean(entropy_BT, mask_BT),
        "sampler_gap": masking.global_max(jnp.abs(gap_BT), axis_name=axis_name),
        "sampler_gap_mean": mean(jnp.abs(gap_BT), mask_BT),
        "sampler_ess": jnp.square(total(weights_BT, where=True))
        / jnp.maximum(total(jnp.square(weights_BT), where=True) * tokens, 1e-8),
    }
    bad = nonfinite.bad_token_rows(scored.logprobs_BT, scored.reference_BT, scored.values_BT, where_BT=mask_BT)
    logs |= nonfinite.row_metrics(bad.union(nonfinite.bad_loss_rows(raw_scores_B)), axis_name=axis_name)
    if scored.values_BT is not None and returns_BT is not None:
        variance = masking.masked_var(returns_BT, where=mask_BT, axis_name=axis_name)
        error = masking.masked_mean(jnp.square(scored.values_BT - returns_BT), where=mask_BT, axis_name=axis_name)
        logs["explained_variance"] = 1.0 - error / jnp.maximum(variance, 1e-8)
        logs |= {"target": mean(returns_BT, mask_BT), "target_square": mean(jnp.square(returns_BT), mask_BT)}
    return logs


def merge_micro_batches(logs_M: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the metrics of a minibatch: sums or, for two metrics, maxima over its micro-batches (axis 0)."""
    maxima = ("ratio_max", "ratio_error")
    return {name: jnp.max(x_M) if name in maxima else jnp.sum(x_M) for name, x_M in logs_M.items()}


def merge_updates(logs_U: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the metrics of an iteration from those of its U updates, stacked on axis 0.

    They are means, except ``ratio_max`` (maximum), ``skipped`` (count), ``bad_update`` (index of the first skipped
    update, or -1 if there is none) and ``first_ratio_error`` (``ratio_error`` of the first update).
    """
    logs = {name: jnp.mean(x_U) for name, x_U in logs_U.items() if name != "ratio_error"}
    skipped_U = logs_U["skipped"]
    return logs | {
        "ratio_max": jnp.max(logs_U["ratio_max"]),
        "first_ratio_error": logs_U["ratio_error"][0],
        "skipped": jnp.sum(skipped_U),
        "bad_update": jnp.where(jnp.any(skipped_U > 0), jnp.argmax(skipped_U), -1).astype(jnp.float32),
    }
