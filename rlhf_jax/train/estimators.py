"""Advantage estimators of PPO, REINFORCE, RLOO, GRPO, Dr. GRPO and REINFORCE++.

An estimator maps a scored batch to ``(advantages_BT, returns_BT)``. The returns are the critic's targets, or None for
methods without a critic. Each method is a choice of estimator, reduction and KL loss in `ppo.make_train_step`::

    PPO           gae                             token_mean
    REINFORCE     reinforce                       sequence_sum
    RLOO          partial(rloo, samples=4)        sequence_sum
    GRPO          partial(grpo, samples=8)        sequence_mean     kl_loss=kl.k3
    Dr. GRPO      partial(dr_grpo, samples=8)     constant_mean
    REINFORCE++   reinforce_pp                    token_mean

With process rewards, one score per token, `gae` and `reinforce_pp` use each score at its token. The other methods
compare whole responses and use the sum of the scores, so they give the same advantages for equal sums.

If a batch is split over devices, `ppo` also passes ``axis_name`` to the estimator, which then computes batch statistics
over all devices. All responses to a prompt are on the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import advantages, masking, rewards
from rlhf_jax.train.minibatches import AxisName


class Scored(NamedTuple):
    """A batch of scored responses; the ``samples`` responses to a prompt are adjacent."""

    scores_B: jax.Array
    """float32 scores, after any clipping and any adjustment for responses without a stop token; with process rewards,
    the sum of ``token_scores_BT``."""
    logprobs_BT: jax.Array
    """Log-probabilities under the policy that sampled the responses, in nats."""
    reference_BT: jax.Array
    """Log-probabilities under the reference, in nats."""
    values_BT: jax.Array | None
    """Values of the critic before each token, in units of reward; None without a critic."""
    mask_BT: jax.Array
    """bool, True at response tokens, including the stop token."""
    kl_coef: jax.Array
    """KL coefficient beta, in reward per nat."""
    past_return: jax.Array
    """Mean return (score minus KL penalty) over the responses of all earlier iterations; 0 in the first iteration."""
    token_scores_BT: jax.Array | None = None
    """float32 scores of the tokens, 0 at padding (process rewards); None if the score belongs to the last token."""


Estimator = Callable[..., tuple[jax.Array, jax.Array | None]]
"""``(scored, hyper) -> (advantages_BT, returns_BT or None)``, with ``axis_name=...`` if devices split the batch."""


def gae(
    scored: Scored,
    hyper: Any,
    *,
    whiten_rewards: bool = False,
    whiten: bool = True,
    axis_name: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes PPO's advantages: GAE on KL-penalised rewards (Schulman 2016 Eq 16; InstructGPT, section 3.5).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}`` and ``R_t = A_t + V_t``, where
    ``r_t`` is from :func:`token_rewards`, and ``V`` and ``A`` are 0 after the last token.

    Args:
        scored: A batch with ``values_BT``.
        hyper: Hyperparameters, of which ``discount`` (gamma) and ``lambda_`` (lambda) are used.
        whiten_rewards: Whether to scale the per-token rewards, including the KL penalty, to variance 1 without changing
            their mean (Ziegler 2019).
        whiten: Whether to whiten the advantages over all tokens of the batch, after the returns are computed.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        ``(advantages_BT, returns_BT)``.

    Raises:
        ValueError: If ``values_BT`` is None.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.train import estimators, ppo
        >>> zeros = jnp.zeros((1, 2))
        >>> scored = estimators.Scored(jnp.ones(1), zeros, zeros, zeros, jnp.ones((1, 2), bool), 0.02, 0.0)
        >>> advantages_BT, returns_BT = estimators.gae(scored, ppo.Hyper(lambda_=0.5), whiten=False)
        >>> advantages_BT.tolist()
        [[0.5, 1.0]]
    """
    if scored.values_BT is None:
        raise ValueError("gae needs a critic, but Models.values is None")
    rewards_BT = token_rewards(scored)
    if whiten_rewards:
        rewards_BT = advantages.whiten(rewards_BT, where=scored.mask_BT, shift_mean=False, axis_name=axis_name)
    row_gae = partial(advantages.gae, discount=hyper.discount, lambda_=hyper.lambda_)
    advantages_BT, returns_BT = jax.vmap(row_gae)(rewards_BT, scored.values_BT, scored.mask_BT)
    if whiten:
        advantages_BT = advantages.whiten(advantages_BT, where=scored.mask_BT, axis_name=axis_name)
    return advantages_BT, returns_BT


def reinforce(scored: Scored, hyper: Any, *, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Computes REINFORCE's advantages: the return minus the mean of all earlier returns (Ahmadian 2024)."""
    del hyper, axis_name
    return _broadcast(sequence_rewards(scored) - scored.past_return, scored), None


def rloo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Computes RLOO's advantages: the return minus the mean return of the prompt's other responses (Ahmadian 2024).

    ``A_i = R_i - 1 / (K - 1) sum_{j != i} R_j``, where R is the score minus the KL penalty.

    Args:
        scored: A batch of scored responses.
        hyper: Not used.
        samples: K, the number of responses to each prompt; at least 2.
        axis_name: Not used; the responses to a prompt are on one device.

    Returns:
        ``(advantages_BT, None)``.

    Raises:
        ValueError: If ``samples`` is less than 2 or does not divide the batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.train import estimators, ppo
        >>> zeros, mask = jnp.zeros((2, 1)), jnp.ones((2, 1), bool)
        >>> scored = estimators.Scored(jnp.array([3.0, 1.0]), zeros, zeros, None, mask, 0.02, 0.0)
        >>> estimators.rloo(scored, ppo.Hyper(), samples=2)[0].tolist()
        [[2.0], [-2.0]]
    """
    del hyper, axis_name
    return _broadcast(_by_prompt(advantages.rloo, sequence_rewards(scored), samples), scored), None


def grpo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Computes GRPO's advantages: each prompt's scores, normalised to mean 0 and variance 1 (Shao 2024, section 4.1).

    The advantages do not include a KL penalty; pass ``kl_loss=kl.k3`` to `ppo.make_train_step` to add one to the loss.

    Args:
        scored: A batch of scored responses.
        hyper: Not used.
        samples: Number of responses to each prompt; at least 2.
        axis_name: Not used; the responses to a prompt are on one device.

    Returns:
        ``(advantages_BT, None)``.

    Raises:
        ValueError: If ``samples`` is less than 2 or does not divide the batch.
    """
    del hyper, axis_name
    return _broadcast(_by_prompt(advantages.group_normalize, scored.scores_B, samples), scored), None


def dr_grpo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Computes Dr. GRPO's advantages: the score minus the prompt's mean score (Liu 2025).

    Args:
        scored: A batch of scored responses.
        hyper: Not used.
        samples: Number of responses to each prompt; at least 2.
        axis_name: Not used; the responses to a prompt are on one device.

    Returns:
        ``(advantages_BT, None)``.

    Raises:
        ValueError: If ``samples`` is less than 2 or does not divide the batch.
    """
    del hyper, axis_name
    return _broadcast(_by_prompt(advantages.group_center, scored.scores_B, samples), scored), None


def reinforce_pp(scored: Scored, hyper: Any, *, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Computes REINFORCE++'s advantages: whitened, discounted sums of the rewards from each token on (Hu 2025)."""
    rewards_to_go = partial(advantages.gae, discount=hyper.discount, lambda_=1.0)
    zeros_BT = jnp.zeros_like(scored.logprobs_BT)
    advantages_BT, _ = jax.vmap(rewards_to_go)(token_rewards(scored), zeros_BT, scored.mask_BT)
    return advantages.whiten(advantages_BT, where=scored.mask_BT, axis_name=axis_name), None


def token_rewards(scored: Scored) -> jax.Array:
    """Returns KL-penalised rewards, ``[B, T]``: ``r_t = -beta (log pi - log pi_ref) + [t is last] s``.

    With process rewards, ``s_t`` takes the place of the last term. The sum over a response is the objective of
    InstructGPT Eq 2; see `rewards.token_rewards`.
    """
    scores = scored.scores_B if scored.token_scores_BT is None else scored.token_scores_BT
    return rewards.token_rewards(
        scores, scored.logprobs_BT, scored.reference_BT, scored.mask_BT, kl_coef=scored.kl_coef
    )


def sequence_rewards(scored: Scored) -> jax.Array:
    """Returns the sum of :func:`token_rewards` over each response, ``[B]``."""
    return jnp.sum(token_rewards(scored), axis=1)


def _by_prompt(group_fn: Callable[[jax.Array], jax.Array], numbers_B: jax.Array, samples: int) -> jax.Array:
    B = numbers_B.shape[0]
    if samples < 2 or B % samples:
        raise ValueError(
            f"samples is {samples}; it must divide the {B} responses of the batch and be at least 2, because the "
            "responses to a prompt are compared with each other"
        )
    return jax.vmap(group_fn)(numbers_B.reshape(-1, samples)).reshape(B)


def _broadcast(numbers_B: jax.Array, scored: Scored) -> jax.Array:
    """Returns an array that holds each response's number at all its tokens and 0 at padding."""
    return masking.masked_fill(jnp.broadcast_to(numbers_B[:, None], scored.mask_BT.shape), where=scored.mask_BT)
