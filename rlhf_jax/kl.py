"""Sampled and exact Kullback-Leibler divergences, and adaptive controllers for the KL coefficient.

For y sampled from the policy, let ``rho = log policy(y) - log reference(y)``. `k1`, `k2` and `k3` (Schulman 2020)
estimate ``KL(policy || reference)`` from ``rho``. If they are used as *losses* on fixed samples, their expected
gradients differ:

* `k1`: 0;
* `k2`: the gradient of ``KL(policy || reference)``;
* `k3`: the gradient of ``KL(reference || policy)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import masking

MAX_LOG_RATIO = 20.0


def ratio(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``exp(logprobs - reference_logprobs)``, linearly extrapolated where the log-ratio is above 20.

    The extrapolation follows the tangent, so that values and gradients stay finite and keep their sign. Without it, the
    exponential could overflow, and infinity times a zero cotangent would put a NaN into the gradient of a *clipped*
    loss. Healthy runs never reach a ratio of ``e^20``, about 5e8. The arrays must have the same shape.
    """
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    log_ratio = masking.as_float32(logprobs) - masking.as_float32(reference_logprobs)
    excess = jnp.maximum(log_ratio - MAX_LOG_RATIO, 0.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) * (1.0 + excess)


def k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``rho = log policy - log reference``, an unbiased KL estimate that has high variance and can be negative.

    Use this estimator in rewards. The arrays must have the same shape; the result is unreduced.

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
    """Returns ``rho^2 / 2``, a biased estimate of the KL that has low variance; see `k1` for ``rho``.

    If the estimate is used as a loss, its expected gradient is that of ``KL(policy || reference)``. The arrays must
    have the same shape; the result is unreduced.
    """
    return 0.5 * jnp.square(k1(logprobs, reference_logprobs))


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Returns ``exp(-rho) - 1 + rho``, an unbiased estimate of the KL that is never negative (GRPO, Shao 2024 Eq 4).

    The estimate has low variance; see `k1` for ``rho``. Where ``rho`` is below -20, the exponential is extrapolated
    linearly (see `ratio`).
    The arrays must have the same shape; the result is unreduced.

    Example:
        >>> from rlhf_jax import kl
        >>> print(round(float(kl.k3(-1.0, -2.0)), 4))
        0.3679
    """
    rho = k1(logprobs, reference_logprobs)
    # For small rho, the usual case in training, exp(-rho) - 1 would lose digits to cancellation.
    small = jnp.expm1(-jnp.clip(rho, -1.0, 1.0))
    return jnp.where(jnp.abs(rho) < 1.0, small, ratio(reference_logprobs, logprobs) - 1.0) + rho


def full(logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
    """Returns the exact ``KL(softmax(logits) || softmax(reference_logits))`` over the last axis, in nats.

    Args:
        logits: ``[..., V]``, the policy's logits, divided by the temperature; -inf marks an impossible token.
        reference_logits: ``[..., V]``, the reference's logits, divided by the same temperature.

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
    """Returns the exact KL divergence ``sum_v p_v (log p_v - log q_v)`` from log-probabilities ``[..., V]``."""
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    logprobs, reference_logprobs = masking.as_float32(logprobs), masking.as_float32(reference_logprobs)
    probs = jnp.exp(logprobs)
    # Impossible tokens are masked before the subtraction, so that 0 log 0 is 0 with zero gradient.
    possible = probs > 0
    difference = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, reference_logprobs, 0.0)
    return jnp.sum(probs * difference, axis=-1)


@struct.dataclass
class ControllerState:
    """The state of an adaptive KL controller, carried from batch to batch and saved in checkpoints."""

    kl_coef: jax.Array
    """The current coefficient, a float32 scalar."""


def init_controller(kl_coef: float | jax.Array) -> ControllerState:
    """Returns the initial state of a controller, with coefficient ``kl_coef``."""
    return ControllerState(kl_coef=jnp.asarray(kl_coef, jnp.float32))


def update_controller(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array, gain: float | jax.Array = 0.1
) -> ControllerState:
    """Applies the proportional rule of Ziegler 2019: ``coef * (1 + gain * clip(observed / target - 1, -0.2, 0.2))``.

    Args:
        state: State of the controller.
        observed_kl: Scalar, in nats per sequence: `k1` summed over tokens and averaged over sequences.
        target: The desired KL, in nats per sequence, above 0.
        gain: Proportional gain (``K_beta`` in the paper).

    Returns:
        The state for the *next* batch. Call this function after all epochs on the current batch.

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
    """Applies the rule of Ziegler 2019's code, in which the gain ``episodes / horizon`` grows with the batch size.

    The new coefficient is ``coef * (1 + episodes / horizon * clip(observed / target - 1, -0.2, 0.2))``.

    Args:
        state: State of the controller.
        observed_kl: Scalar, as in `update_controller`.
        target: The desired KL, as in `update_controller`.
        episodes: Number of sequences in this batch.
        horizon: Number of sequences in which a KL at least 20 % above the target raises the coefficient by about 20 %.

    Returns:
        The state for the *next* batch.

    Raises:
        ValueError: If ``observed_kl`` is not a scalar.
    """
    return ControllerState(kl_coef=state.kl_coef * (1.0 + _error(observed_kl, target) * episodes / horizon))


def update_controller_by_doubling(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array
) -> ControllerState:
    """Applies the rule for PPO's adaptive KL penalty (Schulman 2017, section 4).

    Doubles the coefficient if the observed KL is above ``1.5 * target``, and halves it if the KL is below
    ``target / 1.5``.
    """
    masking.check_rank(0, observed_kl=observed_kl)
    factor = jnp.where(observed_kl > 1.5 * target, 2.0, jnp.where(observed_kl < target / 1.5, 0.5, 1.0))
    return ControllerState(kl_coef=state.kl_coef * factor)


def _error(observed_kl: jax.Array, target: float | jax.Array) -> jax.Array:
    masking.check_rank(0, observed_kl=observed_kl)
    return jnp.clip((masking.as_float32(observed_kl) - target) / target, -0.2, 0.2)
