# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rlhf_jax import rewards, types

B, T = 4, 5
compiled = jax.jit(rewards.token_rewards)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, T), min_size=B, max_size=B), kl_coef=st.floats(0, 2)
)
def test_token_rewards_agree_with_a_loop(seed, lengths, kl_coef):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=B)
    logprobs, reference = -rng.exponential(size=(2, B, T))
    mask = np.arange(T)[None, :] < np.array(lengths)[:, None]
    expected = np.zeros((B, T))
    for b in range(B):
        for t in range(lengths[b]):
            expected[b, t] = -kl_coef * (logprobs[b, t] - reference[b, t]) + (t == lengths[b] - 1) * scores[b]
    garbage = np.where(mask, logprobs, np.nan)
    got = compiled(scores, garbage, np.where(mask, reference, -np.inf), mask, kl_coef=kl_coef)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_token_rewards_match_hand_computed_values():
    got = rewards.token_rewards(
        jnp.array([2.0, -1.0]),
        jnp.array([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]]),
        jnp.array([[-1.5, -2.0, -1.0], [-3.0, 0.0, 0.0]]),
        jnp.array([[True, True, True], [True, False, False]]),
        kl_coef=0.1,
    )
    np.testing.assert_allclose(got, [[-0.05, 0.0, 2.2], [-1.2, 0.0, 0.0]], atol=1e-6)


def test_rows_without_tokens_have_zero_rewards_even_for_a_nan_score():
    zeros = jnp.zeros((2, 3))
    mask = jnp.array([[False] * 3, [True, True, False]])
    got = rewards.token_rewards(jnp.array([jnp.nan, 1.0]), zeros, zeros, mask, kl_coef=0.1)
    np.testing.assert_array_equal(got, [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
def test_scores_of_any_dtype_become_float32(dtype):
    zeros = jnp.zeros((1, 2))
    got = rewards.token_rewards(jnp.array([3], dtype), zeros, zeros, jnp.ones((1, 2), bool), kl_coef=0.5)
    assert got.dtype == jnp.float32 and got[0, 1] == 3.0
    got = rewards.token_rewards(jnp.array([0.7]), zeros, zeros, jnp.ones((1, 2), jnp.int32), kl_coef=0.5)
    assert got[0, 1] == jnp.float32(0.7)


def test_row_sums_are_the_sequence_level_objective():
    rng = np.random.default_rng(3)
    scores, (logprobs, reference) = rng.normal(size=B), rng.normal(size=(2, B, T))
    mask = np.arange(T)[None, :] < np.array([5, 2, 0, 1])[:, None]
    got = rewards.token_rewards(scores, logprobs, reference, mask, kl_coef=0.3).sum(axis=-1)
    expected = np.where(mask.any(1), scores, 0) - 0.3 * np.sum((logprobs - reference) * mask, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_score_is_at_the_last_real_token_if_the_mask_has_a_gap():
    zeros = jnp.zeros((1, 4))
    got = rewards.token_rewards(jnp.ones(1), zeros, zeros, jnp.array([[True, False, True, False]]), kl_coef=0.1)
    np.testing.assert_array_equal(got, [[0.0, 0.0, 1.0, 0.0]])


def test_vmap_over_the_coefficient_equals_a_loop():
    rng = np.random.default_rng(4)
    arguments = (rng.normal(size=B), *rng.normal(size=(2, B, T)), np.ones((B, T), bool))
    coefficients = jnp.array([0.0, 0.1, 1.0])
    swept = jax.vmap(lambda c: rewards.token_rewards(*arguments, kl_coef=c))(coefficients)
    looped = jnp.stack([rewards.token_rewards(*arguments, kl_coef=float(c)) for c in coefficients])
    np.testing.assert_allclose(swept, looped, rtol=1e-6)


def test_unfinished_responses_get_the_fixed_score_or_the_penalty():
    scores, stopped = jnp.array([2, -3, 5]), jnp.array([True, False, False])
    np.testing.assert_allclose(rewards.replace_unfinished(scores, stopped, score=-1.5), [2.0, -1.5, -1.5])
    np.testing.assert_allclose(rewards.penalise_unfinished(scores, stopped, penalty=1.5), [2.0, -4.5, 3.5])
    per_sweep = jax.vmap(lambda s: rewards.replace_unfinished(scores, stopped, score=s))(jnp.array([-1.0, 0.0]))
    np.testing.assert_allclose(per_sweep[:, 1], [-1.0, 0.0])


@hypothesis.given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, T), min_size=B, max_size=B))
def test_scores_of_tokens_are_added_at_their_tokens(seed, lengths):
    rng = np.random.default_rng(seed)
    scores, logprobs, reference = rng.normal(size=(3, B, T))
    mask = np.arange(T)[None, :] < np.array(lengths)[:, None]
    expected = np.where(mask, scores - 0.3 * (logprobs - reference), 0.0)
    got = compiled(np.where(mask, scores, np.nan), logprobs, reference, mask, kl_coef=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # Scores at the last tokens only are the scores of whole responses, to the bit.
    whole, last = (
        scores[:, 0],
        np.where(mask & (np.arange(T)[None, :] == np.array(lengths)[:, None] - 1), scores[:, :1], 0.0),
    )
    both = (compiled(each, logprobs, reference, mask, kl_coef=0.3) for each in (whole, last))
    np.testing.assert_array_equal(*both)


def test_weighted_puts_scores_of_responses_at_the_last_token_beside_scores_of_tokens():
    mask = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    rollout = types.Rollout(mask, mask, mask, mask, mask.sum(1), mask.sum(1))
    parts = {"steps": lambda p, r: jnp.arange(9.0).reshape(3, 3), "whole": lambda p, r: p * jnp.array([1, 2, 3])}
    score = jax.jit(rewards.weighted(parts, {"steps": 2.0, "whole": 0.5}))
    np.testing.assert_allclose(score({"steps": None, "whole": 10.0}, rollout), [[0, 7, 0], [6, 8, 20], [0, 0, 0]])


@hypothesis.given(seed=st.integers(0, 1000), coef=st.floats(0, 3))
def test_the_penalty_for_disagreement_agrees_with_a_loop(seed, coef):
    scores = np.random.default_rng(seed).normal(size=(B, 3))
    means = [sum(row) / 3 for row in scores]
    stds = [np.sqrt(sum((x - mean) ** 2 for x in row) / 3) for row, mean in zip(scores, means)]
    expected = np.array(means) - coef * np.array(stds)
    np.testing.assert_allclose(rewards.penalise_disagreement(scores, coef=coef), expected, rtol=1e-5, atol=1e-5)


def test_an_ensemble_that_agrees_has_no_penalty():
    scores = np.repeat(np.array([[1.0], [-2.0]]), 4, axis=1)
    np.testing.assert_array_equal(rewards.penalise_disagreement(scores, coef=10.0), [1.0, -2.0])


def test_a_python_function_may_score_every_token():
    mask = jnp.array([[True, True, False], [True, False, False]])
    rollout = types.Rollout(mask, mask, mask, mask, mask.sum(1), mask.sum(1))

    def call(numbers):
        score = rewards.from_python(lambda tokens, mask, response: numbers, per_token=True)
        return jax.block_until_ready(jax.jit(lambda r: score(None, r))(rollout))

    got = call([[1, 2, np.nan], [3, 4, 5]])
    np.testing.assert_array_equal(got, [[1, 2, 0], [3, 0, 0]])
    assert got.dtype == jnp.float32
    for wrong, text in (
        ([1, 2], "number per token"),
        ([[1, np.inf, 0], [0, 0, 0]], "inf for response 0 of 2, token 1"),
    ):
        with pytest.raises(Exception, match=text):
            call(wrong)


def test_mismatched_shapes_raise():
    square, call = jnp.zeros((2, 3)), partial(rewards.token_rewards, kl_coef=0.1)
    for wrong in (jnp.zeros((2, 1)), jnp.zeros(3), jnp.zeros(()), jnp.zeros((2, 3, 1))):
        with pytest.raises(ValueError, match="score per row or per token"):
            call(wrong, square, square, square)
    with pytest.raises(ValueError, match="shapes"):
        call(jnp.zeros(2), square, jnp.zeros((2, 4)), square)
