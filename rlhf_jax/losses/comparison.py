"""Losses for reward models trained on comparisons.

`pairwise` and `reward_centering` accept arrays of the same shape and return an unreduced float32 array of that shape.
`ranking`, `plackett_luce`, `best_choice` and `best_of_n_choice` operate on the completions of *one* prompt and return a
scalar; apply ``jax.vmap`` for a batch of prompts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking

Scalar = float | jax.Array


def pairwise(chosen: Scalar, rejected: Scalar, *, margin: Scalar = 0.0, target: Scalar = 1.0) -> jax.Array:
    """Computes the Bradley-Terry loss of pairs of scores, ``t softplus(m - d) + (1 - t) softplus(m + d)``.

    Here ``d = chosen - rejected``, ``m`` is the margin and ``t`` the target. With t = 1 and m = 0, the loss is
    ``-log sigmoid(d)`` (Stiennon 2020, section 3.4).

    Args:
        chosen: Scores of the preferred responses, of any shape.
        rejected: Scores of the other responses, of the same shape.
        margin: Amount by which the preferred score should be higher; a scalar or one value per pair.
        target: Probability that the preferred response is better; a scalar or one value per pair. For label smoothing
            ``e``, pass ``1 - e``; for an AI judge, pass its soft label (Bai 2022, Constitutional AI, section 4.1).

    Returns:
        The unreduced loss, with the shape of the scores.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> chosen, rejected = jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0])
        >>> loss_B = losses.pairwise(chosen, rejected)
        >>> print([round(float(x), 4) for x in loss_B])
        [0.3133, 0.6931]
    """
    masking.check_same_shape(chosen=chosen, rejected=rejected, margin=margin, target=target)
    difference = masking.as_float32(chosen) - masking.as_float32(rejected)
    return target * jax.nn.softplus(margin - difference) + (1.0 - target) * jax.nn.softplus(margin + difference)


def reward_centering(chosen: Scalar, rejected: Scalar, *, coef: Scalar) -> jax.Array:
    """Returns ``coef * (chosen + rejected)^2``, which keeps scores near 0 (Eisenstein 2023, who use ``coef=0.01``)."""
    masking.check_same_shape(chosen=chosen, rejected=rejected)
    return coef * jnp.square(masking.as_float32(chosen) + masking.as_float32(rejected))


def ranking(
    scores_K: jax.Array,
    ranks_K: jax.Array,
    *,
    where_K: jax.Array | None = None,
    ties_in_divisor: bool = True,
    margin: Scalar = 0.0,
    target: Scalar = 1.0,
    centering: Scalar = 0.0,
) -> jax.Array:
    """Computes InstructGPT's ranking loss (Eq 1) of one prompt: the mean of ``softplus(worse - better)`` over pairs.

    All C(K, 2) pairs of a prompt belong in one batch element. In InstructGPT, a model trained on them as independent,
    shuffled rows overfitted within one epoch. For two untied completions, the loss equals `pairwise`.

    Args:
        scores_K: Scores of the completions.
        ranks_K: Integer ranks; 1 is best. Pairs of tied completions contribute no loss.
        where_K: True for completions that exist; None if all of them do. Other entries are ignored.
        ties_in_divisor: If True, divide by C(n, 2) for n existing completions, as in the paper's equation. If False,
            divide by the number of pairs that are not tied.
        margin: Margin of every pair, as in `pairwise`; a scalar.
        target: Probability that the better-ranked completion of a pair is better, as in `pairwise`; a scalar.
        centering: Coefficient of the `reward_centering` term added to each pair; a scalar.

    Returns:
        A scalar; 0 with zero gradient if no pair contributes. Exclude such prompts from a batch mean:
        ``masked_mean(vmap(ranking)(scores, ranks), where=vmap(has_pairs)(ranks))``.

    Raises:
        ValueError: If an array does not have rank 1, or the lengths differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> scores_K, ranks_K = jnp.array([2.0, 0.5, 1.0]), jnp.array([1, 3, 2])
        >>> print(round(float(losses.ranking(scores_K, ranks_K)), 4))
        0.3296
    """
    better_KK = _better(scores_K, ranks_K, where_K)
    scores_K = masking.as_float32(scores_K)
    # Mask both before and after softplus, because NaN times a zero cotangent is NaN.
    lead_KK = jnp.where(better_KK, scores_K[:, None] - scores_K[None, :], 0.0)
    loss_KK = pairwise(lead_KK, jnp.zeros_like(lead_KK), margin=margin, target=target)
    total = jnp.sum(jnp.where(better_KK, loss_KK, 0.0))
    # If the coefficient is a Python 0, the compiled program does not contain the term.
    if not (isinstance(centering, float | int) and centering == 0):
        sums_KK = jnp.where(better_KK, scores_K[:, None] + scores_K[None, :], 0.0)
        total += jnp.sum(reward_centering(sums_KK, jnp.zeros_like(sums_KK), coef=centering))
    if ties_in_divisor:
        n = scores_K.shape[0] if where_K is None else jnp.sum(where_K.astype(bool))
        pairs = n * (n - 1) // 2
    else:
        pairs = jnp.sum(better_KK)
    return total / jnp.maximum(pairs, 1)


def has_pairs(ranks_K: jax.Array, where_K: jax.Array | None = None) -> jax.Array:
    """Returns a boolean scalar: whether any two existing completions of a prompt differ in rank."""
    return jnp.any(_better(ranks_K, ranks_K, where_K))


def plackett_luce(scores_K: jax.Array, ranks_K: jax.Array, *, where_K: jax.Array | None = None) -> jax.Array:
    """Computes the negative log-likelihood of a full ranking of one prompt's completions (Plackett 1975).

    For scores s, the loss is ``sum_i (logsumexp_j s_j - s_i)``; j runs over all completions not ranked better than i.
    Each of several tied completions is therefore included in the sums of the others (Breslow's rule). For two untied
    completions, the loss equals `pairwise`.

    Args:
        scores_K: Scores of the completions.
        ranks_K: Integer ranks; 1 is best.
        where_K: True for completions that exist; None if all of them do.

    Returns:
        A scalar, summed over the completions.

    Raises:
        ValueError: If an array does not have rank 1, or the lengths differ.
    """
    where_K = _valid(scores_K, where_K, ranks_K)
    scores_K = masking.masked_fill(scores_K, where=where_K)
    remaining_KK = (ranks_K[None, :] >= ranks_K[:, None]) & where_K[None, :]
    # The row of a missing completion contains only that completion, so that the logsumexp is finite.
    remaining_KK = remaining_KK | jnp.eye(scores_K.shape[0], dtype=bool)
    remaining_scores_KK = jnp.where(remaining_KK, scores_K[None, :], -jnp.inf)
    return masking.masked_sum(jax.nn.logsumexp(remaining_scores_KK, axis=-1) - scores_K, where=where_K)


def best_of_n_choice(scores_K: jax.Array, choice: jax.Array | int, *, where_K: jax.Array | None = None) -> jax.Array:
    """Computes ``logsumexp(s) - s_choice``, the softmax cross-entropy of one choice (Ziegler 2019, K = 4).

    Args:
        scores_K: Scores of the completions.
        choice: Index of the preferred completion, an integer scalar.
        where_K: True for completions that exist; None if all of them do.

    Returns:
        A scalar; NaN if ``choice`` is out of range or refers to a completion that does not exist.

    Raises:
        ValueError: If an array does not have rank 1, the lengths differ, or ``choice`` is not a scalar.
    """
    masking.check_rank(0, choice=choice)
    where_K = _valid(scores_K, where_K)
    scores_K = masking.as_float32(scores_K)
    chosen_K = (jnp.arange(scores_K.shape[0]) == choice) & where_K
    chosen = jnp.sum(jnp.where(chosen_K, scores_K, 0.0))
    valid_scores_K = jnp.where(where_K | ~jnp.any(where_K), jnp.where(where_K, scores_K, 0.0), -jnp.inf)
    return jnp.where(jnp.any(chosen_K), jax.nn.logsumexp(valid_scores_K) - chosen, jnp.nan)


def best_choice(scores_K: jax.Array, ranks_K: jax.Array, *, where_K: jax.Array | None = None) -> jax.Array:
    """Computes `best_of_n_choice` from ranks: ``-log`` of the softmax probability of the best completion.

    If several completions share the best rank, their probabilities are added.

    Args:
        scores_K: Scores of the completions.
        ranks_K: Integer ranks; 1 is best. Only the set of best completions matters.
        where_K: True for completions that exist; None if all of them do.

    Returns:
        A scalar; 0 with zero gradient if all completions are tied or none exists.

    Raises:
        ValueError: If an array does not have rank 1, or the lengths differ.
    """
    where_K = _valid(scores_K, where_K, ranks_K)
    best = jnp.min(jnp.where(where_K, ranks_K, jnp.iinfo(ranks_K.dtype).max))
    best_K = where_K & (ranks_K == best)
    scores_K = masking.masked_fill(scores_K, where=where_K)
    informative = jnp.any(where_K & ~best_K)

    def logsumexp(subset_K: jax.Array) -> jax.Array:
        # The result must be finite even for uninformative labels, because NaN times a zero cotangent is NaN.
        return jax.nn.logsumexp(jnp.where(subset_K | ~informative, scores_K, -jnp.inf))

    return jnp.where(informative, logsumexp(where_K) - logsumexp(best_K), 0.0)


def _valid(scores_K: jax.Array, where_K: jax.Array | None, ranks_K: jax.Array | None = None) -> jax.Array:
    """Returns the mask as booleans; raises ValueError unless all arguments have rank 1 and the same length."""
    where_K = jnp.ones(scores_K.shape, bool) if where_K is None else where_K
    ranks_K = scores_K if ranks_K is None else ranks_K
    masking.check_rank(1, scores_K=scores_K, ranks_K=ranks_K, where_K=where_K)
    masking.check_same_shape(scores_K=scores_K, ranks_K=ranks_K, where_K=where_K)
    return where_K.astype(bool)


def _better(scores_K: jax.Array, ranks_K: jax.Array, where_K: jax.Array | None) -> jax.Array:
    """Returns a ``[K, K]`` mask, True at [i, j] if completions i and j both exist and i has the better rank."""
    where_K = _valid(scores_K, where_K, ranks_K)
    return (ranks_K[:, None] < ranks_K[None, :]) & where_K[:, None] & where_K[None, :]
