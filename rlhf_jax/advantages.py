"""Advantages: per token from a critic (GAE), or per response from the other responses to its prompt (RLOO, GRPO).

All functions except `whiten` take one sequence or one prompt (rank 1); use ``jax.vmap`` for a batch. Bind
hyperparameters first, because ``vmap`` maps keyword arguments: ``jax.vmap(functools.partial(gae, discount=1.0))``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking

WHITEN_EPSILON = 1e-8


def whiten(
    x: jax.Array, *, where: jax.Array | bool, shift_mean: bool = True, axis_name: masking.AxisName = None
) -> jax.Array:
    """Returns ``(x - mean) * rsqrt(var + 1e-8)`` over the mask, with the population variance (Ziegler 2019).

    Whiten rewards with ``shift_mean=False`` before GAE, and advantages with ``shift_mean=True`` after computing the
    returns.

    Args:
        x: Array of any shape.
        where: Boolean (or 0/1) mask, a scalar or of the rank of ``x`` and broadcastable to it.
        shift_mean: If False, the mean is added back after scaling.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which mean and variance are taken jointly.

    Returns:
        Array shaped as ``x``, at least float32, 0 outside the mask.

    Raises:
        ValueError: If the rank of ``where`` is neither 0 nor that of ``x``.

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
    """Computes generalised advantage estimates over one response (Schulman 2016).

    ``delta_t = r_t + discount * V_{t+1} - V_t`` and ``A_t = delta_t + discount * lambda * A_{t+1}``. The episode ends
    after the last real token, where value and advantage become 0. ``returns_t = A_t + V_t``, with A not whitened.
    ``lambda_=1`` gives Monte Carlo returns, ``lambda_=0`` one-step temporal differences.

    Args:
        rewards_T: Per-token rewards.
        values_T: The critic's values *before* each token, at rollout time. No gradient flows through them.
        mask_T: True at real tokens, a prefix. Rewards and values outside the mask are ignored.
        discount: Discount factor, in [0, 1].
        lambda_: Trade-off between bias (0) and variance (1), in [0, 1].

    Returns:
        ``(advantages_T, returns_T)``, at least float32, both 0 outside the mask.

    Raises:
        ValueError: If an argument is not of rank 1, or lengths differ.

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

    _, advantages_T = jax.lax.scan(step, jnp.zeros((), deltas_T.dtype), deltas_T, reverse=True)
    advantages_T = masking.masked_fill(advantages_T, where=mask_T)
    return advantages_T, advantages_T + values_T


def rloo(scores_K: jax.Array) -> jax.Array:
    """Returns each score minus the mean of the other K - 1 scores (Ahmadian 2024): ``K / (K - 1) (s - mean)``.

    ``scores_K`` are the scores of K independent completions of one prompt, KL penalty included. Raises ValueError if
    the rank is not 1 or K is below 2.

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
    """Returns ``(s - mean) * rsqrt(var + epsilon)`` within one prompt (GRPO, Shao 2024), with the population variance.

    A prompt whose completions all have the same score gets exact zeros. Raises ValueError if the rank is not 1 or K is
    below 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import advantages
        >>> print(advantages.group_normalize(jnp.array([5.0, 9.0, 5.0, 9.0])))
        [-1.  1. -1.  1.]
    """
    centred_K = group_center(scores_K)
    return centred_K * jax.lax.rsqrt(jnp.mean(jnp.square(centred_K)) + epsilon)


def group_center(scores_K: jax.Array) -> jax.Array:
    """Returns ``s - mean`` within one prompt, not divided by the standard deviation (Dr. GRPO, Liu 2025).

    Raises ValueError if the rank is not 1 or K is below 2.
    """
    masking.check_rank(1, scores_K=scores_K)
    if scores_K.shape[0] < 2:
        raise ValueError(f"a group needs at least 2 completions, got {scores_K.shape[0]}")
    scores_K = masking.as_float32(scores_K)
    # Subtracting the first score makes equal scores exact zeros, and a large common offset costs no digits.
    offsets_K = scores_K - scores_K[0]
    return offsets_K - jnp.mean(offsets_K)
