"""The objectives of `train.objectives`, by the names that tests use."""

from typing import Any

from rlhf_jax.train import objectives

FAMILY: dict[str, Any] = {
    "dpo": objectives.dpo,
    "robust": objectives.robust_dpo,
    "ipo": objectives.ipo,
    "hinge": objectives.hinge,
    "kto": objectives.kto,
    "orpo": objectives.orpo,
    "simpo": objectives.simpo,
    "dpo-sft": objectives.with_sft(objectives.dpo),
    "dpo-per-token": objectives.per_token(objectives.dpo),
}
WITHOUT_REFERENCE = ("orpo", "simpo")
