"""Advantages: per token by a critic (GAE), or per response by its siblings (RLOO, GRPO).

Functions here are rank 1, for one sequence or one prompt; ``jax.vmap`` them over the batch. Bind hyperparameters first,
because ``vmap`` maps keyword arguments: ``jax.vmap(functools.partial(gae, discount=1.0))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking

whiten = masking.masked_whiten


def gae(
    rewards_T: jax.Array,
    values_T: jax.Array,
    mask_T: jax.Array,
    *,
    discount: float | jax.Array = 1.0,
    lambda_: float | jax.Array = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over one response (Schulman 2016).

    ``delta_t = r_t + discount * V_{t+1} - V_t``; ``A_t = delta_t + discount * lambda * A_{t+1}``; the response ends
    after its last real token, so value and advantage are 0 from there on. ``returns_t = A_t + V_t``, with A not
    whitened. lambda 1 gives Monte Carlo returns, lambda 0 one-step temporal differences.

    Args:
        rewards_T: per-token rewards.
        values_T: the critic's values *before* each token, at rollout time. No gradient flows through them.
        mask_T: True at real tokens, a prefix. What stands off the mask is never read.
        discount: in [0, 1].
        lambda_: in [0, 1].

    Returns:
        ``(advantages_T, returns_T)``, at least float32, both 0 off the mask.

    Raises:
        ValueError: if an argument is not of rank 1, or lengths differ.
    """
    masking.check_rank(1, rewards_T=rewards_T, values_T=values_T, mask_T=mask_T)
    masking.check_same_shape(rewards_T=rewards_T, values_T=values_T, mask_T=mask_T)
    values_T = jax.lax.stop_gradient(masking.masked_fill(values_T, where=mask_T))
    next_values_T = jnp.append(values_T[1:], 0.0)
    deltas_T = masking.masked_fill(masking.as_float32(rewards_T) + discount * next_values_T - values_T, where=mask_T)

    def step(next_advantage: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + discount * lambda_ * next_advantage
        return advantage, advantage

    _, advantages_T = jax.lax.scan(step, jnp.zeros((), deltas_T.dtype), deltas_T, reverse=True)
    advantages_T = masking.masked_fill(advantages_T, where=mask_T)
    return advantages_T, advantages_T + values_T


def rloo(scores_K: jax.Array) -> jax.Array:
    """Each score less the mean of the other K - 1 of its prompt (Ahmadian 2024), equal to ``K/(K-1) (s - mean)``.

    Args:
        scores_K: scores of K independent completions of one prompt, KL penalty included.

    Raises:
        ValueError: if the rank is not 1 or K is below 2.
    """
    centred_K = group_center(scores_K)
    k = scores_K.shape[0]
    return centred_K * (k / (k - 1))


def group_normalize(scores_K: jax.Array, *, epsilon: float = masking.WHITEN_EPSILON) -> jax.Array:
    """``(s - mean) * rsqrt(var + epsilon)`` within one prompt (GRPO, Shao 2024), population variance.

    A prompt whose completions all score the same gets exact zeros.

    Raises:
        ValueError: if the rank is not 1 or K is below 2.
    """
    centred_K = group_center(scores_K)
    return centred_K * jax.lax.rsqrt(jnp.mean(jnp.square(centred_K)) + epsilon)


def group_center(scores_K: jax.Array) -> jax.Array:
    """``s - mean`` within one prompt, without the division by the standard deviation (Dr. GRPO, Liu 2025).

    Raises:
        ValueError: if the rank is not 1 or K is below 2, where a group has nothing to compare.
    """
    masking.check_rank(1, scores_K=scores_K)
    if scores_K.shape[0] < 2:
        raise ValueError(f"a group needs at least 2 completions, got {scores_K.shape[0]}")
    scores_K = masking.as_float32(scores_K)
    # Offsets from the first: equal scores then give exact zeros, and large common offsets cost no digits.
    offsets_K = scores_K - scores_K[0]
    return offsets_K - jnp.mean(offsets_K)
