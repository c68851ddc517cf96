"""Training: one file a stage, one step a stage, one loop for all."""

from rlhf_jax.train import loop, ppo, reward_model, schedules, sft, state, step

__all__ = ["loop", "ppo", "reward_model", "schedules", "sft", "state", "step"]
