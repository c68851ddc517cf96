"""The commands of ``python -m rlhf_jax.feedback``, one module each, which may import every other package."""
