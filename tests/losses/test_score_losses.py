# These tests pass NumPy arrays and Python scalars as jax.Array.
# pyright: reportArgumentType=false, reportCallIssue=false
import itertools
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rlhf_jax import losses

K = 5
seeds = st.integers(0, 2**32 - 1)
LOG2 = np.log(2.0)


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# Pairs of scores


def test_pairwise_matches_hand_computed_values():
    chosen, rejected = jnp.array([0.0, 2.0, -1.0]), jnp.array([0.0, 1.0, 1.0])
    np.testing.assert_allclose(losses.pairwise(chosen, rejected), [LOG2, softplus(-1), softplus(2)], rtol=1e-6)
    with_margin = losses.pairwise(chosen, rejected, margin=0.5)
    np.testing.assert_allclose(with_margin, [softplus(0.5), softplus(-0.5), softplus(2.5)], rtol=1e-6)
    soft = losses.pairwise(chosen, rejected, target=jnp.array([0.5, 0.9, 0.0]))
    expected = [LOG2, 0.9 * softplus(-1) + 0.1 * softplus(1), softplus(-2)]
    np.testing.assert_allclose(soft, expected, rtol=1e-6)


def test_soft_label_loss_is_minimal_if_the_model_agrees_with_the_label():
    p = 0.7
    gradient = jax.grad(lambda d: losses.pairwise(d, 0.0, target=p))
    assert abs(gradient(np.log(p / (1 - p)))) < 1e-6
    assert gradient(0.0) < 0.0 < gradient(2.0)


def test_swapping_a_pair_and_its_label_leaves_the_loss_unchanged():
    a, b = jnp.array([0.3, -2.0]), jnp.array([1.0, 5.0])
    np.testing.assert_allclose(losses.pairwise(a, b, target=0.2), losses.pairwise(b, a, target=0.8), rtol=1e-6)


def test_reward_centering_matches_a_hand_computed_value():
    np.testing.assert_allclose(
        losses.reward_centering(jnp.array([1.0]), jnp.array([2.0]), coef=0.01), [0.09], rtol=1e-6
    )


# K-way ranking


def ranking_by_hand(scores, ranks, where, ties_in_divisor):
    pairs = [(i, j) for i, j in itertools.permutations(range(K), 2) if where[i] and where[j] and ranks[i] < ranks[j]]
    total = sum(softplus(scores[j] - scores[i]) for i, j in pairs)
    n = int(np.sum(where))
    return total / max(n * (n - 1) // 2 if ties_in_divisor else len(pairs), 1), bool(pairs)


compiled_ranking = {
    ties: jax.jit(lambda s, r, w, ties=ties: losses.ranking(s, r, where_K=w, ties_in_divisor=ties))
    for ties in (True, False)
}
ranking_gradient = jax.jit(jax.grad(lambda s, r, w: losses.ranking(s, r, where_K=w)))
compiled_has_pairs = jax.jit(losses.has_pairs)


@hypothesis.given(
    seed=seeds,
    ranks=st.lists(st.integers(1, 3), min_size=K, max_size=K),
    where=st.lists(st.booleans(), min_size=K, max_size=K),
)
def test_ranking_agrees_with_a_loop_over_pairs(seed, ranks, where):
    scores, ranks, where = np.random.default_rng(seed).normal(size=K), np.array(ranks), np.array(where)
    garbage = np.where(where, scores, np.nan)
    for ties in (True, False):
        expected, any_pair = ranking_by_hand(scores, ranks, where, ties)
        np.testing.assert_allclose(compiled_ranking[ties](garbage, ranks, where), expected, rtol=1e-5)
    assert compiled_has_pairs(ranks, where) == any_pair
    gradient = ranking_gradient(garbage, ranks, where)
    np.testing.assert_array_equal(gradient[~where], 0.0)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0.0) == any_pair


def test_ranking_divisor_counts_ties_by_default():
    scores, ranks = jnp.array([1.0, 0.0, 0.0]), jnp.array([1, 2, 2])
    two_pairs = 2 * softplus(-1.0)
    np.testing.assert_allclose(losses.ranking(scores, ranks), two_pairs / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.ranking(scores, ranks, ties_in_divisor=False), two_pairs / 2, rtol=1e-6)


def test_ranking_of_two_is_pairwise():
    scores = jnp.array([0.3, 1.2])
    np.testing.assert_allclose(losses.ranking(scores, jnp.array([2, 1])), losses.pairwise(1.2, 0.3), rtol=1e-6)


def test_prompts_without_pairs_can_be_left_out_of_a_batch_mean():
    scores = jnp.array([[1.0, 0.0, 3.0], [1.0, 2.0, 3.0], [5.0, 0.0, 0.0]])
    ranks = jnp.array([[1, 2, 3], [1, 1, 1], [1, 2, 3]])
    where = jnp.array([[True, True, False], [True, True, True], [True, False, False]])
    per_prompt = jax.vmap(losses.ranking)(scores, ranks, where_K=where)
    kept = jax.vmap(losses.has_pairs)(ranks, where)
    np.testing.assert_array_equal(kept, [True, False, False])
    np.testing.assert_allclose(losses.masked_mean(per_prompt, where=kept), softplus(-1.0), rtol=1e-6)


def test_ranking_does_not_depend_on_the_order_of_completions():
    scores, ranks = np.random.default_rng(0).normal(size=K), np.array([3, 1, 2, 2, 5])
    order = np.array([4, 2, 0, 1, 3])
    for loss in (losses.ranking, losses.plackett_luce):
        np.testing.assert_allclose(loss(scores[order], ranks[order]), loss(scores, ranks), rtol=1e-5)


def test_plackett_luce_is_the_likelihood_of_picking_in_order():
    scores, ranks = np.array([0.2, -1.0, 0.7, 9.0]), np.array([2, 3, 1, 0])
    where = np.array([True, True, True, False])
    best_first = [0.7, 0.2, -1.0]
    expected = sum(np.log(np.sum(np.exp(best_first[i:]))) - best_first[i] for i in range(3))
    np.testing.assert_allclose(losses.plackett_luce(scores, ranks, where_K=where), expected, rtol=1e-5)
    garbage = np.where(where, scores, np.nan)
    gradient = jax.jit(jax.grad(lambda s: losses.plackett_luce(s, ranks, where_K=where)))(garbage)
    assert np.all(np.isfinite(gradient)) and gradient[3] == 0.0 and gradient[2] < 0.0
    two = losses.plackett_luce(jnp.array([0.3, 1.2]), jnp.array([2, 1]))
    np.testing.assert_allclose(two, losses.pairwise(1.2, 0.3), rtol=1e-6)
    assert losses.plackett_luce(scores, ranks, where_K=np.zeros(4, bool)) == 0.0


def test_best_of_n_choice_is_a_softmax_over_existing_completions():
    scores = jnp.array([1.0, -0.5, 2.0, jnp.nan])
    where = jnp.array([True, True, True, False])
    three = np.array([1.0, -0.5, 2.0])
    for choice in range(3):
        expected = np.log(np.sum(np.exp(three))) - three[choice]
        np.testing.assert_allclose(losses.best_of_n_choice(scores, choice, where_K=where), expected, rtol=1e-5)
    gradient = jax.grad(lambda s: losses.best_of_n_choice(s, 2, where_K=where))(scores)
    np.testing.assert_allclose(gradient[:3], np.exp(three) / np.sum(np.exp(three)) - [0, 0, 1], atol=1e-6)
    assert gradient[3] == 0.0
    for invalid in (3, 4, -1):
        assert jnp.isnan(losses.best_of_n_choice(scores.at[3].set(0.5), invalid, where_K=where))


# Direct preference losses

PAIR = tuple(jnp.array(x) for x in ([-10.0, -4.0], [-12.0, -3.0], [-11.0, -5.0], [-11.0, -6.0]))
H = np.array([2.0, -2.0])  # (-10 + 11) - (-12 + 11), (-4 + 5) - (-3 + 6)


def test_direct_losses_match_hand_computed_values():
    beta = 0.5
    np.testing.assert_allclose(losses.log_ratio_margin(*PAIR), H)
    np.testing.assert_allclose(losses.dpo(*PAIR, beta=beta), softplus(-beta * H), rtol=1e-6)
    smoothed = 0.9 * softplus(-beta * H) + 0.1 * softplus(beta * H)
    np.testing.assert_allclose(losses.dpo(*PAIR, beta=beta, label_smoothing=0.1), smoothed, rtol=1e-6)
    np.testing.assert_allclose(losses.ipo(*PAIR, beta=beta), (H - 1.0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(losses.hinge(*PAIR, beta=beta), [0.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(losses.hinge(*PAIR, beta=0.25), [0.5, 1.5], rtol=1e-6)


def test_dpo_gradient_matches_the_paper():
    beta = 0.3
    gradient = jax.grad(lambda w, r: jnp.sum(losses.dpo(w, r, *PAIR[2:], beta=beta)), argnums=(0, 1))(*PAIR[:2])
    weight = -beta * sigmoid(-beta * H)
    np.testing.assert_allclose(gradient[0], weight, rtol=1e-5)
    np.testing.assert_allclose(gradient[1], -weight, rtol=1e-5)


def test_robust_dpo_is_unbiased_for_flipped_labels():
    flip, beta = 0.2, 0.5
    robust = partial(losses.robust_dpo, beta=beta, label_smoothing=flip)
    w, r, ref_w, ref_r = PAIR
    expected = (1 - flip) * robust(w, r, ref_w, ref_r) + flip * robust(r, w, ref_r, ref_w)
    np.testing.assert_allclose(expected, losses.dpo(*PAIR, beta=beta), rtol=1e-5)
    np.testing.assert_allclose(losses.robust_dpo(*PAIR, beta=beta, label_smoothing=0.0), losses.dpo(*PAIR, beta=beta))


def test_kto_values_and_signs():
    policy, reference = jnp.array([-3.0, -3.0]), jnp.array([-4.0, -4.0])
    desirable = jnp.array([True, False])

    def loss(policy, baseline):
        return losses.kto(
            policy, reference, desirable, baseline, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
        )

    expected = [2 * (1 - sigmoid(0.5 * (1 - 0.2))), 3 * (1 - sigmoid(0.5 * (0.2 - 1)))]
    np.testing.assert_allclose(loss(policy, 0.2), expected, rtol=1e-5)
    by_policy, by_baseline = jax.grad(lambda p, b: jnp.sum(loss(p, b)), argnums=(0, 1))(policy, 0.2)
    assert by_policy[0] < 0.0 < by_policy[1] and by_baseline == 0.0


def test_kto_baseline_is_a_mean_clipped_at_zero():
    policy, reference = jnp.array([1.0, 2.0, 9.0]), jnp.array([0.0, 0.0, 0.0])
    where = jnp.array([True, True, False])
    assert losses.kto_baseline(policy, reference, where=where) == 1.5
    assert losses.kto_baseline(reference, policy, where=where) == 0.0
    np.testing.assert_array_equal(jax.grad(lambda p: losses.kto_baseline(p, reference))(policy), 0.0)


def test_orpo_and_simpo_match_hand_computed_values():
    p_w, p_l = 0.6, 0.25
    odds_ratio = np.log(p_w / (1 - p_w)) - np.log(p_l / (1 - p_l))
    expected = -np.log(p_w) + 0.5 * softplus(-odds_ratio)
    np.testing.assert_allclose(losses.orpo(np.log([p_w]), np.log([p_l]), weight=0.5), [expected], rtol=1e-5)
    simpo = losses.simpo(jnp.array([-0.5]), jnp.array([-1.5]), beta=2.0, margin=0.5)
    np.testing.assert_allclose(simpo, [softplus(0.5 - 2.0)], rtol=1e-6)


def test_orpo_is_finite_for_responses_of_probability_one():
    certain = jax.jit(jax.value_and_grad(lambda w, r: losses.orpo(w, r, weight=1.0), argnums=(0, 1)))
    for pair in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e4, -1e-9)):
        value, gradient = certain(*pair)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


POINTWISE = {
    "pairwise": lambda d: losses.pairwise(d, 0.0),
    "soft": lambda d: losses.pairwise(d, 0.0, target=0.7, margin=1.0),
    "dpo": lambda d: losses.dpo(d, 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.1),
    "robust_dpo": lambda d: losses.robust_dpo(d, 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.1),
    "ipo": lambda d: losses.ipo(d, 0.0, 0.0, 0.0, beta=0.1),
    "hinge": lambda d: losses.hinge(d, 0.0, 0.0, 0.0, beta=1.0),
    "kto_good": lambda d: losses.kto(d, 0.0, True, 0.0, beta=1.0),
    "kto_bad": lambda d: losses.kto(d, 0.0, False, 0.0, beta=1.0),
    "orpo": lambda d: losses.orpo(-jnp.abs(d), -1.0, weight=1.0),
    "simpo": lambda d: losses.simpo(d, 0.0, beta=2.0, margin=0.5),
    "ranking": lambda d: losses.ranking(jnp.stack([d, 0.0 * d]), jnp.array([1, 2])),
    "plackett_luce": lambda d: losses.plackett_luce(jnp.stack([d, 0.0 * d]), jnp.array([1, 2])),
    "best_of_n_choice": lambda d: losses.best_of_n_choice(jnp.stack([d, 0.0 * d]), 0),
    "policy_gain": lambda d: losses.clipped_policy(d, 0.0, 1.0),
    "policy_loss": lambda d: losses.clipped_policy(d, 0.0, -1.0),
    "policy_zero": lambda d: losses.clipped_policy(d, 0.0, 0.0),
    "reinforce": lambda d: losses.reinforce(d, 2.0),
    "value": lambda d: losses.clipped_value(d, 0.0, 0.0),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_losses_are_finite_at_huge_margins(name):
    loss = jax.jit(jax.value_and_grad(POINTWISE[name]))
    for margin in (1e4, -1e4):
        value, gradient = loss(jnp.float32(margin))
        assert np.isfinite(value) and np.isfinite(gradient), margin


def test_pairwise_keeps_its_slope_at_large_margins():
    """A naive log of a sigmoid saturates at smaller margins."""
    np.testing.assert_allclose(losses.pairwise(-1e4, 0.0), 1e4, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda d: losses.pairwise(d, 0.0))(-1e4), -1.0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_pointwise_losses_keep_the_shape_of_their_inputs(shape):
    x = jnp.full(shape, -0.5, jnp.bfloat16)
    for out in (
        losses.pairwise(x, x, margin=0.1),
        losses.dpo(x, x, x, x, beta=0.1),
        losses.kto(x, x, x > 0, 0.0, beta=0.1),
        losses.orpo(x, x, weight=0.1),
        losses.clipped_policy(x, x, x),
        losses.clipped_value(x, x, x),
        losses.next_token(x),
    ):
        assert out.shape == shape and out.dtype == jnp.float32


def test_different_shapes_raise_instead_of_broadcasting():
    row, column = jnp.zeros(3), jnp.zeros((3, 1))
    for call in (
        lambda: losses.pairwise(row, column),
        lambda: losses.dpo(row, row, row, column, beta=0.1),
        lambda: losses.clipped_policy(row, row, column),
        lambda: losses.clipped_value(row, row, column),
        lambda: losses.ranking(row, jnp.ones(2)),
        lambda: losses.ranking(column, column),
    ):
        with pytest.raises(ValueError, match=r"shape|rank"):
            call()


def test_vmap_over_hyperparameters_equals_a_loop():
    betas, clips = jnp.array([0.01, 0.1, 1.0]), jnp.array([0.05, 0.2, 0.5])
    x, y = jnp.array([0.3, -0.4]), jnp.array([1.0, -2.0])

    def both(beta, clip):
        direct = losses.dpo(*PAIR, beta=beta, label_smoothing=beta / 4)
        return direct, losses.clipped_policy(x, jnp.zeros(2), y, clip=clip), losses.clipped_value(x, y, y, clip=clip)

    both = jax.jit(both)
    swept = jax.vmap(both)(betas, clips)
    for i in range(3):
        for got, expected in zip(swept, both(float(betas[i]), float(clips[i])), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-6)
