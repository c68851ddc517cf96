"""Configuration of all tests: CPU only, and no implicit broadcasting across ranks."""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each once, so compile time dominates; these flags reduce it to a third. XLA
# ends a process that names an unknown flag, so flags that other versions may not have are left out there.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000)  # otherwise 3 % of the time is spent on searching JAX's objects for garbage

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
"""Files that take minutes. They run first, so that no worker is left with a long file at the end."""


def pytest_collection_modifyitems(items):
    """Moves the longest files to the front and keeps the order of tests within a file."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
