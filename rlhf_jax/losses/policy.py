"""Policy-gradient losses for tokens or whole responses. All arrays have the same shape; the losses are unreduced."""

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
        logprobs: Log-probabilities under the policy being trained, of any shape.
        old_logprobs: Log-probabilities under the policy that sampled the tokens, of the same shape. Compute them with
            the same function and temperature as ``logprobs``, so that u is 1 before the first update. No gradient flows
            through them.
        advantages: Advantages A, of the same shape; no gradient flows through them.
        clip: Clip range c, above 0.

    Returns:
        The unreduced loss, with the shape of the inputs; finite for all finite inputs (see `kl.ratio`).

    Raises:
        ValueError: If the shapes differ.

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
    """Returns True where the clipped branch of `clipped_policy` is larger; the mean of the result is the clip fraction.

    Args:
        logprobs: As in `clipped_policy`.
        old_logprobs: As in `clipped_policy`.
        advantages: As in `clipped_policy`.
        clip: As in `clipped_policy`.

    Returns:
        A boolean array with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.
    """
    unclipped, clipped = _branches(logprobs, old_logprobs, advantages, clip)
    return clipped > unclipped


def reinforce(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """Returns the REINFORCE loss ``-A log p`` (Williams 1992); no gradient flows through the advantages A.

    For RLOO (Ahmadian 2024), pass log-probabilities summed over each response and advantages from `advantages.rloo`.
    """
    masking.check_same_shape(logprobs=logprobs, advantages=advantages)
    return -jax.lax.stop_gradient(masking.as_float32(advantages)) * masking.as_float32(logprobs)


def importance_weights(
    logprobs: jax.Array, behaviour_logprobs: jax.Array, *, cap: float | jax.Array = 2.0
) -> jax.Array:
    """Returns weights ``min(p / q, cap)``, with which tokens sampled from q estimate expectations over p.

    The arguments are ``log p`` and ``log q``. This is truncated importance sampling (Ionides 2008): the cap bounds the
    variance at the cost of a small bias. No weight can account for tokens that q never samples, for example under
    top-p. No gradient flows through the weights.
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
