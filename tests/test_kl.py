# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kl


def quadrature():
    """Returns quadrature points and weights for expectations under N(0, 1)."""
    x = np.linspace(-12.0, 12.0, 20_001)
    w = np.exp(-0.5 * x**2)
    return x, w / w.sum()


@pytest.mark.parametrize(
    ("mean", "true_kl", "spreads", "k2_bias"),
    [(0.1, 0.005, (20.0, 1.42, 1.42), 0.0025), (1.0, 0.5, (2.00, 1.73, 1.70), 0.25)],
)
def test_bias_and_spread_of_the_estimators_on_two_gaussians(mean, true_kl, spreads, k2_bias):
    """Checks the published table for N(0, 1) against N(0.1, 1) and N(1, 1)."""
    x, w = quadrature()
    logprobs = jnp.asarray(-0.5 * x**2, jnp.float32)
    # The difference is computed directly, because 72 - 72.6 would lose digits in float32.
    reference = logprobs + jnp.asarray(mean * x - 0.5 * mean**2, jnp.float32)
    for estimator, spread, bias in zip((kl.k1, kl.k2, kl.k3), spreads, (0.0, k2_bias, 0.0), strict=True):
        sample = np.asarray(estimator(logprobs, reference), np.float64)
        expected = np.sum(w * sample)
        assert (expected - true_kl) / true_kl == pytest.approx(bias, abs=2e-4)
        deviation = np.sqrt(np.sum(w * (sample - expected) ** 2))
        assert deviation / true_kl == pytest.approx(spread, abs=0.006)


def test_estimators_match_hand_computed_values():
    logprobs, reference = jnp.array([-1.0, -3.0, 0.0]), jnp.array([-2.0, -1.0, 0.0])
    np.testing.assert_allclose(kl.k1(logprobs, reference), [1.0, -2.0, 0.0])
    np.testing.assert_allclose(kl.k2(logprobs, reference), [0.5, 2.0, 0.0])
    np.testing.assert_allclose(kl.k3(logprobs, reference), [np.exp(-1), np.exp(2) - 3, 0.0], rtol=1e-6)


def test_k3_is_precise_near_zero_and_never_negative():
    rho = jnp.array([1e-4, -1e-4, 1e-3, -3e-5])
    np.testing.assert_allclose(kl.k3(rho, jnp.zeros(4)), np.square(rho) / 2, rtol=5e-3)
    assert jnp.all(kl.k3(jnp.linspace(-40.0, 40.0, 1001), jnp.zeros(1001)) >= 0.0)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_log_ratios_have_finite_values_and_gradients_of_the_right_sign(margin):
    for estimator in (kl.k2, kl.k3):
        value, gradient = jax.value_and_grad(estimator)(margin, 0.0)
        assert np.isfinite(value) and np.isfinite(gradient)
        assert np.sign(gradient) == np.sign(margin)


def test_ratio_is_exact_up_to_its_bound_and_then_follows_the_tangent():
    got = kl.ratio(jnp.array([-30.0, 0.5, 19.0, 22.0]), jnp.zeros(4))
    np.testing.assert_allclose(got, [np.exp(-30), np.exp(0.5), np.exp(19), np.exp(20) * (1 + 2)], rtol=1e-5)


def test_estimators_as_losses_have_three_different_gradients():
    theta = jnp.array([0.3, -0.2, 0.9, 0.0])
    reference = jax.nn.log_softmax(jnp.array([-0.5, 0.4, 0.1, 0.6]))
    probs = jax.nn.softmax(theta)  # The samples are fixed, so the weights are not differentiated.

    def expected_gradient(estimator):
        return jax.grad(lambda theta: jnp.sum(probs * estimator(jax.nn.log_softmax(theta), reference)))(theta)

    reverse = jax.grad(lambda theta: kl.full(theta, reference))(theta)
    forward = jax.grad(lambda theta: kl.full(reference, theta))(theta)
    np.testing.assert_allclose(expected_gradient(kl.k1), jnp.zeros(4), atol=1e-6)
    np.testing.assert_allclose(expected_gradient(kl.k2), reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(expected_gradient(kl.k3), forward, rtol=1e-4, atol=1e-6)
    assert jnp.max(jnp.abs(reverse - forward)) > 0.01


def test_full_is_the_expectation_of_k1():
    rng = np.random.default_rng(0)
    logits, reference = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.exp(reference) / np.exp(reference).sum(-1, keepdims=True)
    got = kl.full(logits, reference)
    assert got.shape == (3, 5)
    np.testing.assert_allclose(got, np.sum(p * np.log(p / q), axis=-1), rtol=1e-4)
    np.testing.assert_allclose(kl.full(logits, logits + 3.0), np.zeros((3, 5)), atol=1e-5)


def test_full_handles_impossible_tokens():
    logits, reference = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([1.0, 0.0, -jnp.inf])
    value, gradient = jax.value_and_grad(kl.full)(logits, reference)
    np.testing.assert_allclose(value, kl.full(logits[:2], reference[:2]), rtol=1e-6)
    assert jnp.all(jnp.isfinite(gradient)) and gradient[2] == 0.0
    assert kl.full(jnp.zeros(2), jnp.array([0.0, -jnp.inf])) == jnp.inf


def test_different_shapes_raise():
    with pytest.raises(ValueError, match="shapes"):
        kl.k1(jnp.zeros(3), jnp.zeros((3, 1)))


def test_controllers_follow_the_paper_and_the_released_code():
    state = kl.init_controller(0.2)
    up = kl.update_controller(state, jnp.float32(60.0), target=6.0)  # The error is clipped to 0.2.
    np.testing.assert_allclose(up.kl_coef, 0.2 * 1.02, rtol=1e-6)
    down = kl.update_controller(state, jnp.float32(0.6), target=6.0)  # The error is clipped to -0.2.
    np.testing.assert_allclose(down.kl_coef, 0.2 * 0.98, rtol=1e-6)
    near = kl.update_controller(state, jnp.float32(5.4), target=6.0)
    np.testing.assert_allclose(near.kl_coef, 0.2 * 0.99, rtol=1e-6)
    code = kl.update_controller_by_horizon(state, jnp.float32(60.0), target=6.0, episodes=512)
    np.testing.assert_allclose(code.kl_coef, 0.2 * (1 + 0.2 * 0.0512), rtol=1e-6)


def test_controller_doubles_and_halves():
    state = kl.init_controller(0.2)
    for observed, expected in ((9.1, 0.4), (8.9, 0.2), (4.1, 0.2), (3.9, 0.1)):
        got = kl.update_controller_by_doubling(state, jnp.float32(observed), target=6.0)
        np.testing.assert_allclose(got.kl_coef, expected, rtol=1e-6)


def test_controller_converges_to_its_target():
    """If the KL is 3 / coef, a coefficient of 0.5 leads to 6 nats."""

    def step(state, _):
        return kl.update_controller(state, 3.0 / state.kl_coef, target=6.0), None

    final, _ = jax.lax.scan(step, kl.init_controller(0.05), None, length=400)
    np.testing.assert_allclose(final.kl_coef, 0.5, rtol=1e-3)
