# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rlhf_jax import advantages

T = 7
compiled = jax.jit(advantages.gae)
lengths = st.integers(0, T)
seeds = st.integers(0, 2**32 - 1)
unit = st.floats(0.0, 1.0)


def episode(seed, length):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, T))
    return rewards, values, np.arange(T) < length


def gae_by_hand(rewards, values, length, discount, lambda_):
    """Computes the definition, a double sum of discounted temporal differences."""
    values = np.append(values[:length], 0.0)
    deltas = [rewards[t] + discount * values[t + 1] - values[t] for t in range(length)]
    out = np.zeros(T)
    for t in range(length):
        out[t] = sum((discount * lambda_) ** (s - t) * deltas[s] for s in range(t, length))
    return out


@hypothesis.given(seed=seeds, length=lengths, discount=unit, lambda_=unit)
def test_gae_agrees_with_its_definition_and_ignores_elements_off_the_mask(seed, length, discount, lambda_):
    rewards, values, mask = episode(seed, length)
    expected = gae_by_hand(rewards, values, length, discount, lambda_)
    garbage = np.where(mask, rewards, np.nan), np.where(mask, values, np.inf)
    got, returns = compiled(*garbage, mask, discount=discount, lambda_=lambda_)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0.0), rtol=1e-4, atol=1e-5)


def test_gae_matches_hand_computed_values():
    got, returns = advantages.gae(
        jnp.array([0.0, 1.0, 5.0]),
        jnp.array([0.5, 0.25, 9.0]),
        jnp.array([True, True, False]),
        discount=0.5,
        lambda_=0.5,
    )
    # delta_1 = 1 - 0.25, delta_0 = 0.5 * 0.25 - 0.5, A_0 = delta_0 + 0.25 * delta_1
    np.testing.assert_allclose(got, [-0.1875, 0.75, 0.0])
    np.testing.assert_allclose(returns, [0.3125, 1.0, 0.0])


@hypothesis.given(seed=seeds, length=lengths, discount=unit)
def test_lambda_one_is_monte_carlo_and_lambda_zero_is_temporal_difference(seed, length, discount):
    rewards, values, mask = episode(seed, length)
    _, returns = compiled(rewards, values, mask, discount=discount, lambda_=1.0)
    monte_carlo = [sum(discount ** (s - t) * rewards[s] for s in range(t, length)) for t in range(T)]
    np.testing.assert_allclose(returns, monte_carlo, rtol=1e-4, atol=1e-5)
    td, _ = compiled(rewards, values, mask, discount=discount, lambda_=0.0)
    following = np.append(np.where(mask, values, 0.0)[1:], 0.0)
    np.testing.assert_allclose(td, np.where(mask, rewards + discount * following - values, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 4])
def test_masked_gae_equals_truncated_gae(length):
    rewards, values, mask = episode(0, length)
    masked, masked_returns = advantages.gae(rewards, values, mask)
    truncated, truncated_returns = advantages.gae(rewards[:length], values[:length], mask[:length])
    np.testing.assert_allclose(masked[:length], truncated, rtol=1e-6)
    np.testing.assert_allclose(masked_returns[:length], truncated_returns, rtol=1e-6)


def test_integer_rewards_can_have_fractional_advantages():
    got, _ = advantages.gae(jnp.array([0, 1]), jnp.array([0.25, 0.5]), jnp.ones(2, bool), lambda_=0.0)
    np.testing.assert_allclose(got, [0.25, 0.5])


def test_values_and_elements_off_the_mask_get_no_gradient():
    rewards, values, mask = episode(1, 4)

    def total(rewards, values):
        got, returns = advantages.gae(rewards, values, mask)
        return jnp.sum(got) + jnp.sum(returns)

    by_rewards, by_values = jax.grad(total, argnums=(0, 1))(
        jnp.asarray(np.where(mask, rewards, np.nan)), jnp.asarray(np.where(mask, values, np.nan))
    )
    np.testing.assert_array_equal(by_values, 0.0)
    assert jnp.all(jnp.isfinite(by_rewards)) and jnp.all(by_rewards[4:] == 0.0) and by_rewards[3] > 0.0


def test_nan_on_the_mask_propagates():
    rewards, values, mask = episode(2, 4)
    rewards[1] = np.nan
    got, _ = advantages.gae(rewards, values, mask)
    np.testing.assert_array_equal(np.isnan(got), [True, True, False, False, False, False, False])


def test_vmap_over_batch_and_hyperparameters_equals_a_loop():
    rng = np.random.default_rng(5)
    rewards, values = rng.normal(size=(2, 3, T)).astype(np.float32)
    mask = np.arange(T)[None, :] < np.array([7, 3, 0])[:, None]
    batch = jax.vmap(partial(advantages.gae, discount=0.9))(rewards, values, mask)
    for row in range(3):
        one = advantages.gae(rewards[row], values[row], mask[row], discount=0.9)
        for got, expected in zip(batch, one, strict=True):
            np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-7)

    lambdas = jnp.array([0.0, 0.5, 1.0])
    swept = jax.vmap(lambda x: advantages.gae(rewards[0], values[0], mask[0], lambda_=x)[0])(lambdas)
    looped = jnp.stack([advantages.gae(rewards[0], values[0], mask[0], lambda_=float(x))[0] for x in lambdas])
    np.testing.assert_allclose(swept, looped, rtol=1e-6, atol=1e-7)


@hypothesis.given(scores=st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4))
def test_rloo_is_leave_one_out_and_a_scaled_mean_baseline(scores):
    scores = np.array(scores)
    got = advantages.rloo(scores)
    for i in range(4):
        np.testing.assert_allclose(got[i], scores[i] - np.delete(scores, i).mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores - scores.mean(), 3 / 4 * np.asarray(got), rtol=1e-4, atol=1e-5)


def test_group_normalize_uses_the_population_standard_deviation():
    np.testing.assert_allclose(advantages.group_normalize(jnp.array([1.0, 3.0])), [-1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(advantages.group_center(jnp.array([1, 2, 6])), [-2.0, -1.0, 3.0], rtol=1e-6)
    scores = np.random.default_rng(6).normal(5.0, 3.0, 8)
    expected = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(advantages.group_normalize(scores), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [0.1, 1000.1, -7.3])
def test_groups_of_equal_scores_have_zero_advantages(score):
    for function in (advantages.rloo, advantages.group_normalize, advantages.group_center):
        np.testing.assert_array_equal(function(jnp.full(7, score)), 0.0)


def test_group_of_one_raises():
    for function in (advantages.rloo, advantages.group_normalize):
        with pytest.raises(ValueError, match="at least 2"):
            function(jnp.ones(1))


def test_group_functions_require_rank_1_and_vmap_over_prompts():
    with pytest.raises(ValueError, match="rank 1"):
        advantages.rloo(jnp.ones((3, 4)))
    scores = jnp.array([[1.0, 2.0], [100.0, 104.0]])
    np.testing.assert_allclose(jax.vmap(advantages.rloo)(scores), [[-1.0, 1.0], [-4.0, 4.0]])


def test_gae_rejects_wrong_ranks_and_lengths():
    with pytest.raises(ValueError, match="rank 1"):
        advantages.gae(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="shapes"):
        advantages.gae(jnp.ones(3), jnp.ones(4), jnp.ones(3, bool))
