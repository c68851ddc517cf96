"""Pure loss functions, computed in float32 and independent of models, trainers and configuration."""

from rlhf_jax.losses.comparison import (
    best_choice,
    best_of_n_choice,
    has_pairs,
    pairwise,
    plackett_luce,
    ranking,
    reward_centering,
)
from rlhf_jax.losses.policy import clipped_policy, importance_weights, policy_is_clipped, reinforce
from rlhf_jax.losses.preference import dpo, hinge, ipo, kto, kto_baseline, log_ratio_margin, orpo, robust_dpo, simpo
from rlhf_jax.losses.supervised import distill, distill_cross_entropy, gather_logprobs, next_token, top_k_logprobs
from rlhf_jax.losses.value import clipped_value, explained_variance, squared_value, value_is_clipped
from rlhf_jax.masking import masked_mean

__all__ = [
    "best_choice",
    "best_of_n_choice",
    "clipped_policy",
    "clipped_value",
    "distill",
    "distill_cross_entropy",
    "dpo",
    "explained_variance",
    "gather_logprobs",
    "has_pairs",
    "hinge",
    "importance_weights",
    "ipo",
    "kto",
    "kto_baseline",
    "log_ratio_margin",
    "masked_mean",
    "next_token",
    "orpo",
    "pairwise",
    "plackett_luce",
    "policy_is_clipped",
    "ranking",
    "reinforce",
    "reward_centering",
    "robust_dpo",
    "simpo",
    "squared_value",
    "top_k_logprobs",
    "value_is_clipped",
]
