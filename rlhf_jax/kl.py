"""Kullback-Leibler divergence, estimated from samples or exact, and adaptive controllers of its coefficient.

With y drawn from the policy and ``rho = log policy(y) - log reference(y)``, `k1`, `k2` and `k3` (Schulman 2020)
estimate ``KL(policy || reference)`` from one sample each. As *losses* on fixed samples they differ: the expected
gradient of k1 is 0, that of k2 is the gradient of ``KL(policy || reference)``, and that of k3 is the gradient of
``KL(reference || policy)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import masking

MAX_LOG_RATIO = 20.0


def ratio(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``exp(logprobs - reference_logprobs)``, linearly extrapolated where the log-ratio is above 20.

    The extrapolation follows the tangent, so that values and gradients stay finite and keep their sign where the
    exponential would overflow: an infinite ratio times a zero cotangent is a NaN in the gradient of a *clipped* loss.
    A ratio of e^20 is half a billion, so no healthy run reaches the tangent. Both arrays have the same shape.
    """
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    log_ratio = masking.as_float32(logprobs) - masking.as_float32(reference_logprobs)
    excess = jnp.maximum(log_ratio - MAX_LOG_RATIO, 0.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) * (1.0 + excess)


def k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``rho``, the log-ratio: an unbiased estimate of the KL with high variance, which can be negative.

    This is the estimator to put into the reward. The arrays have the same shape; the result is unreduced.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import kl
        >>> logprobs, reference_logprobs = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -1.0])
        >>> print(kl.k1(logprobs, reference_logprobs))
        [ 1. -2.]
    """
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return masking.as_float32(logprobs) - masking.as_float32(reference_logprobs)


def k2(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``rho^2 / 2``: a biased estimate of the KL with low variance.

    As a loss it has the gradient of ``KL(policy || reference)``. The arrays have the same shape; the result is
    unreduced.
    """
    return 0.5 * jnp.square(k1(logprobs, reference_logprobs))


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``exp(-rho) - 1 + rho``: unbiased, with low variance and never negative (GRPO, Shao 2024 Eq 4).

    The exponential is extrapolated linearly where ``rho`` is below -20; see `ratio`. The arrays have the same shape;
    the result is unreduced.

    Example:
        >>> from rlhf_jax import kl
        >>> print(round(float(kl.k3(-1.0, -2.0)), 4))
        0.3679
    """
    rho = k1(logprobs, reference_logprobs)
    # expm1 keeps the digits that exp(-rho) - 1 would cancel for small rho, the usual case in training.
    small = jnp.expm1(-jnp.clip(rho, -1.0, 1.0))
    return jnp.where(jnp.abs(rho) < 1.0, small, ratio(reference_logprobs, logprobs) - 1.0) + rho


def full(logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
    """Returns the exact ``KL(softmax(logits) || softmax(reference_logits))`` over the last axis, in nats.

    Args:
        logits: ``[..., V]``, already divided by the temperature; -inf marks an impossible token.
        reference_logits: ``[..., V]``, of the reference, likewise divided by the temperature.

    Returns:
        ``[...]``, unreduced; infinite where the policy allows a token that the reference excludes.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import kl
        >>> policy, reference = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
        >>> print(round(float(kl.full(policy, reference)), 4))
        0.5108
    """
    masking.check_same_shape(logits=logits, reference_logits=reference_logits)
    return categorical(
        jax.nn.log_softmax(masking.as_float32(logits)), jax.nn.log_softmax(masking.as_float32(reference_logits))
    )


def categorical(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``sum_v p_v (log p_v - log q_v)`` over the last axis of two arrays of log-probabilities ``[..., V]``."""
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    logprobs, reference_logprobs = masking.as_float32(logprobs), masking.as_float32(reference_logprobs)
    probs = jnp.exp(logprobs)
    # 0 log 0 is 0 with zero gradient: impossible tokens are masked before the subtraction, not after it.
    possible = probs > 0
    difference = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, reference_logprobs, 0.0)
    return jnp.sum(probs * difference, axis=-1)


@struct.dataclass
class ControllerState:
    """The state of an adaptive KL controller, carried from batch to batch and saved in checkpoints."""

    kl_coef: jax.Array
    """float32 scalar."""


def init_controller(kl_coef: float | jax.Array) -> ControllerState:
    """Returns the state of a controller before the first batch."""
    return ControllerState(kl_coef=jnp.asarray(kl_coef, jnp.float32))


def update_controller(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array, gain: float | jax.Array = 0.1
) -> ControllerState:
    """Applies the proportional rule of Ziegler 2019: ``coef * (1 + gain * clip(observed / target - 1, -0.2, 0.2))``.

    Args:
        state: The controller.
        observed_kl: Scalar, in nats: the mean over sequences of `k1` summed over tokens.
        target: The desired KL, in nats per sequence, above 0.
        gain: The paper's K_beta.

    Returns:
        The state for the *next* batch; call this after the epochs over the current one.

    Raises:
        ValueError: If ``observed_kl`` is not a scalar.
    """
    return ControllerState(kl_coef=state.kl_coef * (1.0 + gain * _error(observed_kl, target)))


def update_controller_by_horizon(
    state: ControllerState,
    observed_kl: jax.Array,
    *,
    target: float | jax.Array,
    episodes: int | jax.Array,
    horizon: float | jax.Array = 10_000.0,
) -> ControllerState:
    """Applies the rule of Ziegler's released code, whose gain ``episodes / horizon`` grows with the batch.

    The new coefficient is ``coef * (1 + episodes / horizon * clip(observed / target - 1, -0.2, 0.2))``.

    Args:
        state: The controller.
        observed_kl: Scalar, as in `update_controller`.
        target: The desired KL, as in `update_controller`.
        episodes: Number of sequences in this batch.
        horizon: Number of sequences over which a persistent error of 0.2 changes the coefficient by about 20 %.

    Returns:
        The state for the *next* batch.

    Raises:
        ValueError: If ``observed_kl`` is not a scalar.
    """
    return ControllerState(kl_coef=state.kl_coef * (1.0 + _error(observed_kl, target) * episodes / horizon))


def update_controller_by_doubling(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array
) -> ControllerState:
    """Applies PPO's penalty rule (Schulman 2017, 4).

    The coefficient doubles if the KL is above 1.5 times the target, and halves if it is below target / 1.5.
    """
    masking.check_rank(0, observed_kl=observed_kl)
    factor = jnp.where(observed_kl > 1.5 * target, 2.0, jnp.where(observed_kl < target / 1.5, 0.5, 1.0))
    return ControllerState(kl_coef=state.kl_coef * factor)


def _error(observed_kl: jax.Array, target: float | jax.Array) -> jax.Array:
    masking.check_rank(0, observed_kl=observed_kl)
    return jnp.clip((masking.as_float32(observed_kl) - target) / target, -0.2, 0.2)
