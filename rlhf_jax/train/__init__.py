"""Training: one file a stage, one step a stage, one loop for all; ``train.watch``, which imports scipy, by itself."""

from rlhf_jax.train import dpo, loop, objectives, optimisers, ppo, reference, reward_model, schedules, sft, state, step

__all__ = [
    "dpo",
    "loop",
    "objectives",
    "optimisers",
    "ppo",
    "reference",
    "reward_model",
    "schedules",
    "sft",
    "state",
    "step",
]
