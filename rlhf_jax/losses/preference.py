"""DPO and related losses on the log-probabilities of whole responses.

The losses accept arrays of the same shape and return an unreduced float32 array of that shape. In their formulas,
``h = log(policy / reference)(chosen) - log(policy / reference)(rejected)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masking
from rlhf_jax.losses import comparison, supervised
from rlhf_jax.losses.comparison import Scalar


def dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """Computes ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`` (Rafailov 2023; conservative DPO for e > 0).

    Here ``h`` is the result of `log_ratio_margin`.

    Args:
        policy_chosen: Log-probabilities of the preferred responses under the policy, *summed* over their tokens,
            including the stop token; any shape.
        policy_rejected: The same for the rejected responses.
        reference_chosen: Summed log-probabilities of the preferred responses under the frozen reference.
        reference_rejected: The same for the rejected responses.
        beta: KL coefficient of the RL objective whose optimal policy DPO fits.
        label_smoothing: e, the assumed fraction of flipped labels, in [0, 1/2].

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> policy_chosen, policy_rejected = jnp.array([-10.0]), jnp.array([-12.0])
        >>> reference_chosen, reference_rejected = jnp.array([-11.0]), jnp.array([-11.0])
        >>> loss_B = losses.dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5)
        >>> print([round(float(x), 4) for x in loss_B])
        [0.3133]
    """
    margin = beta * log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return comparison.pairwise(margin, 0.0, target=1.0 - label_smoothing)


def robust_dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> jax.Array:
    """Computes the DPO loss corrected for labels flipped with probability e (Chowdhury 2024).

    The loss is ``[(1 - e) (-log sigmoid(beta h)) - e (-log sigmoid(-beta h))] / (1 - 2 e)``, with ``h`` from
    `log_ratio_margin`. It can be negative for a single pair; its expectation over the flips is the DPO loss of the
    clean labels.

    Args:
        policy_chosen: Log-probabilities of the preferred responses under the policy, summed as in `dpo`.
        policy_rejected: The same for the rejected responses.
        reference_chosen: Log-probabilities of the preferred responses under the reference, summed as in `dpo`.
        reference_rejected: The same for the rejected responses.
        beta: As in `dpo`.
        label_smoothing: e, the fraction of flipped labels, below 1/2.

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.
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
    """Computes ``(h - 1 / (2 beta))^2`` (Azar 2023), with ``h`` from `log_ratio_margin` and target ``1 / (2 beta)``.

    Args:
        policy_chosen: Log-probabilities of the preferred responses under the policy, *averaged* over tokens, so that
            the loss does not grow with the response length; any shape.
        policy_rejected: The same for the rejected responses.
        reference_chosen: Averaged log-probabilities of the preferred responses under the frozen reference.
        reference_rejected: The same for the rejected responses.
        beta: Strength of the regularisation.

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> from rlhf_jax import losses
        >>> print(losses.ipo(-1.0, -2.0, -1.5, -1.5, beta=0.25))
        1.0
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
    """Computes ``max(0, 1 - beta h)``, the hinge loss of SLiC (Zhao 2023), with ``h`` from `log_ratio_margin`.

    Args:
        policy_chosen: Log-probabilities of the preferred responses under the policy, summed as in `dpo`.
        policy_rejected: The same for the rejected responses.
        reference_chosen: Log-probabilities of the preferred responses under the reference, summed as in `dpo`.
        reference_rejected: The same for the rejected responses.
        beta: As in `dpo`.

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.
    """
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
    """Computes the KTO loss of individual responses labelled good or bad (Ethayarajh 2024).

    With ``r = log(policy / reference)``, the loss is ``w_D (1 - sigmoid(beta (r - z)))`` for good responses and
    ``w_U (1 - sigmoid(beta (z - r)))`` for bad ones.

    Args:
        policy: Log-probabilities of the responses under the policy, summed over tokens; any shape.
        reference: Log-probabilities of the responses under the frozen reference, summed over tokens.
        desirable: True for responses labelled good; of the same shape.
        baseline: z, from `kto_baseline`; no gradient flows through it.
        beta: As in `dpo`.
        desirable_weight: w_D, the weight of good responses.
        undesirable_weight: w_U, the weight of bad responses.

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import losses
        >>> policy, reference = jnp.array([-3.0, -3.0]), jnp.array([-4.0, -4.0])
        >>> loss_B = losses.kto(policy, reference, jnp.array([True, False]), 0.2, beta=0.5)
        >>> print([round(float(x), 4) for x in loss_B])
        [0.4013, 0.5987]
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
    axis_name: masking.AxisName = None,
) -> jax.Array:
    """Computes KTO's baseline ``z = max(0, mean(log policy - log reference))`` (Ethayarajh 2024), without a gradient.

    Args:
        policy: Log-probabilities under the policy of *mismatched* responses (each paired with a prompt that it was not
            written for), summed over tokens; any shape.
        reference: Log-probabilities of the same responses under the frozen reference.
        where: Boolean mask of the responses to average over, as in `masking.masked_mean`.
        axis_name: Mesh, ``vmap`` or ``pmap`` axes over which the batch is split.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: If the shapes differ.
    """
    masking.check_same_shape(policy=policy, reference=reference)
    difference = masking.as_float32(policy) - masking.as_float32(reference)
    return jax.lax.stop_gradient(jnp.maximum(masking.masked_mean(difference, where=where, axis_name=axis_name), 0.0))


def orpo(chosen: jax.Array, rejected: jax.Array, *, weight: Scalar) -> jax.Array:
    """Computes the reference-free loss ``-c - weight * log sigmoid(log_odds(c) - log_odds(r))`` (Hong 2024).

    Here ``c`` and ``r`` are ``chosen`` and ``rejected``, the *mean* token log-probabilities of the two responses, which
    have the same shape and are at most 0; ``log_odds(x)`` is ``x - log(1 - exp(x))``; ``weight`` is the paper's lambda.
    """
    return supervised.next_token(chosen) + weight * comparison.pairwise(_log_odds(chosen), _log_odds(rejected))


def simpo(chosen: jax.Array, rejected: jax.Array, *, beta: Scalar, margin: Scalar) -> jax.Array:
    """Computes the reference-free loss ``-log sigmoid(beta chosen - beta rejected - margin)`` (Meng 2024).

    Args:
        chosen: *Mean* token log-probabilities of the preferred responses, of any shape.
        rejected: The same for the rejected responses.
        beta: Scale of the implicit reward.
        margin: Target margin between the implicit rewards (gamma in the paper).

    Returns:
        The unreduced loss, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> from rlhf_jax import losses
        >>> print(round(float(losses.simpo(-0.5, -1.5, beta=2.0, margin=0.5)), 4))
        0.2014
    """
    masking.check_same_shape(chosen=chosen, rejected=rejected)
    return comparison.pairwise(beta * masking.as_float32(chosen), beta * masking.as_float32(rejected), margin=margin)


def log_ratio_margin(
    policy_chosen: jax.Array, policy_rejected: jax.Array, reference_chosen: jax.Array, reference_rejected: jax.Array
) -> jax.Array:
    """Returns h, the difference in ``log(policy / reference)`` between the preferred and the rejected responses.

    ``beta h`` is the difference of the implicit rewards ``beta log(policy / reference)`` (Rafailov 2023).

    Args:
        policy_chosen: Log-probabilities of the preferred responses under the policy, summed or averaged over tokens.
        policy_rejected: The same for the rejected responses.
        reference_chosen: Log-probabilities of the preferred responses under the reference, computed in the same way.
        reference_rejected: The same for the rejected responses.

    Returns:
        h, with the shape of the inputs.

    Raises:
        ValueError: If the shapes differ.
    """
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
