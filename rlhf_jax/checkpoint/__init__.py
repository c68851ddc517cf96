"""Checkpoints that are written atomically, hashed leaf by leaf, and verified on restore."""

from rlhf_jax.checkpoint.checkpoints import Checkpoints, load_params, save_params
from rlhf_jax.checkpoint.manifest import CheckpointError, DamagedError

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "load_params", "save_params"]
