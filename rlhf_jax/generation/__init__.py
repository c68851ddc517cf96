"""Drawing responses from a language model."""

from rlhf_jax.generation.generate import generate
from rlhf_jax.generation.sampling import Sampling, choose, draw, keep_min_p, keep_top_k, keep_top_p, log_distribution

__all__ = [
    "Sampling",
    "choose",
    "draw",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "log_distribution",
]
