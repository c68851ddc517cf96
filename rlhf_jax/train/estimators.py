"""What an answer's tokens are worth: the one part in which PPO, REINFORCE, RLOO, GRPO and REINFORCE++ differ.

An estimator maps a scored batch to ``(advantages_BT, returns_BT)``; returns are what a critic learns, None where there
is no critic. ``ppo.make_train_step`` takes it beside a reduction and a KL loss::

    PPO           gae                             token_mean
    REINFORCE     reinforce                       sequence_sum
    RLOO          partial(rloo, samples=4)        sequence_sum
    GRPO          partial(grpo, samples=8)        sequence_mean     kl_loss=kl.k3
    Dr. GRPO      partial(dr_grpo, samples=8)     constant_mean
    REINFORCE++   reinforce_pp                    token_mean

Where devices share a batch, `ppo` calls its estimator with ``axis_name`` too: statistics of the batch are those of all
devices, and the answers to one prompt are on one of them.
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
    """A batch of answers with their scores; the ``samples`` answers to one prompt stand next to each other."""

    scores_B: jax.Array
    """What is paid for the whole answer: clipped, and replaced where it did not stop."""
    logprobs_BT: jax.Array
    """Of the policy that sampled."""
    reference_BT: jax.Array
    values_BT: jax.Array | None
    """The critic's, in units of reward; None without a critic."""
    mask_BT: jax.Array
    kl_coef: jax.Array
    past_return: jax.Array
    """Mean return of all answers of the iterations before, KL penalty included; 0 in the first."""


Estimator = Callable[..., tuple[jax.Array, jax.Array | None]]
"""``(scored, hyper) -> (advantages_BT, returns_BT or None)``, and with ``axis_name=...`` where devices share a batch"""


def gae(
    scored: Scored,
    hyper: Any,
    *,
    whiten_rewards: bool = False,
    whiten: bool = True,
    axis_name: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
    """Per-token rewards, GAE with the critic, advantages whitened over the batch after the returns are formed (PPO).

    ``whiten_rewards`` scales the per-token rewards, KL part included, to variance 1 and keeps their mean (Ziegler
    2019).
    """
    if scored.values_BT is None:
        raise ValueError("gae needs a critic: Models.values is None")
    rewards_BT = token_rewards(scored)
    if whiten_rewards:
        rewards_BT = advantages.whiten(rewards_BT, where=scored.mask_BT, shift_mean=False, axis_name=axis_name)
    of_row = partial(advantages.gae, discount=hyper.discount, lambda_=hyper.lambda_)
    advantages_BT, returns_BT = jax.vmap(of_row)(rewards_BT, scored.values_BT, scored.mask_BT)
    if whiten:
        advantages_BT = advantages.whiten(advantages_BT, where=scored.mask_BT, axis_name=axis_name)
    return advantages_BT, returns_BT


def reinforce(scored: Scored, hyper: Any, *, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Return less the mean of all returns before (REINFORCE with a running baseline; Ahmadian 2024, 2)."""
    del hyper, axis_name
    return _spread(sequence_rewards(scored) - scored.past_return, scored), None


def rloo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Return, KL penalty included, less the mean of the prompt's other answers (Ahmadian 2024, 2.3)."""
    del hyper, axis_name
    return _spread(_by_prompt(advantages.rloo, sequence_rewards(scored), samples), scored), None


def grpo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Score less the prompt's mean, over its deviation; the KL is not in it but a loss of its own (Shao 2024, 4.1)."""
    del hyper, axis_name
    return _spread(_by_prompt(advantages.group_normalize, scored.scores_B, samples), scored), None


def dr_grpo(scored: Scored, hyper: Any, *, samples: int, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Score less the prompt's mean, not divided by anything (Liu 2025)."""
    del hyper, axis_name
    return _spread(_by_prompt(advantages.group_center, scored.scores_B, samples), scored), None


def reinforce_pp(scored: Scored, hyper: Any, *, axis_name: AxisName = None) -> tuple[jax.Array, None]:
    """Rewards to go of per-token rewards, whitened over the batch, without a critic (REINFORCE++, Hu 2025)."""
    to_go = partial(advantages.gae, discount=hyper.discount, lambda_=1.0)
    nothing_BT = jnp.zeros_like(scored.logprobs_BT)
    advantages_BT, _ = jax.vmap(to_go)(token_rewards(scored), nothing_BT, scored.mask_BT)
    return advantages.whiten(advantages_BT, where=scored.mask_BT, axis_name=axis_name), None


def token_rewards(scored: Scored) -> jax.Array:
    """``[B, T]``: the KL penalty at every token and the score at the last (`rewards.token_rewards`)."""
    return rewards.token_rewards(
        scored.scores_B, scored.logprobs_BT, scored.reference_BT, scored.mask_BT, kl_coef=scored.kl_coef
    )


def sequence_rewards(scored: Scored) -> jax.Array:
    """``[B]``: the sum of the token rewards."""
    return jnp.sum(token_rewards(scored), axis=1)


def _by_prompt(of_group: Callable[[jax.Array], jax.Array], numbers_B: jax.Array, samples: int) -> jax.Array:
    B = numbers_B.shape[0]
    if samples < 2 or B % samples:
        raise ValueError(
            f"samples is {samples}; it must be at least 2, since a prompt's answers are compared with each other, "
            f"and divide the {B} answers of a batch"
        )
    return jax.vmap(of_group)(numbers_B.reshape(-1, samples)).reshape(B)


def _spread(numbers_B: jax.Array, scored: Scored) -> jax.Array:
    """The same number at every real token of an answer."""
    return masking.masked_fill(jnp.broadcast_to(numbers_B[:, None], scored.mask_BT.shape), where=scored.mask_BT)
