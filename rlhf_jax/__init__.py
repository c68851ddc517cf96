"""Reinforcement learning from human feedback in JAX, as pure functions."""

from rlhf_jax import advantages, aggregation, generation, kl, lm, losses, masking, metrics, rewards, train, types

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "advantages",
    "aggregation",
    "generation",
    "kl",
    "lm",
    "losses",
    "masking",
    "metrics",
    "rewards",
    "train",
    "types",
]
