"""Reward models from ranked completions: all pairs of a prompt in one batch element (InstructGPT 3.5, Eq 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import masking, metrics
from rlhf_jax.losses import comparison
from rlhf_jax.train.optim import nonfinite, update
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
    """Score every completion once: ``[B, K]`` float32, or ``[B, K, H]`` from several heads.

    What stands where no completion is means nothing.
    """
    B, K, L = batch.tokens_BKL.shape
    flat = (B * K, L)
    scores = score(params, batch.tokens_BKL.reshape(flat), mask_BL=batch.mask_BKL.reshape(flat))
    return scores.reshape(B, K, *scores.shape[1:]).astype(jnp.float32)


def score_all_packed(packed_scores: Callable[..., jax.Array], params: Any, batch: PackedComparisons) -> jax.Array:
    """:func:`score_all` of packed completions, with ``packed_scores`` as `lm.packed_scores`."""
    return packed_scores(params, batch.tokens_RL, batch.segments_RL, batch.places_BK).astype(jnp.float32)


def make_train_step(
    score: Callable[..., jax.Array],
    *,
    packed_scores: Callable[..., jax.Array] | None = None,
    loss: Callable[..., jax.Array] = comparison.ranking,
    head_of_domain: bool = False,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `types.Comparisons` batch.

    ``score(params, tokens_BL, mask_BL=...) -> [B]``. With ``packed_scores(params, tokens_RL, segments_RL, places_BK)
    -> [B, K]`` the step takes `types.PackedComparisons` as well, packed in as many groups as there are micro-batches,
    and does the same with less padding.

    ``loss(scores_K, ranks_K, where_K=...)`` is that of one prompt, such as `losses.ranking`, `plackett_luce` or
    `best_choice`; it gets the prompt's ``batch.loss_inputs`` by keyword. The batch's loss is the mean over the prompts
    that have a pair to learn from. With ``hyper["domain_weights"]``, a float32 array, it is instead the weighted sum of
    each domain's own mean (Bai 2022, 5.1.2: helpful + lambda harmless), by ``batch.domain_B``.

    A model of several heads scores ``[B, H]``. Each head learns from every prompt by itself (an ensemble; the loss is
    the mean over heads), or with ``head_of_domain`` from the prompts of the domain that has its number.

    ``score`` and ``packed_scores`` get ``join(frozen, state.params)``. Adapters are trained together with a head of
    their own by ``join=lambda base, own: {**lora.attach(base, own["lora"], scale=...), "head": own["head"]}``, and what
    a pattern names by `partition.join`; without a ``join``, ``frozen`` is not used. Nor is ``rng``. ``hyper``:
    ``learning_rate``, ``max_grad_norm`` (infinite for none).
    """

    def scores(params: Any, batch: Comparisons | PackedComparisons) -> jax.Array:
        if isinstance(batch, Comparisons):
            return score_all(score, params, batch)
        if packed_scores is None:
            raise ValueError("the batch is packed, but make_train_step was given no packed_scores")
        if batch.groups != micro_batches:
            raise ValueError(f"the batch was packed in {batch.groups} groups for {micro_batches} micro-batches")
        return score_all_packed(packed_scores, params, batch)

    def heads_of(scores: jax.Array, batch: Comparisons | PackedComparisons) -> jax.Array:
        """``[H, B, K]``: what each head is to learn from; one where there is one, or one that is the prompt's own."""
        if scores.ndim == 2:
            return scores[None]
        if not head_of_domain:
            return jnp.moveaxis(scores, -1, 0)
        own_BH = jax.nn.one_hot(_domains(batch), scores.shape[-1], dtype=bool)
        own_BK = jnp.sum(jnp.where(own_BH[:, None, :], scores, 0.0), axis=-1)
        # A domain without a head scores nothing, and the step is skipped as not finite.
        return jnp.where(jnp.any(own_BH, axis=-1)[:, None], own_BK, jnp.nan)[None]

    def loss_fn(
        frozen: Any, weights_G: Any, params: Any, batch: Comparisons | PackedComparisons, total: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        scores_HBK = heads_of(scores(join(frozen, params), batch), batch)
        ranks_BK, where_BK = batch.ranks_BK, batch.where_BK
        inputs = batch.loss_inputs or {}

        def of_prompt(scores_K: jax.Array, ranks_K: jax.Array, where_K: jax.Array, given: Any) -> jax.Array:
            return loss(scores_K, ranks_K, where_K=where_K, **given)

        def of_head(scores_BK: jax.Array) -> tuple[jax.Array, PairCounts]:
            counts = jax.vmap(count_pairs)(scores_BK, ranks_BK, where_BK)
            return jax.vmap(of_prompt)(scores_BK, ranks_BK, where_BK, inputs), counts

        losses_HB, pairs = jax.vmap(of_head)(scores_HBK)
        losses_B = jnp.mean(losses_HB, axis=0)
        informative_B = jax.vmap(comparison.has_pairs)(ranks_BK, where_BK)
        if weights_G is None:
            loss_sum = masking.masked_sum(losses_B, where=informative_B, axis_name=axis_name)
            value, logged = loss_sum / jnp.maximum(total, 1.0), metrics.Metric(loss_sum, total / micro_batches)
        else:
            mine_GB = _by_domain(informative_B, batch, weights_G.shape[0])
            sums_G = jax.vmap(lambda mine_B: masking.masked_sum(losses_B, where=mine_B, axis_name=axis_name))(mine_GB)
            # A domain without a weight would be left out without a word: the step is skipped as not finite instead.
            lost_B = jnp.any(mine_GB, axis=0) != informative_B
            all_there = masking.masked_count(lost_B, where=lost_B, axis_name=axis_name) == 0
            value = jnp.where(all_there, jnp.sum(weights_G * sums_G / jnp.maximum(total, 1.0)), jnp.nan)
            logged = metrics.Metric(value, jnp.float32(1 / micro_batches))
        logs = {
            "loss": logged,
            "accuracy": metrics.Metric(
                masking.masked_sum(pairs.right, where=True, axis_name=axis_name),
                masking.masked_sum(pairs.total, where=True, axis_name=axis_name),
            ),
            "score": metrics.mean_metric(scores_HBK, where_BK[None], axis_name=axis_name),
            "bad": nonfinite.of_losses(jnp.where(informative_B, losses_B, 0.0)),
        }
        return value, logs

    def train_step(
        state: Any, frozen: Any, hyper: Any, batch: Comparisons | PackedComparisons, rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        del rng
        weights_G = hyper.get("domain_weights")
        informative_B = jax.vmap(comparison.has_pairs)(batch.ranks_BK, batch.where_BK)
        if weights_G is not None:
            informative_B = _by_domain(informative_B, batch, weights_G.shape[0])
        total = masking.masked_count(
            informative_B, where=informative_B, axis=None if weights_G is None else 1, axis_name=axis_name
        ).astype(jnp.float32)
        (value, logs), grads = update.loss_and_grads(
            partial(loss_fn, frozen, weights_G), state.params, batch, total, micro_batches=micro_batches
        )
        state, update_logs = update.apply_gradients(
            state,
            grads,
            learning_rate=hyper["learning_rate"],
            max_grad_norm=hyper["max_grad_norm"],
            axis_name=axis_name,
            loss=value,
        )
        logs |= nonfinite.numbers(logs.pop("bad"), axis_name=axis_name)
        return state, logs | update_logs | {"learning_rate": hyper["learning_rate"]}

    return train_step


def _domains(batch: Comparisons | PackedComparisons) -> jax.Array:
    if batch.domain_B is None:
        raise ValueError(
            "domains have weights or heads of their own, but the batch does not say which prompts are whose"
        )
    return batch.domain_B


def _by_domain(of_B: jax.Array, batch: Comparisons | PackedComparisons, domains: int) -> jax.Array:
    """``[G, B]``: where ``of_B`` holds, each prompt in the row of its domain."""
    return of_B[None, :] & (_domains(batch)[None, :] == jnp.arange(domains)[:, None])
