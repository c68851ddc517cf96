"""The parts that all stages share: optimisers, schedules, the update from gradients, and partial training."""

from rlhf_jax.train.optim import nonfinite, optimisers, partition, schedules, update

__all__ = ["nonfinite", "optimisers", "partition", "schedules", "update"]
