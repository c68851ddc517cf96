# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rlhf_jax import losses, masking

K = 5
seeds = st.integers(0, 2**32 - 1)
LOG2 = np.log(2.0)


# Policy and value


@hypothesis.given(seed=seeds)
def test_clipped_losses_agree_with_numpy(seed):
    rng = np.random.default_rng(seed)
    new, old, advantages, returns = rng.normal(scale=0.4, size=(4, 64))
    ratio = np.exp(new - old)
    surrogate = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    np.testing.assert_allclose(losses.clipped_policy(new, old, advantages), surrogate, rtol=1e-4, atol=1e-6)
    clipped = np.clip(new, old - 0.2, old + 0.2)
    squares = 0.5 * np.maximum((new - returns) ** 2, (clipped - returns) ** 2)
    np.testing.assert_allclose(losses.clipped_value(new, old, returns), squares, rtol=1e-4, atol=1e-6)


def test_clipped_policy_matches_hand_computed_values():
    new, old = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5])), jnp.zeros(4)
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(losses.clipped_policy(new, old, advantages), [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(losses.clipped_policy(x, old, advantages)))(new)
    np.testing.assert_allclose(gradient, [0.0, 1.5, -0.5, 0.0], rtol=1e-6)  # Clipped tokens have no gradient.
    clipped = losses.policy_is_clipped(new, old, advantages)
    np.testing.assert_array_equal(clipped, [True, False, False, True])


def test_importance_weights_are_capped_and_have_no_gradient():
    behaviour = jnp.log(jnp.array([0.5, 0.25, 0.1]))
    logprobs = jnp.log(jnp.array([0.25, 0.5, 0.9]))
    np.testing.assert_allclose(losses.importance_weights(logprobs, behaviour), [0.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(losses.importance_weights(logprobs, behaviour, cap=5.0), [0.5, 2.0, 5.0], rtol=1e-6)
    assert not jax.grad(lambda x: losses.importance_weights(x, behaviour).sum())(logprobs).any()


def test_clipped_policy_has_the_gradient_of_reinforce_at_ratio_one():
    logprobs, advantages = jnp.array([-1.0, -2.0, -0.5]), jnp.array([0.7, -1.1, 0.0])

    def ppo(x):
        return jnp.sum(losses.clipped_policy(x, logprobs, advantages))

    gradient = jax.grad(ppo)(logprobs)
    np.testing.assert_allclose(gradient, -advantages, rtol=1e-6)
    reinforce = jax.grad(lambda x: jnp.sum(losses.reinforce(x, advantages)))(logprobs)
    np.testing.assert_allclose(gradient, reinforce, rtol=1e-6)
    np.testing.assert_allclose(losses.reinforce(logprobs, advantages), -advantages * logprobs, rtol=1e-6)


def test_arrays_fixed_during_the_epochs_get_no_gradient():
    x = jnp.array([0.3, -0.2])
    frozen = (
        jax.grad(lambda old, a: jnp.sum(losses.clipped_policy(x, old, a)), argnums=(0, 1))(0.9 * x, x),
        jax.grad(lambda old, r: jnp.sum(losses.clipped_value(x, old, r)), argnums=(0, 1))(0.1 * x, x + 1.0),
        jax.grad(lambda a: jnp.sum(losses.reinforce(x, a)))(x),
    )
    for gradient in jax.tree.leaves(frozen):
        np.testing.assert_array_equal(gradient, 0.0)


def test_value_loss_has_the_factor_one_half_and_is_clipped():
    values, old, returns = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.9]), jnp.array([2.0, 2.0])
    # The first value moves by 1.0; clipped to 0.2, its loss is larger. The second moves by 0.1 and is not clipped.
    np.testing.assert_allclose(losses.clipped_value(values, old, returns), [0.5 * 1.8**2, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(losses.value_is_clipped(values, old, returns), [True, False])
    # A value that moves away from its target has the larger loss unclipped.
    assert not losses.value_is_clipped(-1.0, 0.0, 2.0)
    np.testing.assert_allclose(losses.squared_value(values, returns), [0.5, 0.5])
    wide = losses.clipped_value(values, old, returns, clip=100.0)
    np.testing.assert_allclose(wide, losses.squared_value(values, returns))
    gradient = jax.grad(lambda v: jnp.sum(losses.clipped_value(v, old, returns)))(values)
    np.testing.assert_allclose(gradient, [0.0, -1.0])


def test_explained_variance():
    returns, where = jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.array([True, True, True, False])
    assert losses.explained_variance(returns, returns, where=where) == 1.0
    constant = losses.explained_variance(jnp.full(4, 2.0), returns, where=where)
    np.testing.assert_allclose(constant, 0.0, atol=1e-6)
    assert losses.explained_variance(jnp.zeros(3), jnp.ones(3)) == 0.0
    rng = np.random.default_rng(0)
    values, returns, where = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.6
    expected = 1 - np.mean((values - returns)[where] ** 2) / np.var(returns[where])
    np.testing.assert_allclose(losses.explained_variance(values, returns, where=where), expected, rtol=1e-5)
    local = jax.vmap(lambda v, r, w: losses.explained_variance(v, r, where=w, axis_name="d"), axis_name="d")
    np.testing.assert_allclose(local(values, returns, where), np.full(4, expected), rtol=1e-5)


# Supervised


def test_next_token_loss_is_the_negative_logprob():
    mean = masking.masked_mean(losses.next_token(jnp.array([-1.0, -3.0, 0.0])), where=jnp.array([True, True, False]))
    assert mean == 2.0


def test_distillation_merges_the_rest_of_the_vocabulary_into_one_class():
    teacher, student = np.array([0.5, 0.2, 0.2, 0.05, 0.05]), np.array([0.1, 0.3, 0.2, 0.1, 0.3])
    logprobs, ids = losses.top_k_logprobs(jnp.log(teacher), k=2)
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.2]), rtol=1e-5)
    ids = jnp.array([0, 2])
    at_ids = losses.gather_logprobs(jnp.log(student) + 7.0, ids)
    np.testing.assert_allclose(at_ids, np.log([0.1, 0.2]), rtol=1e-5)
    p, q = np.array([0.5, 0.2, 0.3]), np.array([0.1, 0.2, 0.7])
    np.testing.assert_allclose(losses.distill(at_ids, logprobs), np.sum(p * np.log(p / q)), rtol=1e-5)
    np.testing.assert_allclose(losses.distill_cross_entropy(at_ids, logprobs), -np.sum(p * np.log(q)), rtol=1e-5)


def test_distillation_gradient_is_the_difference_of_class_probabilities():
    rng = np.random.default_rng(0)
    teacher, student = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    logprobs, ids = losses.top_k_logprobs(teacher, k=3)
    kl_gradient, ce_gradient = (
        jax.jit(jax.grad(lambda s, f=f: jnp.sum(f(losses.gather_logprobs(s, ids), logprobs))))(student)
        for f in (losses.distill, losses.distill_cross_entropy)
    )
    np.testing.assert_allclose(kl_gradient, ce_gradient, rtol=1e-4, atol=1e-6)
    at_ids = losses.gather_logprobs(student, ids)
    for loss in (losses.distill, losses.distill_cross_entropy):
        into_teacher = jax.grad(lambda t, loss=loss: jnp.sum(loss(at_ids, t)))(logprobs)
        np.testing.assert_array_equal(into_teacher, 0.0)
    q = np.asarray(jax.nn.softmax(student))
    expected = np.zeros((4, 6))
    for row in range(4):
        top = list(np.asarray(ids[row]))
        rest = [v for v in range(6) if v not in top]
        expected[row, top] = q[row, top] - np.exp(logprobs[row])
        teacher_rest = 1 - np.sum(np.exp(logprobs[row]))
        expected[row, rest] = q[row, rest] - teacher_rest * q[row, rest] / q[row, rest].sum()
    np.testing.assert_allclose(kl_gradient, expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_teacher_and_student_exclude_add_nothing():
    teacher, student = np.array([0.5, 0.2, 0.0]), np.array([0.1, 0.3, 0.0])
    p, q = np.array([0.5, 0.2, 0.3]), np.array([0.1, 0.3, 0.6])
    arguments = jnp.log(jnp.array(student)), jnp.log(jnp.array(teacher))
    np.testing.assert_allclose(losses.distill(*arguments), np.sum(p * np.log(p / q)), rtol=1e-5)
    np.testing.assert_allclose(losses.distill_cross_entropy(*arguments), -np.sum(p * np.log(q)), rtol=1e-5)


def test_perfect_student_has_zero_loss_and_gradient():
    teacher = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    logprobs, ids = losses.top_k_logprobs(teacher, k=4)

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        return jnp.sum(losses.distill(losses.gather_logprobs(student, ids), logprobs))

    value, gradient = loss(teacher)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((3, 8)), atol=1e-6)


def test_student_without_mass_on_the_rest_gets_a_finite_gradient():
    """The student puts all its mass on the listed tokens; the teacher puts 40 % on the others."""
    teacher = jnp.log(jnp.array([0.3, 0.3]))
    student = jnp.array([20.0, 20.0, 0.0, 0.0])
    ids = jnp.array([0, 1])

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        return losses.distill(losses.gather_logprobs(student, ids), teacher)

    value, gradient = loss(student)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    assert jnp.all(gradient[2:] < 0.0)  # A descent step raises the probability of the other tokens.
