"""Advantage estimators: GAE for each token, and group baselines for each response (RLOO, GRPO, Dr. GRPO).

Except for `whiten`, the functions operate on one response or one group of completions (rank 1); apply ``jax.vmap`` for
a batch. Bind hyperparameters with ``functools.partial`` first, because ``vmap`` also maps over keyword arguments:
``jax.vmap(functools.partial(gae, discount=1.0))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking

WHITEN_EPSILON = 1e-8


def whiten(
    x: jax.Array, *, where: jax.Array | bool, shift_mean: bool = True, axis_name: masking.AxisName = None
) -> jax.Array:
    """Whitens ``x`` over the mask: ``(x - mean) * rsqrt(var + 1e-8)`` (Ziegler 2019).

    ``var`` is the population variance. Whiten rewards with ``shift_mean=False`` before GAE, and advantages with
    ``shift_mean=True`` after computing the returns.

    Args:
        x: Array of any shape.
        where: Boolean or 0/1 mask; a scalar, or an array of the same rank as ``x`` that broadcasts to its shape.
        shift_mean: If False, the mean is added back after scaling.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which the mean and variance are computed.

    Returns:
        An array with the shape of ``x``, in at least float32; 0 outside the mask.

    Raises:
        ValueError: If ``where`` is neither a scalar nor of the same rank as ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import advantages
        >>> x, mask = jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False])
        >>> print(advantages.whiten(x, where=mask))
        [-1.  1.  0.]
        >>> print(advantages.whiten(x, where=mask, shift_mean=False))
        [1. 3. 0.]
    """
    filled = masking.masked_fill(x, where=where)
    mean = masking.masked_mean(x, where=where, axis_name=axis_name)
    variance = masking.masked_var(x, where=where, axis_name=axis_name)
    whitened = (filled - mean) * jax.lax.rsqrt(variance + WHITEN_EPSILON)
    return masking.masked_fill(whitened if shift_mean else whitened + mean, where=where)


def gae(
    rewards_T: jax.Array,
    values_T: jax.Array,
    mask_T: jax.Array,
    *,
    discount: float | jax.Array = 1.0,
    lambda_: float | jax.Array = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Computes the generalised advantage estimates of one response (Schulman 2016).

    With ``delta_t = r_t + discount * V_{t+1} - V_t`` for rewards r and values V, the advantages are
    ``A_t = delta_t + discount * lambda_ * A_{t+1}``, and the returns are ``A_t + V_t``. The episode ends after the last
    real token; all later values and advantages are 0. ``lambda_=1`` yields Monte Carlo returns, and ``lambda_=0``
    one-step temporal-difference targets.

    Args:
        rewards_T: Per-token rewards.
        values_T: The critic's value *before* each token, computed at rollout time. No gradient flows through it.
        mask_T: True at real tokens, which form a prefix. Rewards and values outside the mask are ignored.
        discount: Discount factor in [0, 1].
        lambda_: GAE parameter in [0, 1]. Larger values reduce the bias and increase the variance.

    Returns:
        ``(advantages_T, returns_T)``, in at least float32; both are 0 outside the mask.

    Raises:
        ValueError: If an array does not have rank 1, or the lengths differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import advantages
        >>> rewards_T, values_T = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.5, 0.25, 0.0])
        >>> mask_T = jnp.array([True, True, False])
        >>> advantages_T, returns_T = advantages.gae(rewards_T, values_T, mask_T, discount=0.5, lambda_=0.5)
        >>> print(advantages_T, returns_T)
        [-0.1875  0.75    0.    ] [0.3125 1.     0.    ]
    """
    masking.check_rank(1, rewards_T=rewards_T, values_T=values_T, mask_T=mask_T)
    masking.check_same_shape(rewards_T=rewards_T, values_T=values_T, mask_T=mask_T)
    values_T = jax.lax.stop_gradient(masking.masked_fill(values_T, where=mask_T))
    next_values_T = jnp.append(values_T[1:], 0.0)
    deltas_T = masking.masked_fill(masking.as_float32(rewards_T) + discount * next_values_T - values_T, where=mask_T)

    def step(next_advantage: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + discount * lambda_ * next_advantage
        return advantage, advantage

    # A sum of nothing: zero, and varying over the same mesh axes as the deltas under jax.shard_map.
    _, advantages_T = jax.lax.scan(step, jnp.sum(deltas_T[:0]), deltas_T, reverse=True)
    advantages_T = masking.masked_fill(advantages_T, where=mask_T)
    return advantages_T, advantages_T + values_T


def rloo(scores_K: jax.Array) -> jax.Array:
    """Returns each score minus the mean of the other K - 1 scores, ``K / (K - 1) (s - mean)`` (Ahmadian 2024).

    ``scores_K`` contains the scores, minus the KL penalties, of K independent completions of one prompt. Raises
    ValueError if ``scores_K`` does not have rank 1 or K is below 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import advantages
        >>> print(advantages.rloo(jnp.array([1.0, 2.0, 6.0])))
        [-3.  -1.5  4.5]
    """
    centred_K = group_center(scores_K)
    k = scores_K.shape[0]
    return centred_K * (k / (k - 1))


def group_normalize(scores_K: jax.Array, *, epsilon: float = WHITEN_EPSILON) -> jax.Array:
    """Normalises the scores of one prompt's completions: ``(s - mean) * rsqrt(var + epsilon)`` (GRPO, Shao 2024).

    ``var`` is the population variance. If all scores are equal, the result is exactly 0. Raises ValueError if
    ``scores_K`` does not have rank 1 or contains fewer than two scores.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import advantages
        >>> print(advantages.group_normalize(jnp.array([5.0, 9.0, 5.0, 9.0])))
        [-1.  1. -1.  1.]
    """
    centred_K = group_center(scores_K)
    return centred_K * jax.lax.rsqrt(jnp.mean(jnp.square(centred_K)) + epsilon)


def group_center(scores_K: jax.Array) -> jax.Array:
    """Returns the scores of one prompt's completions minus their mean (Dr. GRPO, Liu 2025).

    Unlike `group_normalize`, this function does not divide by the standard deviation. Raises ValueError if ``scores_K``
    does not have rank 1 or contains fewer than two scores.
    """
    masking.check_rank(1, scores_K=scores_K)
    if scores_K.shape[0] < 2:
        raise ValueError(f"a group needs at least 2 completions, got {scores_K.shape[0]}")
    scores_K = masking.as_float32(scores_K)
    # Subtracting the first score maps equal scores to exact zeros and keeps precision under a large common offset.
    offsets_K = scores_K - scores_K[0]
    return offsets_K - jnp.mean(offsets_K)
