"""Parts shared by all stages: optimisers, schedules, gradient updates and partial training."""

from rlhf_jax.train.optim import nonfinite, optimisers, partition, schedules, update

__all__ = ["nonfinite", "optimisers", "partition", "schedules", "update"]
