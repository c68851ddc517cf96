"""TensorFlow 1's Adam, compared with a float64 loop and with optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.train import state
from rlhf_jax.train.optim import optimisers
from rlhf_jax.train.optim import update as step


def loop(grads, *, b1, b2, eps):
    """Returns the updates of all steps, computed from the formula in float64."""
    m, v, results = 0.0, 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        results.append(np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps))
    return np.stack(results)


def updates(tx, grads, params):
    opt_state: Any = tx.init(params)
    results, apply = [], jax.jit(tx.update)
    for g in grads:
        update, opt_state = apply(g, opt_state)
        results.append(update)
    return results, opt_state


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 8),
    b1=st.sampled_from([0.0, 0.5, 0.9]),
    b2=st.sampled_from([0.0, 0.95, 0.999]),
    eps=st.sampled_from([0.0, 1e-8, 1e-5, 1e-2]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
)
def test_updates_match_the_formula(seed, steps, b1, b2, eps, size):
    rng = np.random.default_rng(seed)
    grads = (size * rng.normal(size=(steps, 3))).astype(np.float32)
    results, _ = updates(optimisers.scale_by_adam_tf1(b1=b1, b2=b2, eps=eps), grads, jnp.zeros(3))
    np.testing.assert_allclose(np.stack(results), loop(grads, b1=b1, b2=b2, eps=eps), rtol=2e-5, atol=1e-7)


@given(seed=st.integers(0, 2**32 - 1))
def test_tiny_eps_matches_optax(seed):
    grads = np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32)
    tf1_updates, _ = updates(optimisers.scale_by_adam_tf1(b2=0.95, eps=1e-12), grads, jnp.zeros(4))
    optax_updates, _ = updates(optax.scale_by_adam(b2=0.95, eps=1e-12), grads, jnp.zeros(4))
    np.testing.assert_allclose(np.stack(tf1_updates), np.stack(optax_updates), rtol=1e-4)


def test_first_steps_on_tiny_gradients_are_smaller():
    grads = np.full((3, 1), 1e-5, np.float32)
    tf1_updates, _ = updates(optimisers.scale_by_adam_tf1(), grads, jnp.zeros(1))
    optax_updates, _ = updates(optax.scale_by_adam(eps=1e-5), grads, jnp.zeros(1))
    # With g = eps, optax divides by g + eps, and TF1 by g + eps / sqrt(1 - b2).
    np.testing.assert_allclose(optax_updates[0], 0.5, rtol=1e-3)
    np.testing.assert_allclose(tf1_updates[0], 1 / (1 + 1000**0.5), rtol=1e-3)
    assert all(0 < a < 0.2 * b for a, b in zip(np.ravel(tf1_updates), np.ravel(optax_updates)))


def test_state_keeps_its_types_and_compiles_once():
    params = {"half": jnp.ones(3, jnp.bfloat16), "whole": jnp.ones((2, 2))}
    tx = optax.chain(optimisers.scale_by_adam_tf1(), optax.scale(-1.0))
    now, traces = state.create(params, tx), []

    @jax.jit
    def train(now):
        traces.append(1)
        grads = jax.grad(lambda p: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p)))(now.params)
        return step.apply_gradients(now, grads, learning_rate=0.1)[0]

    def shape(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    before = shape(now.opt_state)
    assert {x.dtype for x in jax.tree.leaves(now.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    for _ in range(3):
        now = train(now)
        assert shape(now.opt_state) == before and jax.tree.structure(now.params) == jax.tree.structure(params)
    assert len(traces) == 1 and shape(now.params) == shape(params)
    adam: Any = jax.tree.leaves(now.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))[0]
    assert int(adam.count) == 3
    np.testing.assert_array_less(jax.tree.leaves(now.params)[1], 0.8)


def test_moments_are_float64_for_float64_parameters():
    with jax.enable_x64(True):
        grads = np.random.default_rng(0).normal(size=(4, 3)) * 1e-4
        results, kept = updates(optimisers.scale_by_adam_tf1(), grads, jnp.zeros(3, jnp.float64))
        assert kept.mu.dtype == kept.nu.dtype == results[0].dtype == jnp.float64
        np.testing.assert_allclose(np.stack(results), loop(grads, b1=0.9, b2=0.999, eps=1e-5), rtol=1e-12)


@pytest.mark.parametrize("bad", [dict(b1=1.0), dict(b2=-0.1), dict(eps=-1.0)])
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="needs 0 <= b1"):
        optimisers.scale_by_adam_tf1(**bad)
