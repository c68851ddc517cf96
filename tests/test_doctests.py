"""Runs the examples in the docstrings of the library."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import rlhf_jax

MODULES = ["rlhf_jax", *(m.name for m in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_the_expected_output(name):
    with jax.numpy_rank_promotion("allow"):
        failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed
