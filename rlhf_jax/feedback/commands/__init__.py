"""Subcommands of ``python -m rlhf_jax.feedback``."""
