"""The claims that can be run."""

from __future__ import annotations

from claims.claim import Claim
from claims.instructgpt import c04_labeler_agreement, c06_heldout_labelers, c07_alignment_tax, c09_kl_coefficient
from claims.overoptimisation import c25_best_of_k

_MODULES = (c04_labeler_agreement, c06_heldout_labelers, c07_alignment_tax, c09_kl_coefficient, c25_best_of_k)
CLAIMS: dict[str, Claim] = {module.CLAIM.id: module.CLAIM for module in _MODULES}
