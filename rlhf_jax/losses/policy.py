"""Policy-gradient losses, for tokens or for whole responses; any shape, unreduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import kl, masking


def clipped_policy(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """PPO's clipped surrogate (Schulman 2017 Eq 7) as a loss: ``max(-A u, -A clip(u, 1 - c, 1 + c))``.

    Args:
        logprobs: of the policy being trained.
        old_logprobs: of the policy that sampled, from the same scoring function and temperature, so that the ratio u is
            1 at the first update. No gradient flows through them.
        advantages: the same shape; no gradient flows through them.
        clip: c.

    Returns:
        The shape of the inputs, unreduced. Finite for any finite inputs (see ``kl.ratio``).
    """
    unclipped, clipped = _branches(logprobs, old_logprobs, advantages, clip)
    return jnp.maximum(unclipped, clipped)


def policy_is_clipped(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, clip: float | jax.Array = 0.2
) -> jax.Array:
    """True where the clipped branch of ``clipped_policy`` is the larger; its mean is the clip fraction."""
    unclipped, clipped = _branches(logprobs, old_logprobs, advantages, clip)
    return clipped > unclipped


def reinforce(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """``-A log p``, whose gradient is the policy gradient; A is held fixed.

    RLOO (Ahmadian 2024) uses it with log-probabilities summed over a response and ``advantages.rloo``.
    """
    masking.check_same_shape(logprobs=logprobs, advantages=advantages)
    return -jax.lax.stop_gradient(masking.as_float32(advantages)) * masking.as_float32(logprobs)


def importance_weights(
    logprobs: jax.Array, behaviour_logprobs: jax.Array, *, cap: float | jax.Array = 2.0
) -> jax.Array:
    """``min(p / q, cap)`` of tokens drawn from q, for losses that are expectations over p; no gradient.

    Truncated importance sampling (Ionides 2008): cutting the weights off trades a little bias for a bounded variance.
    What q never draws, under top-p say, no weight brings back.
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
