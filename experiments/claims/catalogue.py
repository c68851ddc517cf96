"""The claims that can be run."""

from __future__ import annotations

from claims.claim import Claim
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
from claims.overoptimisation import c18_reward_size, c25_best_of_k, c36_reward_scaling

_MODULES = (
    *(c02_pair_batches, c03_sft_epochs, c04_labeler_agreement, c05_labeler_groups, c06_heldout_labelers),
    *(c07_alignment_tax, c08_ptx_versus_kl, c09_kl_coefficient, c10_learning_rates, c18_reward_size, c25_best_of_k),
    *(c36_reward_scaling,),
)
CLAIMS: dict[str, Claim] = {module.CLAIM.id: module.CLAIM for module in _MODULES}
