"""Values and gradients of all preference and score losses, compared with NumPy in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import FAMILY, WITHOUT_REFERENCE

from rlhf_jax import losses
from rlhf_jax.train import dpo, objectives

B, K = 4, 5
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(x / 2))


def slope(f, x, size=1e-5):
    """Returns central differences of a scalar function, in float64."""
    x, slopes = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += size
        down[i] -= size
        slopes[i] = (f(up) - f(down)) / (2 * size)
    return slopes


# ---- DPO and related losses

HYPER: Any = dpo.Hyper(
    beta=0.3,
    label_smoothing=0.15,
    desirable_weight=1.4,
    undesirable_weight=0.8,
    odds_weight=0.7,
    margin=0.4,
    sft_coef=0.6,
)


def margins(s):
    """Returns the margins h of summed and of averaged log-probabilities."""
    ratios = s["policy"] - s["reference"]
    means = ratios / s["lengths"]
    return ratios[:, 0] - ratios[:, 1], means[:, 0] - means[:, 1]


def odds(mean):
    return mean - np.log1p(-np.exp(mean))


def kto_by_hand(s):
    gap = HYPER.beta * (s["policy"] - s["reference"] - s["baseline"])
    good = HYPER.desirable_weight * (1 - sigmoid(gap))
    bad = HYPER.undesirable_weight * (1 - sigmoid(-gap))
    return np.where(s["good"], good, bad).mean(axis=1)


def by_hand(name, s):
    """Returns the losses of a batch, computed with the papers' formulas."""
    h, h_mean = margins(s)
    mean = s["policy"] / s["lengths"]
    beta, e = HYPER.beta, HYPER.label_smoothing
    smoothed = (1 - e) * softplus(-beta * h) + e * softplus(beta * h)
    return {
        "dpo": lambda: smoothed,
        "robust": lambda: ((1 - e) * softplus(-beta * h) - e * softplus(beta * h)) / (1 - 2 * e),
        "ipo": lambda: (h_mean - 1 / (2 * beta)) ** 2,
        "hinge": lambda: np.maximum(0.0, 1 - beta * h),
        "kto": lambda: kto_by_hand(s),
        "orpo": lambda: -mean[:, 0] + HYPER.odds_weight * softplus(odds(mean[:, 1]) - odds(mean[:, 0])),
        "simpo": lambda: softplus(-(beta * (mean[:, 0] - mean[:, 1]) - HYPER.margin)),
        "dpo-sft": lambda: smoothed - HYPER.sft_coef * mean[:, 0],
        "dpo-per-token": lambda: (1 - e) * softplus(-beta * h_mean) + e * softplus(beta * h_mean),
        "soft-simpo": lambda: (
            s["targets"] * softplus(HYPER.margin - beta * (mean[:, 0] - mean[:, 1]))
            + (1 - s["targets"]) * softplus(HYPER.margin + beta * (mean[:, 0] - mean[:, 1]))
        ),
        "soft-ipo": lambda: (
            s["targets"] * (h_mean - 1 / (2 * beta)) ** 2 + (1 - s["targets"]) * (-h_mean - 1 / (2 * beta)) ** 2
        ),
    }[name]()


def rewards_by_hand(name, s):
    """Returns the implicit rewards of the answers, ``[B, K]``."""
    mean = s["policy"] / s["lengths"]
    ratios = s["policy"] - s["reference"]
    return {
        "ipo": HYPER.beta * ratios / s["lengths"],
        "soft-ipo": HYPER.beta * ratios / s["lengths"],
        "dpo-per-token": HYPER.beta * ratios / s["lengths"],
        "kto": HYPER.beta * (ratios - s["baseline"]),
        "orpo": mean,
        "simpo": HYPER.beta * mean,
        "soft-simpo": HYPER.beta * mean,
    }.get(name, HYPER.beta * ratios)


OBJECTIVES = FAMILY | {"soft-simpo": objectives.soft(objectives.simpo), "soft-ipo": objectives.soft(objectives.ipo)}


def compiled(name):
    def total(policy, reference, lengths, good, targets, baseline):
        reference = None if name.removeprefix("soft-") in WITHOUT_REFERENCE else reference
        # An objective raises for labels that it does not use.
        marks, soft = (good if name == "kto" else None), (targets if name.startswith("soft") else None)
        scored = objectives.Scored(policy, reference, lengths, marks, soft, baseline)
        losses_B, rewards_BK = OBJECTIVES[name](scored, HYPER)
        return losses_B.sum(), (losses_B, rewards_BK)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


COMPILED = {name: compiled(name) for name in OBJECTIVES}


@pytest.mark.parametrize("name", OBJECTIVES)
@few
@given(seed=seeds)
def test_objectives_and_their_gradients_match_the_formulas(name, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=(B, 2)).astype(np.float64)
    s = {
        "policy": -lengths * rng.uniform(0.2, 3.0, size=(B, 2)),
        "reference": -lengths * rng.uniform(0.2, 3.0, size=(B, 2)),
        "lengths": lengths,
        "good": rng.random((B, 2)) < 0.5,
        "targets": rng.random(B),
        "baseline": rng.uniform(0, 2),
    }
    (_, (got, rewards)), gradient = COMPILED[name](*s.values())
    np.testing.assert_allclose(got, by_hand(name, s), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(rewards, rewards_by_hand(name, s), rtol=2e-4, atol=2e-5)
    if name == "hinge" and np.any(np.abs(1 - HYPER.beta * margins(s)[0]) < 1e-3):
        return  # The derivative does not exist at the kink.
    expected = slope(lambda policy: by_hand(name, s | {"policy": policy}).sum(), s["policy"])
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_objectives_are_finite_and_accurate_at_huge_margins(name, margin):
    s = {
        "policy": np.array([[-1.0, -1.0 - margin], [-1.0 + margin, -1.0]]).clip(max=-1.0),
        "reference": np.full((2, 2), -1.0),
        "lengths": np.ones((2, 2)),
        "good": np.array([[True, False], [False, True]]),
        "targets": np.array([0.9, 0.3]),
        "baseline": 0.5,
    }
    (_, (got, _)), gradient = COMPILED[name](*s.values())
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(got, by_hand(name, s), rtol=1e-4, atol=1e-5)


def test_kto_baseline_is_the_mean_over_mismatched_responses_clipped_at_zero():
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 6))
    expected = np.maximum(np.mean(policy - reference), 0.0)
    np.testing.assert_allclose(losses.kto_baseline(policy, reference), expected, atol=1e-6)
    np.testing.assert_allclose(losses.kto_baseline(reference, policy), max(np.mean(reference - policy), 0), atol=1e-6)


# ---- Losses of scores

PAIRWISE = jax.jit(
    jax.value_and_grad(lambda c, r, m, t: jnp.sum(losses.pairwise(c, r, margin=m, target=t)), argnums=(0, 1))
)


@few
@given(seed=seeds, smoothing=st.sampled_from([0.0, 0.1, 0.5]))
def test_pairwise_with_margins_smoothing_and_soft_targets(seed, smoothing):
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(scale=4.0, size=(2, B))
    margin, target = rng.uniform(0, 2, size=B), rng.choice([1 - smoothing, rng.random()], size=B)

    def total(chosen, rejected):
        d = chosen - rejected
        return np.sum(target * softplus(margin - d) + (1 - target) * softplus(margin + d))

    value, gradients = PAIRWISE(chosen, rejected, margin, target)
    np.testing.assert_allclose(value, total(chosen, rejected), rtol=1e-4)
    np.testing.assert_allclose(gradients[0], slope(lambda c: total(c, rejected), chosen), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradients[1], slope(lambda r: total(chosen, r), rejected), rtol=1e-3, atol=1e-5)


def ranking_by_hand(scores, ranks, where, ties):
    existing = [i for i in range(K) if where[i]]
    pairs = [(i, j) for i, j in itertools.permutations(existing, 2) if ranks[i] < ranks[j]]
    total = sum(softplus(scores[j] - scores[i]) for i, j in pairs)
    return total / max(len(existing) * (len(existing) - 1) // 2 if ties else len(pairs), 1)


def plackett_luce_by_hand(scores, ranks, where):
    """Returns the sum of each completion's negative log-probability among all completions ranked no better."""
    existing = [i for i in range(K) if where[i]]
    total = 0.0
    for i in existing:
        remaining = [j for j in existing if ranks[j] >= ranks[i]]
        total += np.log(sum(np.exp(scores[j]) for j in remaining)) - scores[i]
    return total


def best_by_hand(scores, ranks, where):
    existing = [i for i in range(K) if where[i]]
    best = min(existing, key=lambda i: ranks[i])
    return np.log(sum(np.exp(scores[i]) for i in existing)) - scores[best]


def best_of_n(scores, ranks, where):
    choice = jnp.argmin(jnp.where(where, ranks, 99))
    return losses.best_of_n_choice(scores, choice, where_K=where)


LISTWISE: dict[str, tuple[Any, Any]] = {
    "ranking, ties in the divisor": (
        lambda s, r, w: losses.ranking(s, r, where_K=w),
        lambda s, r, w: ranking_by_hand(s, r, w, True),
    ),
    "ranking, pairs in the divisor": (
        lambda s, r, w: losses.ranking(s, r, where_K=w, ties_in_divisor=False),
        lambda s, r, w: ranking_by_hand(s, r, w, False),
    ),
    "Plackett-Luce": (lambda s, r, w: losses.plackett_luce(s, r, where_K=w), plackett_luce_by_hand),
    "pick the best": (best_of_n, best_by_hand),
}
LISTWISE_COMPILED = {name: jax.jit(jax.value_and_grad(ours)) for name, (ours, _) in LISTWISE.items()}


@pytest.mark.parametrize("name", LISTWISE)
@few
@given(
    seed=seeds,
    ranks=st.lists(st.integers(1, 4), min_size=K, max_size=K),
    where=st.lists(st.booleans(), min_size=K, max_size=K).filter(any),
)
def test_listwise_losses_with_ties_and_missing_completions_match_the_formulas(name, seed, ranks, where):
    scores, ranks, where = np.random.default_rng(seed).normal(scale=2.0, size=K), np.array(ranks), np.array(where)
    value, gradient = LISTWISE_COMPILED[name](np.where(where, scores, np.nan), ranks, where)
    naive = LISTWISE[name][1]
    np.testing.assert_allclose(value, naive(scores, ranks, where), rtol=1e-4, atol=1e-6)
    expected = np.where(where, slope(lambda s: naive(s, ranks, where), scores), 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_listwise_losses_are_finite_at_huge_margins(name, margin):
    scores, ranks = np.array([margin, 0.0, -margin, 0.5, 2 * margin]), np.array([1, 2, 3, 3, 4])
    value, gradient = LISTWISE_COMPILED[name](scores, ranks, np.ones(K, bool))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert value > 1e3, "each ranking contains a pair that is wrong by a wide margin"


# ---- Errors


def test_missing_inputs_of_an_objective_are_named_in_the_error():
    rows = jnp.zeros((3, 2))
    bare = objectives.Scored(rows, None, rows + 1)
    for name, message in (("dpo", "reference"), ("ipo", "reference"), ("kto", "good_BK"), ("soft-simpo", "targets_B")):
        with pytest.raises(ValueError, match=message):
            OBJECTIVES[name](bare, HYPER)
    three = objectives.Scored(jnp.zeros((3, 3)), jnp.zeros((3, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="two answers"):
        objectives.dpo(three, HYPER)
    with pytest.raises(ValueError, match="mismatched"):
        objectives.kto(three._replace(good_BK=jnp.ones((3, 3), bool)), HYPER)
