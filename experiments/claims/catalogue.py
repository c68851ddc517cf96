"""The claims that can be run."""

from __future__ import annotations

from claims.claim import Claim
from claims.instructgpt import c09_kl_coefficient

CLAIMS: dict[str, Claim] = {claim.id: claim for claim in (c09_kl_coefficient.CLAIM,)}
