# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rlhf_jax import advantages, masking

SHAPE = (4, 6)
seeds = st.integers(0, 2**32 - 1)


def masked_arrays(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 10.0, SHAPE).astype(np.float32)
    where = rng.random(SHAPE) < rng.random()
    return np.where(where, x, np.nan).astype(np.float32), where


@pytest.fixture(scope="module")
def compiled():
    def everything(x, where):
        return {
            "sum": masking.masked_sum(x, where=where),
            "mean": masking.masked_mean(x, where=where),
            "rows": masking.masked_mean(x, where=where, axis=1),
            "var": masking.masked_var(x, where=where),
            "white": advantages.whiten(x, where=where),
            "scaled": advantages.whiten(x, where=where, shift_mean=False),
        }

    return jax.jit(everything)


@hypothesis.given(seed=seeds)
def test_reductions_agree_with_numpy_on_the_masked_elements(compiled, seed):
    x, where = masked_arrays(seed)
    got = compiled(x, where)
    kept = x[where].astype(np.float64)
    mean, var = (kept.mean(), kept.var()) if kept.size else (0.0, 0.0)
    np.testing.assert_allclose(got["sum"], kept.sum(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got["mean"], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["var"], var, rtol=1e-4, atol=1e-4)
    for row in range(SHAPE[0]):
        kept_in_row = x[row][where[row]]
        np.testing.assert_allclose(
            got["rows"][row], kept_in_row.mean() if kept_in_row.size else 0.0, rtol=1e-4, atol=1e-5
        )
    white = (kept - mean) / np.sqrt(var + 1e-8)
    np.testing.assert_allclose(got["white"][where], white, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got["scaled"][where], white + mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(got["white"][~where], 0.0)
    np.testing.assert_array_equal(got["scaled"][~where], 0.0)


def test_whiten_matches_hand_computed_values():
    x, where = jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False])
    # Population variance of (1, 3) is 1; the sample variance would be 2 and give 0.707.
    np.testing.assert_allclose(advantages.whiten(x, where=where), [-1.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(advantages.whiten(x, where=where, shift_mean=False), [1.0, 3.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [masking.masked_sum, masking.masked_mean, masking.masked_var, advantages.whiten],
    ids=lambda f: f.__name__,
)
class TestMaskRules:
    def test_an_empty_mask_has_value_and_gradient_zero(self, function):
        x = jnp.array([1.0, jnp.nan, jnp.inf])
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x, where=jnp.zeros(3, bool))))(x)
        assert value == 0.0
        np.testing.assert_array_equal(gradient, 0.0)

    def test_nan_on_the_mask_propagates(self, function):
        out = function(jnp.array([1.0, jnp.nan, 3.0]), where=jnp.array([True, True, False]))
        assert jnp.isnan(out).any()

    @pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
    def test_value_and_gradient_ignore_elements_off_the_mask(self, function, garbage):
        where = jnp.array([True, True, False, True])
        weights = jnp.array([1.0, -2.0, 5.0, 3.0])

        def loss(x):
            return jnp.sum(jnp.square(function(x, where=where)) * (weights if function is advantages.whiten else 1.0))

        clean, clean_gradient = jax.value_and_grad(loss)(jnp.array([1.0, 2.0, 0.0, 5.0]))
        dirty, dirty_gradient = jax.value_and_grad(loss)(jnp.array([1.0, 2.0, garbage, 5.0]))
        assert clean == dirty and clean != 0.0
        np.testing.assert_array_equal(dirty_gradient, clean_gradient)
        assert dirty_gradient[2] == 0.0 and jnp.any(dirty_gradient != 0.0)


def test_masked_fill_of_the_inputs_prevents_nan_gradients():
    where = jnp.array([True, False])

    def loss(x, fill):
        return masking.masked_mean(jnp.log(masking.masked_fill(x, where=where, value=1.0) if fill else x), where=where)

    x = jnp.array([2.0, 0.0])
    np.testing.assert_array_equal(jax.grad(loss)(x, True), [0.5, 0.0])
    assert jnp.isnan(jax.grad(loss)(x, False)[1])  # Without masked_fill the gradient is NaN.


def test_sharded_reductions_equal_those_on_one_device_when_masks_differ():
    x = np.random.default_rng(0).normal(np.arange(4.0)[:, None], 1.0, SHAPE).astype(np.float32)
    where = np.arange(SHAPE[1])[None, :] < np.array([6, 1, 0, 3])[:, None]
    for function in (masking.masked_mean, masking.masked_var, advantages.whiten):
        whole = function(x, where=where)
        local = jax.vmap(lambda x, w, f=function: f(x, where=w, axis_name="d"), axis_name="d")(x, where)
        np.testing.assert_allclose(local, jnp.broadcast_to(whole, local.shape), rtol=1e-5, atol=1e-6)
    mean_of_means = np.mean(jax.vmap(lambda x, w: masking.masked_mean(x, where=w))(x, where))
    # A mean of local means is clearly wrong here.
    assert abs(mean_of_means - masking.masked_mean(x, where=where)) > 0.1


def test_global_maximum_covers_all_devices_and_has_no_gradient():
    x = jnp.array([[1.0, -9.0], [-3.0, 7.0]])
    together = jax.vmap(lambda x: masking.global_max(x, axis_name="d"), axis_name="d")(x)
    np.testing.assert_array_equal(together, [7.0, 7.0])
    np.testing.assert_array_equal(jax.grad(masking.global_max)(x), 0.0)


def test_mean_of_device_gradients_is_the_gradient_of_the_global_mean():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    where = jnp.asarray(np.arange(6)[None, :] < np.array([6, 1, 0, 3])[:, None])

    def loss(w, x, where, axis_name=None):
        return masking.masked_mean(jnp.square(w * x), where=where, axis_name=axis_name)

    whole = jax.grad(loss)(1.5, x, where)
    local = jax.vmap(lambda x, m: jax.lax.pmean(jax.grad(partial(loss, axis_name="d"))(1.5, x, m), "d"), axis_name="d")(
        x, where
    )
    np.testing.assert_allclose(local, jnp.full(4, whole), rtol=1e-5)


def test_narrow_dtypes_are_summed_in_float32():
    x = jnp.ones(4096, jnp.bfloat16)  # In bfloat16 a sum of ones stops at 256.
    total = masking.masked_sum(x, where=True)
    assert total.dtype == jnp.float32 and total == 4096.0
    assert masking.masked_mean(jnp.array([1, 2]), where=True) == 1.5
    assert masking.masked_count(jnp.zeros(2**24 + 1, bool), where=True) == 2**24 + 1
    with jax.enable_x64(True):
        wide = masking.masked_mean(jnp.array([1.0, 1.0 + 1e-12]), where=True)
        assert wide.dtype == jnp.float64 and wide > 1.0


def test_axis_follows_numpy():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    where = jnp.ones((2, 3, 1), bool)  # broadcast along the last axis
    np.testing.assert_allclose(masking.masked_mean(x, where=where, axis=(0, 2)), np.mean(x, axis=(0, 2)))
    assert masking.masked_mean(x, where=where, axis=-1).shape == (2, 3)
    assert masking.masked_count(x, where=where) == 24


def test_mask_of_another_rank_raises():
    with pytest.raises(ValueError, match="rank"):
        masking.masked_mean(jnp.ones((2, 3)), where=jnp.ones(3, bool))
