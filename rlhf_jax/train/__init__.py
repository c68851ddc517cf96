"""Training: one module per stage, each with `make_train_step`, and one loop, `loop.fit`."""

from rlhf_jax.train import dpo, loop, objectives, optim, ppo, ppo_models, reference, reward_model, sft, state

__all__ = ["dpo", "loop", "objectives", "optim", "ppo", "ppo_models", "reference", "reward_model", "sft", "state"]
