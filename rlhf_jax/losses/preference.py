"""Losses from comparisons: of scores (reward models), and of log-probabilities (DPO and its relatives).

Pointwise losses take arrays of any one shape and return it, unreduced, in float32. ``ranking``, ``plackett_luce``,
``best_choice`` and ``best_of_n_choice`` take the completions of ONE prompt and return a scalar; ``jax.vmap`` them over
prompts.

In the second half ``h = log(policy / reference)(chosen) - log(policy / reference)(rejected)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking
from rlhf_jax.losses import supervised

Scalar = float | jax.Array


def pairwise(chosen: Scalar, rejected: Scalar, *, margin: Scalar = 0.0, target: Scalar = 1.0) -> jax.Array:
    """Bradley-Terry loss of a pair of scores: ``t softplus(m - d) + (1 - t) softplus(m + d)``, d = chosen - rejected.

    With t = 1 and m = 0 this is ``-log sigmoid(d)`` (Stiennon 2020, 3.4).

    Args:
        chosen: scores of the answers labelled better, any shape.
        rejected: scores of the others, the same shape.
        margin: by how much the better one should lead; a scalar or one for each pair.
        target: probability that ``chosen`` really is better; a scalar or one for each pair. Label smoothing e is
            ``1 - e``; an AI judge's soft label (Bai 2022, Constitutional AI 4.1) goes in as it is.
    """
    masking.check_same_shape(chosen=chosen, rejected=rejected, margin=margin, target=target)
    difference = masking.as_float32(chosen) - masking.as_float32(rejected)
    return target * jax.nn.softplus(margin - difference) + (1.0 - target) * jax.nn.softplus(margin + difference)


def reward_centering(chosen: Scalar, rejected: Scalar, *, coef: Scalar) -> jax.Array:
    """``coef * (chosen + rejected)^2``, added to ``pairwise`` to hold scores around 0 (Eisenstein 2023; coef 0.01)."""
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
    """The K-way loss of InstructGPT (Eq 1) for one prompt: mean of ``softplus(worse - better)`` over its pairs.

    All C(K, 2) pairs of a prompt belong into one batch element; shuffled as independent rows they overfit in one pass.
    With K = 2 this is the loss of a pair.

    Args:
        scores_K: scores of the completions.
        ranks_K: 1 is best; equal ranks are ties and add nothing.
        where_K: True at completions that exist; None means all. What stands elsewhere is never read.
        ties_in_divisor: divide by C(n, 2), n the valid count, as printed; if False, by the pairs without a tie.
        margin: by how much the better one of each pair should lead, as in ``pairwise``; a scalar.
        target: probability that the better-ranked one really is better, as in ``pairwise``; a scalar.
        centering: coefficient of ``reward_centering``, added to each pair; a scalar.

    Returns:
        A scalar; 0 with zero gradient where no pair survives. Leave such prompts out of a batch mean:
        ``masked_mean(vmap(ranking)(scores, ranks), where=vmap(has_pairs)(ranks))``.
    """
    masking.check_rank(1, scores_K=scores_K)
    better_KK = _better(ranks_K, where_K, like=scores_K)
    scores_K = masking.as_float32(scores_K)
    # Masked before softplus, not only after: NaN times a zero cotangent would be NaN.
    lead_KK = jnp.where(better_KK, scores_K[:, None] - scores_K[None, :], 0.0)
    loss_KK = pairwise(lead_KK, jnp.zeros_like(lead_KK), margin=margin, target=target)
    total = jnp.sum(jnp.where(better_KK, loss_KK, 0.0))
    # A weight of 0 that is known now leaves no trace of the term in the program.
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
    """Whether any two valid completions of the prompt differ in rank; a boolean scalar."""
    return jnp.any(_better(ranks_K, where_K, like=ranks_K))


def plackett_luce(scores_K: jax.Array, ranks_K: jax.Array, *, where_K: jax.Array | None = None) -> jax.Array:
    """Negative log-likelihood of a full ranking of one prompt's completions, picked best first without return.

    ``sum_i logsumexp(scores of i and of all ranked no better) - s_i``. Tied completions count as still there when each
    of them is picked (Breslow's rule); with two completions and no tie this is ``pairwise``.

    Args:
        scores_K: scores of the completions.
        ranks_K: 1 is best.
        where_K: True at completions that exist; None means all.

    Returns:
        A scalar, a sum over the completions.
    """
    masking.check_rank(1, scores_K=scores_K, ranks_K=ranks_K)
    where_K = _valid(where_K, like=scores_K)
    masking.check_same_shape(scores_K=scores_K, ranks_K=ranks_K)
    scores_K = masking.masked_fill(scores_K, where=where_K)
    remaining_KK = (ranks_K[None, :] >= ranks_K[:, None]) & where_K[None, :]
    # A row of a missing completion holds itself alone, so that its logsumexp is finite.
    remaining_KK = remaining_KK | jnp.eye(scores_K.shape[0], dtype=bool)
    remaining_scores_KK = jnp.where(remaining_KK, scores_K[None, :], -jnp.inf)
    return masking.masked_sum(jax.nn.logsumexp(remaining_scores_KK, axis=-1) - scores_K, where=where_K)


def best_of_n_choice(scores_K: jax.Array, choice: jax.Array | int, *, where_K: jax.Array | None = None) -> jax.Array:
    """Softmax cross-entropy of a label that names the best of K completions (Ziegler 2019, K = 4).

    Args:
        scores_K: scores of the completions.
        choice: index of the preferred one, an integer scalar.
        where_K: True at completions that exist; None means all.

    Returns:
        A scalar; NaN if ``choice`` is out of range or names a completion that does not exist.
    """
    masking.check_rank(1, scores_K=scores_K)
    masking.check_rank(0, choice=choice)
    where_K = _valid(where_K, like=scores_K)
    scores_K = masking.as_float32(scores_K)
    chosen_K = (jnp.arange(scores_K.shape[0]) == choice) & where_K
    chosen = jnp.sum(jnp.where(chosen_K, scores_K, 0.0))
    valid_scores_K = jnp.where(where_K | ~jnp.any(where_K), jnp.where(where_K, scores_K, 0.0), -jnp.inf)
    return jnp.where(jnp.any(chosen_K), jax.nn.logsumexp(valid_scores_K) - chosen, jnp.nan)


def best_choice(scores_K: jax.Array, ranks_K: jax.Array, *, where_K: jax.Array | None = None) -> jax.Array:
    """``best_of_n_choice`` with ranks for a label: ``-log`` of the probability that softmax gives to the best rank.

    Of several completions with the best rank any one will do: their probabilities are added.

    Args:
        scores_K: scores of the completions.
        ranks_K: 1 is best; only which completions are best is read.
        where_K: True at completions that exist; None means all.

    Returns:
        A scalar; 0 with zero gradient where all completions are equally good or none exists.
    """
    masking.check_rank(1, scores_K=scores_K, ranks_K=ranks_K)
    where_K = _valid(where_K, like=scores_K)
    masking.check_same_shape(scores_K=scores_K, ranks_K=ranks_K)
    best = jnp.min(jnp.where(where_K, ranks_K, jnp.iinfo(ranks_K.dtype).max))
    best_K = where_K & (ranks_K == best)
    scores_K = masking.masked_fill(scores_K, where=where_K)
    apart = jnp.any(where_K & ~best_K)

    def logsumexp(of_K: jax.Array) -> jax.Array:
        # Where there is nothing to tell apart, of anything finite: its gradient is multiplied by 0.
        return jax.nn.logsumexp(jnp.where(of_K | ~apart, scores_K, -jnp.inf))

    return jnp.where(apart, logsumexp(where_K) - logsumexp(best_K), 0.0)


def dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`` (Rafailov 2023; e > 0 is the conservative form).

    Args:
        policy_chosen: log-probabilities of the better responses, *summed* over their tokens, stop token included.
        policy_rejected: of the worse ones; the same shape.
        reference_chosen: under the frozen reference.
        reference_rejected: under the frozen reference.
        beta: the KL coefficient of the objective that this loss solves.
        label_smoothing: e, the assumed share of flipped labels.
    """
    margin = beta * log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return pairwise(margin, 0.0, target=1.0 - label_smoothing)


def robust_dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> jax.Array:
    """DPO made unbiased for labels flipped with probability e (Chowdhury 2024).

    ``[(1 - e) (-log sigmoid(beta h)) - e (-log sigmoid(-beta h))] / (1 - 2 e)``. Arguments as in ``dpo``; e must be
    below 1/2. A single loss can be negative; the expectation over flips is the clean DPO loss.
    """
    margin = beta * log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    kept, flipped = jax.nn.softplus(-margin), jax.nn.softplus(margin)
    return ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def ipo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """``(h - 1 / (2 beta))^2`` (Azar 2023), which stops pulling once the margin is reached.

    Arguments as in ``dpo``, but log-probabilities *averaged* over tokens: the square of summed ones grows with length.
    """
    margin = log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return jnp.square(margin - 1.0 / (2.0 * beta))


def hinge(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """``max(0, 1 - beta h)``, the SLiC loss on the DPO margin. Arguments as in ``dpo``."""
    margin = log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return jax.nn.relu(1.0 - beta * margin)


def kto(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    baseline: Scalar,
    *,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> jax.Array:
    """Loss of single responses marked good or bad (Ethayarajh 2024), with r = log(policy / reference).

    ``w_D (1 - sigmoid(beta (r - z)))`` where desirable, ``w_U (1 - sigmoid(beta (z - r)))`` elsewhere.

    Args:
        policy: summed log-probabilities of the responses, any shape.
        reference: under the frozen reference; the same shape.
        desirable: True where the response was marked good; the same shape.
        baseline: z, from ``kto_baseline``; no gradient flows through it.
        beta: as in ``dpo``.
        desirable_weight: w_D.
        undesirable_weight: w_U.
    """
    masking.check_same_shape(policy=policy, reference=reference, desirable=desirable, baseline=baseline)
    advantage = masking.as_float32(policy) - masking.as_float32(reference) - jax.lax.stop_gradient(baseline)
    good = desirable_weight * jax.nn.sigmoid(-beta * advantage)
    bad = undesirable_weight * jax.nn.sigmoid(beta * advantage)
    return jnp.where(jnp.asarray(desirable).astype(bool), good, bad)


def kto_baseline(
    policy: jax.Array,
    reference: jax.Array,
    *,
    where: jax.Array | bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """``max(0, mean(log policy - log reference))`` over *mismatched* prompts and responses; a scalar, no gradient."""
    masking.check_same_shape(policy=policy, reference=reference)
    difference = masking.as_float32(policy) - masking.as_float32(reference)
    return jax.lax.stop_gradient(jnp.maximum(masking.masked_mean(difference, where=where, axis_name=axis_name), 0.0))


def orpo(chosen: jax.Array, rejected: jax.Array, *, weight: Scalar) -> jax.Array:
    """``NLL(chosen) + weight * -log sigmoid(log odds(chosen) - log odds(rejected))`` (Hong 2024); no reference model.

    Args:
        chosen: *mean* token log-probabilities of the better responses, any shape; at most 0.
        rejected: of the worse ones; the same shape.
        weight: the paper's lambda.
    """
    return supervised.next_token(chosen) + weight * pairwise(_log_odds(chosen), _log_odds(rejected))


def simpo(chosen: jax.Array, rejected: jax.Array, *, beta: Scalar, margin: Scalar) -> jax.Array:
    """``-log sigmoid(beta chosen - beta rejected - margin)`` (Meng 2024); no reference model.

    Args:
        chosen: *mean* token log-probabilities of the better responses, any shape.
        rejected: of the worse ones; the same shape.
        beta: scale of the implicit reward.
        margin: the paper's gamma.
    """
    masking.check_same_shape(chosen=chosen, rejected=rejected)
    return pairwise(beta * masking.as_float32(chosen), beta * masking.as_float32(rejected), margin=margin)


def log_ratio_margin(
    policy_chosen: jax.Array, policy_rejected: jax.Array, reference_chosen: jax.Array, reference_rejected: jax.Array
) -> jax.Array:
    """h: the chosen response's log(policy / reference) less the rejected one's. The implicit reward gap is beta h."""
    masking.check_same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    chosen = masking.as_float32(policy_chosen) - masking.as_float32(reference_chosen)
    return chosen - (masking.as_float32(policy_rejected) - masking.as_float32(reference_rejected))


def _log_odds(logprob: jax.Array) -> jax.Array:
    return masking.as_float32(logprob) - supervised.log1mexp(logprob)


def _valid(where_K: jax.Array | None, *, like: jax.Array) -> jax.Array:
    if where_K is None:
        return jnp.ones(like.shape, bool)
    masking.check_rank(1, where_K=where_K)
    masking.check_same_shape(where_K=where_K, like=like)
    return where_K.astype(bool)


def _better(ranks_K: jax.Array, where_K: jax.Array | None, *, like: jax.Array) -> jax.Array:
    """``[i, j]`` is True where completions i and j both exist and i is ranked better."""
    masking.check_rank(1, ranks_K=ranks_K)
    masking.check_same_shape(ranks_K=ranks_K, like=like)
    where_K = _valid(where_K, like=like)
    return (ranks_K[:, None] < ranks_K[None, :]) & where_K[:, None] & where_K[None, :]
