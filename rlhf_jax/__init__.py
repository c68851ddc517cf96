"""Reinforcement learning from human feedback in JAX, as pure functions."""
