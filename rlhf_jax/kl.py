"""Kullback-Leibler divergence from samples and exactly, and the controllers that steer its coefficient.

With y drawn from the policy and ``rho = log policy(y) - log reference(y)``, k1, k2 and k3 (Schulman 2020) estimate
KL(policy || reference) from one sample each. As *losses* on fixed samples they are three different things: the expected
gradient of k1 is 0, that of k2 is the gradient of KL(policy || reference), that of k3 is the gradient of
KL(reference || policy).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import masking

MAX_LOG_RATIO = 20.0


def ratio(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """``exp(logprobs - reference_logprobs)``, continued along its tangent where the log-ratio is above 20.

    The tangent keeps values and gradients finite, and pointing the right way, where the exponential would overflow:
    an infinite ratio times a zero cotangent is a NaN in the gradient of a *clipped* loss. A ratio of e^20 is half a
    billion, so no sane run is on the tangent.

    Args:
        logprobs: any shape.
        reference_logprobs: the same shape.
    """
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    log_ratio = masking.as_float32(logprobs) - masking.as_float32(reference_logprobs)
    excess = jnp.maximum(log_ratio - MAX_LOG_RATIO, 0.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)) * (1.0 + excess)


def k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """``rho``: unbiased, of high variance, negative at times. Belongs into the reward. Any shape, unreduced."""
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return masking.as_float32(logprobs) - masking.as_float32(reference_logprobs)


def k2(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """``rho^2 / 2``: biased, of low variance; as a loss it has the gradient of KL(policy || reference). Unreduced."""
    return 0.5 * jnp.square(k1(logprobs, reference_logprobs))


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """``exp(-rho) - 1 + rho``: unbiased, never negative, of low variance (GRPO, Shao 2024 Eq 4). Unreduced.

    Where ``rho`` is below -20 the exponential goes on along its tangent, see ``ratio``.
    """
    rho = k1(logprobs, reference_logprobs)
    # expm1 keeps the digits that 1 - 1 would cancel when rho is small, which is where training spends its time.
    small = jnp.expm1(-jnp.clip(rho, -1.0, 1.0))
    return jnp.where(jnp.abs(rho) < 1.0, small, ratio(reference_logprobs, logprobs) - 1.0) + rho


def full(logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(reference_logits)), exact, over the last axis.

    Args:
        logits: ``[..., V]``, already divided by the temperature; -inf marks an impossible token.
        reference_logits: ``[..., V]``.

    Returns:
        ``[...]``, unreduced, in nats; infinite where the policy can say what the reference cannot.
    """
    masking.check_same_shape(logits=logits, reference_logits=reference_logits)
    return categorical(
        jax.nn.log_softmax(masking.as_float32(logits)), jax.nn.log_softmax(masking.as_float32(reference_logits))
    )


def categorical(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """``sum_v p_v (log p_v - log q_v)`` over the last axis of two tables of log-probabilities ``[..., V]``."""
    masking.check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    logprobs, reference_logprobs = masking.as_float32(logprobs), masking.as_float32(reference_logprobs)
    probs = jnp.exp(logprobs)
    # 0 log 0 is 0, and so is its gradient: impossible tokens leave before the subtraction, not after it.
    possible = probs > 0
    difference = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, reference_logprobs, 0.0)
    return jnp.sum(probs * difference, axis=-1)


@struct.dataclass
class ControllerState:
    """What an adaptive controller carries from batch to batch, and a checkpoint must hold."""

    kl_coef: jax.Array
    """float32 scalar."""


def controller(kl_coef: float | jax.Array) -> ControllerState:
    """The state before the first batch."""
    return ControllerState(kl_coef=jnp.asarray(kl_coef, jnp.float32))


def update_controller(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array, gain: float | jax.Array = 0.1
) -> ControllerState:
    """The rule of Ziegler 2019: ``coef * (1 + gain * clip(observed / target - 1, -0.2, 0.2))``.

    Args:
        state: the controller.
        observed_kl: scalar; mean over sequences of the k1 sum over tokens, in nats.
        target: the KL to settle at, in nats a sequence, above 0.
        gain: the paper's K_beta.

    Returns:
        The state for the *next* batch; call it after the epochs over this one.
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
    """The rule of Ziegler's released code, whose gain is ``episodes / horizon`` and so grows with the batch.

    Args:
        state: the controller.
        observed_kl: as in ``update_controller``.
        target: as in ``update_controller``.
        episodes: sequences in this batch.
        horizon: sequences over which a persistent error of 0.2 changes the coefficient by about 0.2 of itself.
    """
    return ControllerState(kl_coef=state.kl_coef * (1.0 + _error(observed_kl, target) * episodes / horizon))


def update_controller_by_doubling(
    state: ControllerState, observed_kl: jax.Array, *, target: float | jax.Array
) -> ControllerState:
    """PPO's own penalty rule (Schulman 2017, 4): double above 1.5 times the target, halve below target / 1.5."""
    masking.check_rank(0, observed_kl=observed_kl)
    factor = jnp.where(observed_kl > 1.5 * target, 2.0, jnp.where(observed_kl < target / 1.5, 0.5, 1.0))
    return ControllerState(kl_coef=state.kl_coef * factor)


def _error(observed_kl: jax.Array, target: float | jax.Array) -> jax.Array:
    masking.check_rank(0, observed_kl=observed_kl)
    return jnp.clip((masking.as_float32(observed_kl) - target) / target, -0.2, 0.2)
