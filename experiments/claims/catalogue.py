"""The claims that can be run."""

from __future__ import annotations

from claims.claim import Claim
from claims.direct_alignment import (
    c39_dpo_frontier,
    c40_unseen_answers,
    c41_pair_shift,
    c43b_implicit_reward,
)
from claims.instructgpt import (
    c02_pair_batches,
    c03_sft_epochs,
    c04_labeler_agreement,
    c05_labeler_groups,
    c06_heldout_labelers,
    c07_alignment_tax,
    c08_ptx_versus_kl,
    c09_kl_coefficient,
    c10_learning_rates,
)
from claims.overoptimisation import (
    c16_sqrt_kl,
    c17_train_and_test_models,
    c18_reward_size,
    c25_best_of_k,
    c31_reward_model_overoptimised,
    c35_functional_forms,
    c36_reward_scaling,
    c37_policy_size,
    c38_kl_penalty_frontier,
)
from claims.policy_optimisation import (
    c32_separate_critic,
    c33_adaptive_kl,
    c34_known_optimum,
    c42_implementation_details,
    c43a_early_updates,
    c43c_lambda_and_rloo,
)

_MODULES = (
    c02_pair_batches,
    c03_sft_epochs,
    c04_labeler_agreement,
    c05_labeler_groups,
    c06_heldout_labelers,
    c07_alignment_tax,
    c08_ptx_versus_kl,
    c09_kl_coefficient,
    c10_learning_rates,
    c16_sqrt_kl,
    c17_train_and_test_models,
    c18_reward_size,
    c25_best_of_k,
    c31_reward_model_overoptimised,
    c32_separate_critic,
    c33_adaptive_kl,
    c34_known_optimum,
    c35_functional_forms,
    c36_reward_scaling,
    c37_policy_size,
    c38_kl_penalty_frontier,
    c39_dpo_frontier,
    c40_unseen_answers,
    c41_pair_shift,
    c42_implementation_details,
    c43a_early_updates,
    c43b_implicit_reward,
    c43c_lambda_and_rloo,
)
CLAIMS: dict[str, Claim] = {module.CLAIM.id: module.CLAIM for module in _MODULES}
