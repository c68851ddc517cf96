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


LONGEST = (
    "test_instructgpt.py",
    "test_initial_model.py",
    "test_hosts.py",
    "test_parallel.py",
    "test_resume.py",
    "test_ppo.py",
    "test_direct_alignment.py",
)
"""Files that take minutes: they are begun first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    """Order the files; tests within a file stay in theirs."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
