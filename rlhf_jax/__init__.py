"""Reinforcement learning from human feedback in JAX, as pure functions."""

from rlhf_jax import advantages, generation, kl, lm, losses, metrics, reduce, rewards, train, types

__all__ = ["advantages", "generation", "kl", "lm", "losses", "metrics", "reduce", "rewards", "train", "types"]
