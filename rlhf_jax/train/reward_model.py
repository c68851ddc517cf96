"""Training of reward models on ranked completions; a batch element has all pairs of a prompt (InstructGPT Eq 1)."""

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
    """Counts over the pairs of completions of a prompt that differ in rank."""

    right: jax.Array
    """Number of pairs in which the preferred completion has the higher score; equal scores count one half."""

    total: jax.Array
    """Number of pairs with different ranks."""


def count_pairs(scores_K: jax.Array, ranks_K: jax.Array, where_K: jax.Array) -> PairCounts:
    """Counts the pairs of completions in ``where_K`` that ``scores_K`` orders as ``ranks_K`` does; rank 1 is the best.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.train import reward_model
        >>> counts = reward_model.count_pairs(jnp.array([2.0, 1.0, 3.0]), jnp.array([1, 2, 3]), jnp.ones(3, bool))
        >>> print(float(counts.right), float(counts.total))
        1.0 3.0
    """
    better_KK = (ranks_K[:, None] < ranks_K[None, :]) & where_K[:, None] & where_K[None, :]
    gap_KK = scores_K[:, None] - scores_K[None, :]
    right_KK = jnp.where(gap_KK > 0, 1.0, jnp.where(gap_KK == 0, 0.5, 0.0))
    return PairCounts(jnp.sum(jnp.where(better_KK, right_KK, 0.0)), jnp.sum(better_KK, dtype=jnp.float32))


def score_all(score: Callable[..., jax.Array], params: Any, batch: Comparisons) -> jax.Array:
    """Returns the score of every completion, ``[B, K]`` float32, or ``[B, K, H]`` for a model with H heads.

    Entries without a completion have arbitrary values.
    """
    B, K, L = batch.tokens_BKL.shape
    flat = (B * K, L)
    scores = score(params, batch.tokens_BKL.reshape(flat), mask_BL=batch.mask_BKL.reshape(flat))
    return scores.reshape(B, K, *scores.shape[1:]).astype(jnp.float32)


def score_all_packed(packed_scores: Callable[..., jax.Array], params: Any, batch: PackedComparisons) -> jax.Array:
    """Returns the scores of packed completions; ``packed_scores`` is described in :func:`make_train_step`."""
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
    """Returns ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `types.Comparisons` batch.

    The loss is the mean over the prompts that have at least one pair with different ranks. By default, the loss of a
    prompt is the mean of ``-log sigmoid(r_w - r_l)`` over its pairs (InstructGPT Eq 1). With
    ``hyper["domain_weights"]``, the loss is a weighted sum of the mean losses of the domains (Bai 2022, HH-RLHF,
    section 5.1.2), and ``batch.domain_B`` holds the domain of each prompt.

    Args:
        score: ``(params, tokens_BL, mask_BL=...) -> [B]``, such as `lm.score`. For a model with H heads, it returns
            ``[B, H]``. By default, the heads form an ensemble: each learns from every prompt, and the loss is the mean
            over heads.
        packed_scores: ``(params, tokens_RL, segments_RL, places_BK) -> [B, K]``, such as `lm.packed_scores`. For a
            model with H heads, it returns ``[B, K, H]``. If given, the step also accepts `types.PackedComparisons`,
            whose number of groups must equal ``micro_batches``, and computes the same result with less padding.
        loss: ``(scores_K, ranks_K, where_K=...) -> loss`` for one prompt, such as `losses.ranking`, `plackett_luce` or
            `best_choice`. The prompt's ``batch.loss_inputs`` are passed as further keyword arguments.
        head_of_domain: Whether head h learns only from the prompts of domain h.
        join: ``(frozen, params) -> params`` builds the parameters that ``score`` and ``packed_scores`` receive. By
            default all parameters are trained. Use `partition.join` to train only those that match a pattern, or
            ``partial(lm.lora.attach, scale=...)`` to train adapters together with a head (``{**adapters, "head":
            head}``), which `lm.peft.save` writes.
        micro_batches: Number of parts into which the batch is split to save memory. The update does not depend on it.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        A step. ``frozen`` is the first argument of ``join``; ``hyper`` is a dict with ``learning_rate``,
        ``max_grad_norm`` (infinity for no clipping) and optionally ``domain_weights``, a float32 array with one weight
        per domain; ``rng`` is not used. Metrics:

        - ``loss``: the loss, in nats per pair for the default loss.
        - ``accuracy``: share of the pairs with different ranks in which the preferred completion has the higher score;
          equal scores count one half.
        - ``score``: mean score of the completions.
        - ``grad_norm``: l2 norm of the gradient before clipping.
        - ``learning_rate``: learning rate of the step.
        - ``skipped``: 1 if the update was skipped, because it was not finite or no prompt of the batch has a pair with
          different ranks and a domain weight above 0 (``empty_batch`` is then 1), else 0.
        - ``bad_rows``, ``bad_row``: number of prompts with a non-finite loss; index of the first, or -1 for none.

        The step raises ``ValueError`` for a packed batch if ``packed_scores`` is None or the number of groups differs
        from ``micro_batches``, and for a batch without ``domain_B`` if domain weights or ``head_of_domain`` are used.
    """

    def scores(params: Any, batch: Comparisons | PackedComparisons) -> jax.Array:
        if isinstance(batch, Comparisons):
            return score_all(score, params, batch)
        if packed_scores is None:
            raise ValueError("the batch is packed; pass packed_scores to make_train_step")
        update.check_groups(batch.groups, micro_batches)
        return score_all_packed(packed_scores, params, batch)

    def scores_of_heads(scores: jax.Array, batch: Comparisons | PackedComparisons) -> jax.Array:
        """Returns the scores from which each head learns, ``[H, B, K]``; H is 1 with ``head_of_domain``."""
        if scores.ndim == 2:
            return scores[None]
        if not head_of_domain:
            return jnp.moveaxis(scores, -1, 0)
        of_head_BH = jax.nn.one_hot(_domains(batch), scores.shape[-1], dtype=bool)
        domain_scores_BK = jnp.sum(jnp.where(of_head_BH[:, None, :], scores, 0.0), axis=-1)
        # Prompts of a domain without a head get NaN scores, so the step is skipped.
        return jnp.where(jnp.any(of_head_BH, axis=-1)[:, None], domain_scores_BK, jnp.nan)[None]

    def loss_fn(
        frozen: Any, weights_G: Any, params: Any, batch: Comparisons | PackedComparisons, total: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        scores_HBK = scores_of_heads(scores(join(frozen, params), batch), batch)
        ranks_BK, where_BK = batch.ranks_BK, batch.where_BK
        inputs = batch.loss_inputs or {}

        def prompt_loss(scores_K: jax.Array, ranks_K: jax.Array, where_K: jax.Array, extra: Any) -> jax.Array:
            return loss(scores_K, ranks_K, where_K=where_K, **extra)

        def head_losses(scores_BK: jax.Array) -> tuple[jax.Array, PairCounts]:
            counts = jax.vmap(count_pairs)(scores_BK, ranks_BK, where_BK)
            return jax.vmap(prompt_loss)(scores_BK, ranks_BK, where_BK, inputs), counts

        losses_HB, pairs = jax.vmap(head_losses)(scores_HBK)
        losses_B = jnp.mean(losses_HB, axis=0)
        informative_B = jax.vmap(comparison.has_pairs)(ranks_BK, where_BK)
        if weights_G is None:
            loss_sum = masking.masked_sum(losses_B, where=informative_B, axis_name=axis_name)
            value, logged = loss_sum / jnp.maximum(total, 1.0), metrics.Metric(loss_sum, total / micro_batches)
        else:
            where_GB = _by_domain(informative_B, batch, weights_G.shape[0])
            masked = partial(masking.masked_sum, losses_B, axis_name=axis_name)
            sums_G = jax.vmap(lambda where_B: masked(where=where_B))(where_GB)
            # A domain without a weight makes the loss NaN, so that the step is skipped instead of silently ignoring the
            # prompts of the domain.
            ignored_B = jnp.any(where_GB, axis=0) != informative_B
            complete = masking.masked_count(ignored_B, where=ignored_B, axis_name=axis_name) == 0
            value = jnp.where(complete, jnp.sum(weights_G * sums_G / jnp.maximum(total, 1.0)), jnp.nan)
            logged = metrics.Metric(value, jnp.float32(1 / micro_batches))
        logs = {
            "loss": logged,
            "accuracy": metrics.Metric(
                masking.masked_sum(pairs.right, where=True, axis_name=axis_name),
                masking.masked_sum(pairs.total, where=True, axis_name=axis_name),
            ),
            "score": metrics.mean_metric(scores_HBK, where_BK[None], axis_name=axis_name),
            "bad": nonfinite.bad_loss_rows(jnp.where(informative_B, losses_B, 0.0)),
        }
        return value, logs

    def train_step(
        state: Any, frozen: Any, hyper: Any, batch: Comparisons | PackedComparisons, rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        del rng
        weights_G = hyper.get("domain_weights")
        informative_B = jax.vmap(comparison.has_pairs)(batch.ranks_BK, batch.where_BK)
        learnt_B = informative_B
        if weights_G is not None:
            informative_B = _by_domain(informative_B, batch, weights_G.shape[0])
            # Prompts of a domain that has no weight count, because they make the loss NaN.
            learnt_B &= ~jnp.any(informative_B & (weights_G == 0)[:, None], axis=0)
        total = masking.masked_count(
            informative_B, where=informative_B, axis=None if weights_G is None else 1, axis_name=axis_name
        ).astype(jnp.float32)
        return update.gradient_step(
            state,
            partial(loss_fn, frozen, weights_G),
            batch,
            total,
            learning_rate=hyper["learning_rate"],
            max_grad_norm=hyper["max_grad_norm"],
            micro_batches=micro_batches,
            axis_name=axis_name,
            empty=masking.masked_count(learnt_B, where=learnt_B, axis_name=axis_name) == 0,
        )

    return train_step


def _domains(batch: Comparisons | PackedComparisons) -> jax.Array:
    if batch.domain_B is None:
        raise ValueError(
            "domain_weights and head_of_domain need the domain of each prompt: set Comparisons.domain_B, which is None"
        )
    return batch.domain_B


def _by_domain(where_B: jax.Array, batch: Comparisons | PackedComparisons, domains: int) -> jax.Array:
    """Returns ``where_B`` by domain, ``[G, B]`` bool: row g selects only prompts of domain g."""
    return where_B[None, :] & (_domains(batch)[None, :] == jnp.arange(domains)[:, None])
