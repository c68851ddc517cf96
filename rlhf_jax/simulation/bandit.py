"""A bandit small enough to enumerate: S prompts and A answers of one token each, and a reward for each combination.

The KL-regularised optimum has a closed form (Rafailov et al. 2023; Xu et al. 2024, Eq. 5), so tests can check whether
training reaches it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.types import LMOutput, Preferences, Rollout


def optimum(reference_logits_SA: jax.Array, rewards_SA: jax.Array, *, kl_coef: jax.Array | float) -> jax.Array:
    """Returns the KL-regularised optimum, ``pi*(a|s) = pi_ref(a|s) exp(r(s, a) / kl_coef) / Z(s)``.

    Args:
        reference_logits_SA: Logits of the reference policy.
        rewards_SA: Reward of each answer to each prompt.
        kl_coef: Coefficient of the KL penalty, > 0.

    Returns:
        Probabilities ``[S, A]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.simulation import bandit
        >>> optimum_SA = bandit.optimum(jnp.zeros((1, 2)), jnp.log(jnp.array([[1.0, 3.0]])), kl_coef=1.0)
        >>> [round(float(p), 4) for p in optimum_SA[0]]
        [0.25, 0.75]
    """
    return jax.nn.softmax(jax.nn.log_softmax(reference_logits_SA, axis=-1) + rewards_SA / kl_coef, axis=-1)


def total_variation(p_SA: jax.Array, q_SA: jax.Array) -> jax.Array:
    """Returns the total variation distance between two policies, maximised over the prompts, in [0, 1]."""
    return jnp.max(0.5 * jnp.abs(p_SA - q_SA).sum(axis=-1))


def forward(params: dict[str, jax.Array], tokens_BL: jax.Array, *, mask_BL: jax.Array | None = None) -> LMOutput:
    """Runs a "language model" whose hidden state at a prompt token is the prompt's row of ``params["logits_SA"]``."""
    del mask_BL
    logits_SA = params["logits_SA"]
    return LMOutput(logits_SA[jnp.minimum(tokens_BL, logits_SA.shape[0] - 1)])


def logits(params: dict[str, jax.Array], hidden_BLD: jax.Array) -> jax.Array:
    """Returns the hidden state unchanged, because it already consists of logits."""
    del params
    return hidden_BLD


def generate(params: dict[str, jax.Array], rng_B: jax.Array, prompts_BP: jax.Array, mask_BP: jax.Array) -> Rollout:
    """Samples one answer to each prompt (P = T = 1).

    Args:
        params: Parameters; ``logits_SA`` are the logits of the policy.
        rng_B: One JAX key per prompt; consumed.
        prompts_BP: Token ids of the prompts, in one column.
        mask_BP: Mask of the prompts.

    Returns:
        The rollout, with L = 2.
    """
    logits_BA = params["logits_SA"][prompts_BP[:, 0]]
    answers_B = jax.vmap(jax.random.categorical)(rng_B, logits_BA)
    logprobs_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BA), answers_B[:, None], axis=-1)[:, 0]
    ones_B1 = jnp.ones_like(prompts_BP, bool)
    return Rollout(
        tokens_BL=jnp.concatenate([prompts_BP, answers_B[:, None].astype(prompts_BP.dtype)], axis=1),
        mask_BL=jnp.concatenate([mask_BP.astype(bool), ones_B1], axis=1),
        response_mask_BT=ones_B1,
        logprobs_BT=logprobs_B[:, None],
        lengths_B=jnp.ones_like(answers_B, jnp.int32),
        finish_B=jnp.ones_like(answers_B, jnp.int32),
    )


def all_pairs(rewards_SA: jax.Array) -> Preferences:
    """Returns every pair of answers to every prompt, with its Bradley-Terry probability.

    ``targets_B``, the probability that the first answer a is preferred to the second answer b, is
    ``sigmoid(r(s, a) - r(s, b))`` for prompt s and reward r. If an objective is wrapped in `train.objectives.soft`, its
    mean over these pairs is its expectation over uniformly drawn pairs and their labels. The result has S A (A - 1) / 2
    rows. Prompts and answers consist of one token (P = T = 1), so there is one column of log-probabilities (C = 1).
    """
    S, A = rewards_SA.shape
    first_N, second_N = jnp.triu_indices(A, k=1)
    prompts_B, a_B, b_B = jnp.repeat(jnp.arange(S), len(first_N)), jnp.tile(first_N, S), jnp.tile(second_N, S)
    tokens_BKL = jnp.stack([jnp.stack([prompts_B, x], axis=-1) for x in (a_B, b_B)], axis=1).astype(jnp.int32)
    return Preferences(
        tokens_BKL=tokens_BKL,
        mask_BKL=jnp.ones(tokens_BKL.shape, bool),
        answer_BKC=jnp.ones((*tokens_BKL.shape[:2], 1), bool),
        targets_B=jax.nn.sigmoid(rewards_SA[prompts_B, a_B] - rewards_SA[prompts_B, b_B]),
    )
