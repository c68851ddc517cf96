"""Policy-gradient losses of tokens or of whole responses. Arrays have the same shape; losses are unreduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import kl, masking


def clipped_policy(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """Computes PPO's clipped surrogate (Schulman 2017 Eq 7) as a loss: ``max(-A u, -A clip(u, 1 - c, 1 + c))``.

    The probability ratio is ``u = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: Log-probabilities under the policy being trained, any shape.
        old_logprobs: Log-probabilities under the policy that sampled, from the same scoring function and temperature,
            so that u is 1 at the first update. The same shape; no gradient flows through them.
        advantages: A, the same shape; no gradient flows through them.
        clip: Clip range c, above 0.

    Returns:
        The loss, shaped as the inputs, unreduced. Finite for all finite inputs (see `kl.ratio`).

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> logprobs, advantages = jnp.log(jnp.array([1.5, 1.5])), jnp.array([1.0, -1.0])
        >>> print(losses.clipped_policy(logprobs, jnp.zeros(2), advantages, clip=0.25))
        [-1.25  1.5 ]
    """
    unclipped, clipped = _branches(logprobs, old_logprobs, advantages, clip)
    return jnp.maximum(unclipped, clipped)


def policy_is_clipped(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """Returns True where the clipped branch of `clipped_policy` is the larger one; its mean is the clip fraction.

    Args:
        logprobs: As in `clipped_policy`.
        old_logprobs: As in `clipped_policy`.
        advantages: As in `clipped_policy`.
        clip: As in `clipped_policy`.

    Returns:
        Booleans, shaped as the inputs.

    Raises:
        ValueError: If shapes differ.
    """
    unclipped, clipped = _branches(logprobs, old_logprobs, advantages, clip)
    return clipped > unclipped


def reinforce(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """Returns ``-A log p``, whose gradient is the policy gradient; no gradient flows through A (Williams 1992).

    RLOO (Ahmadian 2024) uses it with log-probabilities summed over a response and `advantages.rloo`.
    """
    masking.check_same_shape(logprobs=logprobs, advantages=advantages)
    return -jax.lax.stop_gradient(masking.as_float32(advantages)) * masking.as_float32(logprobs)


def importance_weights(
    logprobs: jax.Array, behaviour_logprobs: jax.Array, *, cap: float | jax.Array = 2.0
) -> jax.Array:
    """Returns ``min(p / q, cap)`` for tokens drawn from q, to weight losses that are expectations over p; no gradient.

    Truncated importance sampling (Ionides 2008): the cap trades a small bias for bounded variance. Tokens that q never
    draws, for example under top-p, cannot be recovered by any weight.
    """
    masking.check_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    return jax.lax.stop_gradient(jnp.minimum(kl.ratio(logprobs, behaviour_logprobs), cap))


def _branches(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    masking.check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = jax.lax.stop_gradient(masking.as_float32(advantages))
    ratio = kl.ratio(logprobs, jax.lax.stop_gradient(old_logprobs))
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
