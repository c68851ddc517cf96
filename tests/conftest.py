"""Every test runs on the CPU, with implicit broadcasting across ranks forbidden."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs once: time goes into compiling, not into running.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")
