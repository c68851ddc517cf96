"""Detection of out-of-distribution prompts, against loops, against scikit-learn and by simulation."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import diagnostics, lm
from rlhf_jax.diagnostics import ood


@given(seed=st.integers(0, 1000), n=st.integers(2, 30), d=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_distances_agree_with_loops(seed, n, d):
    rng = np.random.default_rng(seed)
    train, rows = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(size=(4, d))
    gaussian = ood.fit(train, ridge=0.1)
    mean = [sum(row[i] for row in train) / n for i in range(d)]
    covariance = np.array(
        [[sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in train) / n for j in range(d)] for i in range(d)]
    )
    covariance += 0.1 * np.trace(covariance) / d * np.eye(d)
    for k, row in enumerate(rows):
        shift = row - np.array(mean)
        full = shift @ np.linalg.solve(covariance, shift)
        diagonal = sum(shift[i] ** 2 / covariance[i, i] for i in range(d))
        assert ood.mahalanobis(gaussian, rows)[k] == pytest.approx(full, rel=1e-6)
        assert ood.relative_mahalanobis(gaussian, rows)[k] == pytest.approx(full - diagonal, rel=1e-6, abs=1e-6 * full)


def test_the_relative_distance_is_zero_for_uncorrelated_features():
    corners = np.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    np.testing.assert_allclose(ood.relative_mahalanobis(ood.fit(corners), [[3.0, -2.0]]), 0, atol=1e-12)


def test_fewer_prompts_than_features_give_finite_distances():
    rng = np.random.default_rng(0)
    gaussian = ood.fit(rng.normal(size=(5, 40)))
    assert np.isfinite(ood.relative_mahalanobis(gaussian, rng.normal(size=(3, 40)))).all()


def test_unusual_combinations_are_found_by_the_relative_distance():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(400, 1))
    inside = shared + 0.1 * rng.normal(size=(400, 8))
    outside = rng.normal(size=(400, 8))  # each feature alone has the same distribution
    gaussian = ood.fit(inside[:200])
    area = ood.auroc(ood.relative_mahalanobis(gaussian, inside[200:]), ood.relative_mahalanobis(gaussian, outside))
    assert area.mean > 0.99


def test_the_probe_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(size=(300, 4)), rng.normal(size=(10, 4)) + np.array([2.0, 0.0, 0.0, 1.0])
    inside = (inside - inside.mean(axis=0)) / inside.std(axis=0)
    probe = ood.fit_exposure(inside, outside, ridge=0.01)
    weights = np.repeat([0.5 / 300, 0.5 / 10], [300, 10])
    theirs = linear_model.LogisticRegression(C=1 / (2 * 0.01), tol=1e-10, max_iter=10_000)
    theirs.fit(np.concatenate([inside, outside]), np.repeat([0, 1], [300, 10]), sample_weight=weights)
    np.testing.assert_allclose(probe.weight_D, theirs.coef_[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ood.exposure(probe, outside), theirs.predict_proba(outside)[:, 1], atol=1e-3)


def test_repeated_outliers_do_not_change_the_probe():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(size=(50, 3)), rng.normal(size=(4, 3)) + 2
    once, often = (ood.fit_exposure(inside, np.tile(outside, (k, 1))) for k in (1, 12))
    np.testing.assert_allclose(once.weight_D, often.weight_D, rtol=1e-4)


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_area_agrees_with_a_loop_over_pairs(seed):
    rng = np.random.default_rng(seed)
    inside, outside = rng.integers(0, 5, size=rng.integers(1, 20)), rng.integers(0, 6, size=rng.integers(1, 20))
    wins = [1.0 if b > a else 0.5 if b == a else 0.0 for a in inside for b in outside]
    assert ood.auroc(inside, outside).mean == pytest.approx(np.mean(wins))


def test_the_interval_of_the_area_covers_it():
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(1000):
        area = ood.auroc(rng.normal(size=60), rng.normal(size=25) + 1)
        covered.append(area.lo < 0.760250 < area.hi)  # the normal distribution function at 1 / sqrt(2)
    assert abs(np.mean(covered) - 0.95) < 0.03


def test_a_gate_refuses_at_most_the_given_share():
    rng = np.random.default_rng(5)
    refused = []
    for _ in range(4000):
        limit = ood.threshold(rng.normal(size=39), refusals=0.1)
        refused.append(rng.normal() > limit)
    lo, hi = diagnostics.wilson(int(np.sum(refused)), len(refused), confidence=0.999)
    assert lo < 0.1 < hi


def test_a_gate_with_too_few_scores_refuses_nothing():
    assert ood.threshold([1.0, 2.0], refusals=0.1) == np.inf
    assert ood.threshold([1.0, 2.0], refusals=1.0) == -np.inf


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ood.fit([[1.0, 2.0]]), "at least 2 rows"),
        (lambda: ood.fit([[1.0], [np.nan]]), "finite"),
        (lambda: ood.fit([1.0, 2.0]), "shape"),
        (lambda: ood.fit_exposure([[1.0]], [[1.0, 2.0]]), "equal numbers"),
        (lambda: ood.auroc([], [1.0]), "at least one"),
        (lambda: ood.threshold([1.0], refusals=2.0), "refusals"),
    ],
)
def test_invalid_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_first_layers_are_those_of_the_model():
    cfg = lm.LMConfig.preset("tiny", n_layers=3, sliding_window=2, local_layers=(True, False, True))
    params, tokens = lm.init(jax.random.key(0), cfg), jax.numpy.array([[5, 6, 7, 8]])
    whole, whole_cfg = lm.first_layers(params, cfg=cfg, layers=3)
    assert whole_cfg == cfg
    np.testing.assert_array_equal(
        lm.forward(whole, tokens, cfg=cfg).hidden_BLD, lm.forward(params, tokens, cfg=cfg).hidden_BLD
    )
    two, two_cfg = lm.first_layers(params, cfg=cfg, layers=2)
    zeroed = params | {"layers": jax.tree.map(lambda x: x.at[2].set(0), params["layers"])}  # adds 0 to the residual
    np.testing.assert_allclose(
        lm.forward(two, tokens, cfg=two_cfg).hidden_BLD, lm.forward(zeroed, tokens, cfg=cfg).hidden_BLD, rtol=1e-6
    )
    with pytest.raises(ValueError, match="layers is 4"):
        lm.first_layers(params, cfg=cfg, layers=4)
