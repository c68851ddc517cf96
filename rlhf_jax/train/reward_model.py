"""Reward models from ranked completions: all pairs of a prompt in one batch element (InstructGPT 3.5, Eq 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import metrics, reduce
from rlhf_jax.losses import preference
from rlhf_jax.train import step
from rlhf_jax.types import Comparisons, PackedComparisons


class PairCounts(NamedTuple):
    """Over all pairs of answers to one prompt that a labeler told apart."""

    right: jax.Array
    """Pairs in which the preferred answer has the higher score."""
    total: jax.Array


def count_pairs(scores_K: jax.Array, ranks_K: jax.Array, where_K: jax.Array) -> PairCounts:
    """Count the pairs of one prompt that ``scores_K`` orders as ``ranks_K`` does; equal scores count a half."""
    better_KK = (ranks_K[:, None] < ranks_K[None, :]) & where_K[:, None] & where_K[None, :]
    gap_KK = scores_K[:, None] - scores_K[None, :]
    right_KK = jnp.where(gap_KK > 0, 1.0, jnp.where(gap_KK == 0, 0.5, 0.0))
    return PairCounts(jnp.sum(jnp.where(better_KK, right_KK, 0.0)), jnp.sum(better_KK, dtype=jnp.float32))


def score_all(score: Callable[..., jax.Array], params: Any, batch: Comparisons) -> jax.Array:
    """Score every completion once: ``[B, K]`` float32; what stands where no completion is means nothing."""
    B, K, L = batch.tokens_BKL.shape
    flat = (B * K, L)
    scores = score(params, batch.tokens_BKL.reshape(flat), mask_BL=batch.mask_BKL.reshape(flat))
    return scores.reshape(B, K).astype(jnp.float32)


def score_all_packed(packed_scores: Callable[..., jax.Array], params: Any, batch: PackedComparisons) -> jax.Array:
    """:func:`score_all` of packed completions, with ``packed_scores`` as `lm.packed_scores`."""
    return packed_scores(params, batch.tokens_RL, batch.segments_RL, batch.places_BK).astype(jnp.float32)


def make_train_step(
    score: Callable[..., jax.Array],
    *,
    packed_scores: Callable[..., jax.Array] | None = None,
    loss: Callable[..., jax.Array] = preference.ranking,
    join: Callable[[Any, Any], Any] = step.all_trained,
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `types.Comparisons` batch.

    ``score(params, tokens_BL, mask_BL=...) -> [B]``. With ``packed_scores(params, tokens_RL, segments_RL, places_BK)
    -> [B, K]`` the step takes `types.PackedComparisons` as well, packed in as many groups as there are micro-batches,
    and does the same with less padding. ``loss(scores_K, ranks_K, where_K=...)`` is that of one prompt; the batch's
    loss is the mean over the prompts that have a pair to learn from. ``score`` and ``packed_scores`` get
    ``join(frozen, state.params)``. Adapters are trained together with a head of their own by
    ``join=lambda base, own: {**lora.attach(base, own["lora"], scale=...), "head": own["head"]}``; without a ``join``,
    ``frozen`` is not used. Nor is ``rng``. ``hyper``: ``learning_rate``, ``max_grad_norm`` (infinite for none).
    """

    def scores(params: Any, batch: Comparisons | PackedComparisons) -> jax.Array:
        if isinstance(batch, Comparisons):
            return score_all(score, params, batch)
        if packed_scores is None:
            raise ValueError("the batch is packed, but make_train_step was given no packed_scores")
        if batch.groups != micro_batches:
            raise ValueError(f"the batch was packed in {batch.groups} groups for {micro_batches} micro-batches")
        return score_all_packed(packed_scores, params, batch)

    def loss_fn(
        frozen: Any, params: Any, batch: Comparisons | PackedComparisons, total: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        scores_BK = scores(join(frozen, params), batch)
        losses_B = jax.vmap(lambda s, r, w: loss(s, r, where_K=w))(scores_BK, batch.ranks_BK, batch.where_BK)
        informative_B = jax.vmap(preference.has_pairs)(batch.ranks_BK, batch.where_BK)
        loss_sum = reduce.masked_sum(losses_B, where=informative_B, axis_name=axis_name)
        pairs = jax.vmap(count_pairs)(scores_BK, batch.ranks_BK, batch.where_BK)
        logs = {
            "loss": metrics.Metric(loss_sum, total / micro_batches),
            "accuracy": metrics.Metric(pairs.right.sum(), pairs.total.sum()),
            "score": metrics.mean_metric(scores_BK, batch.where_BK),
        }
        return loss_sum / jnp.maximum(total, 1.0), logs

    def train_step(
        state: Any, frozen: Any, hyper: Any, batch: Comparisons | PackedComparisons, rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        del rng
        informative_B = jax.vmap(preference.has_pairs)(batch.ranks_BK, batch.where_BK)
        total = reduce.masked_count(informative_B, where=informative_B, axis_name=axis_name).astype(jnp.float32)
        (value, logs), grads = step.loss_and_grads(
            partial(loss_fn, frozen), state.params, batch, total, micro_batches=micro_batches
        )
        state, update_logs = step.apply_gradients(
            state,
            grads,
            learning_rate=hyper["learning_rate"],
            max_grad_norm=hyper["max_grad_norm"],
            axis_name=axis_name,
            loss=value,
        )
        return state, logs | update_logs | {"learning_rate": hyper["learning_rate"]}

    return train_step
