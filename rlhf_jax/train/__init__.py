"""Training: one file a stage, one step a stage, one loop for all; ``train.watch``, which imports scipy, by itself."""

from rlhf_jax.train import loop, optimisers, ppo, reward_model, schedules, sft, state, step

__all__ = ["loop", "optimisers", "ppo", "reward_model", "schedules", "sft", "state", "step"]
