"""Sampling of responses from a language model, in static and in continuous batches."""

from rlhf_jax.generation import continuous, stops
from rlhf_jax.generation.generate import generate
from rlhf_jax.generation.ragged import Answer, RaggedSampler
from rlhf_jax.generation.sampling import (
    Sampling,
    check_on_policy,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_distribution,
)

__all__ = [
    "Answer",
    "RaggedSampler",
    "Sampling",
    "check_on_policy",
    "choose",
    "continuous",
    "draw",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "log_distribution",
    "stops",
]
