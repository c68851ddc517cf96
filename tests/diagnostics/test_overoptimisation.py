"""Tests of over-optimisation curves, best-of-n curves, split halves, falls from a peak and Goodhart's formula."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import overoptimisation as over

KL = np.array([0.25, 1.0, 2.25, 4.0, 9.0, 16.0, 36.0, 81.0])


def published(form, kl, alpha, beta):
    """Returns the gains on a curve, from the paper's formula."""
    d = np.sqrt(kl)
    return d * (alpha - beta * d) if form is over.BEST_OF_N else d * (alpha - beta * np.log(d))


# The two functional forms


@given(st.sampled_from([over.BEST_OF_N, over.REINFORCEMENT]), st.floats(0.1, 3.0), st.floats(0.1, 1.0))
def test_fits_recover_noise_free_curves_exactly(form, alpha, beta):
    gains = published(form, KL, alpha, beta)
    better, worse = over.fit_both(KL, gains)
    assert better.form is form and worse.form is not form and better.rmse < 1e-9 < worse.rmse
    np.testing.assert_allclose((better.alpha.mean, better.beta.mean, better.r_squared), (alpha, beta, 1.0), rtol=1e-7)
    peak = (alpha / (2 * beta), alpha**2 / (4 * beta))
    if form is over.REINFORCEMENT:
        peak = (math.exp(alpha / beta - 1), beta * math.exp(alpha / beta - 1))
    np.testing.assert_allclose((better.peak_distance.mean, better.peak_gain.mean), peak, rtol=1e-5)
    np.testing.assert_allclose(over.predict(better, KL), gains, atol=1e-7)
    assert over.predict(better, 0.0) == 0.0


def test_functional_forms_match_the_paper():
    # With alpha = 1 and beta = 0.25, best of n peaks at d = 2 with 1, and RL at d = e^3 with e^3 / 4.
    bon = over.fit(KL, np.sqrt(KL) - KL / 4, form=over.BEST_OF_N)
    rl = over.fit(KL, np.sqrt(KL) - np.sqrt(KL) * np.log(np.sqrt(KL)) / 4, form=over.REINFORCEMENT)
    np.testing.assert_allclose((bon.peak_distance.mean, bon.peak_gain.mean), (2.0, 1.0), rtol=1e-9)
    np.testing.assert_allclose((rl.peak_distance.mean, rl.peak_gain.mean), (math.e**3, math.e**3 / 4), rtol=1e-7)


def noisy(form, seed, *, alpha=1.0, beta=0.25, noise=0.05, n=20):
    rng = np.random.default_rng(seed)
    kl = np.linspace(0.3, 4.0, n) ** 2
    return kl, published(form, kl, alpha, beta) + noise * rng.normal(size=n)


@pytest.mark.parametrize("form", [over.BEST_OF_N, over.REINFORCEMENT], ids=["best-of-n", "rl"])
def test_intervals_of_fits_have_nominal_coverage(form):
    beta = 0.25 if form is over.BEST_OF_N else 0.5
    d, top = (2.0, 1.0) if form is over.BEST_OF_N else (math.e, math.e / 2)
    hits = {"alpha": [], "beta": [], "d": [], "gain": []}
    for seed in range(200):
        got = over.fit(*noisy(form, seed, beta=beta), form=form)
        truths = ((got.alpha, 1.0), (got.beta, beta), (got.peak_distance, d), (got.peak_gain, top))
        for name, (estimate, truth) in zip(hits, truths):
            hits[name].append(estimate.lo <= truth <= estimate.hi)
    for name, each in hits.items():
        assert 0.9 <= np.mean(each) <= 0.99, name


def test_standard_errors_agree_with_scipy_curve_fit():
    kl, gains = noisy(over.BEST_OF_N, 0)
    got = over.fit(kl, gains, form=over.BEST_OF_N)
    expected, covariance = optimize.curve_fit(lambda k, a, b: published(over.BEST_OF_N, k, a, b), kl, gains, p0=[1, 1])
    np.testing.assert_allclose((got.alpha.mean, got.beta.mean), expected, rtol=1e-5)
    np.testing.assert_allclose((got.alpha_error, got.beta_error), np.sqrt(np.diag(covariance)), rtol=1e-4)
    sizes = np.linspace(0.01, 0.2, len(kl))
    weighted = over.fit(kl, gains, form=over.BEST_OF_N, errors=sizes)
    expected, covariance = optimize.curve_fit(
        lambda k, a, b: published(over.BEST_OF_N, k, a, b), kl, gains, p0=[1, 1], sigma=sizes
    )
    np.testing.assert_allclose((weighted.alpha.mean, weighted.beta.mean), expected, rtol=1e-5)
    np.testing.assert_allclose(weighted.beta_error, math.sqrt(covariance[1, 1]), rtol=1e-4)
    residuals = gains - over.predict(weighted, kl)
    total = gains - np.average(gains, weights=sizes**-2.0)
    expected = 1 - np.sum((residuals / sizes) ** 2) / np.sum((total / sizes) ** 2)
    assert (weighted.r_squared, weighted.rmse) == pytest.approx((expected, np.sqrt(np.mean(residuals**2))))


def test_true_form_extrapolates_better():
    for form in (over.BEST_OF_N, over.REINFORCEMENT):
        kl, gains = noisy(form, 1, noise=0.01)
        near = kl < 9
        better, worse = over.fit_both(kl[near], gains[near])
        beyond = [np.sqrt(np.mean((over.predict(fit, kl[~near]) - gains[~near]) ** 2)) for fit in (better, worse)]
        assert better.form is form and beyond[0] < beyond[1]


def test_curve_without_a_maximum_has_an_infinite_peak():
    straight = over.fit(KL, np.sqrt(KL) + 0.02 * KL, form=over.BEST_OF_N)
    assert straight.beta.mean < 0 and straight.peak_distance == (math.inf,) * 3 and straight.peak_gain.mean == math.inf
    # If the curvature may be due to chance, the interval of the peak has no upper bound.
    wave = 0.3 * (-1.0) ** np.arange(8)
    for bend, curved in ((0.02, True), (-0.02, False)):
        unsure = over.fit(KL, np.sqrt(KL) - bend * KL + wave, form=over.BEST_OF_N)
        assert unsure.beta.lo < 0 < unsure.beta.hi and (unsure.beta.mean > 0) == curved
        assert 2 < unsure.peak_distance.lo < unsure.peak_distance.mean <= unsure.peak_distance.hi == math.inf
        assert (unsure.peak_distance.mean < math.inf) == curved and unsure.peak_gain.hi == math.inf


def test_peak_beyond_any_reachable_kl_is_infinite():
    got = over.fit(KL, published(over.REINFORCEMENT, KL, 1.0, 1e-3), form=over.REINFORCEMENT)
    assert got.beta.mean == pytest.approx(1e-3) and got.peak_distance.mean == got.peak_gain.mean == math.inf
    assert all(type(end) is float for end in (*got.peak_distance, *got.peak_gain))
    for kl, gains in (([*KL, math.inf], np.ones(9)), (KL, [math.inf, *KL[1:]])):
        with pytest.raises(ValueError, match="finite"):
            over.fit(kl, gains, form=over.BEST_OF_N)
    for sizes in ([math.inf] * 8, [math.nan] * 8, [0.0] * 8):
        with pytest.raises(ValueError, match="errors must be above 0"):
            over.fit(KL, KL, form=over.BEST_OF_N, errors=sizes)


def test_points_at_and_near_the_origin_are_excluded():
    kl, gains = np.array([-0.1, 0.0, *KL]), np.array([5.0, 5.0, *published(over.REINFORCEMENT, KL, 1.0, 0.25)])
    got = over.fit(kl, gains, form=over.REINFORCEMENT)
    assert got.count == 8 and got.alpha.mean == pytest.approx(1.0)
    assert over.fit(kl, gains, form=over.REINFORCEMENT, min_kl=1.0).count == 6
    with pytest.raises(ValueError, match="need 3 points and 2 different KLs above 30, got 2 and 2"):
        over.fit(kl, gains, form=over.BEST_OF_N, min_kl=30)
    with pytest.raises(ValueError, match="equally long"):
        over.fit(kl, gains[1:], form=over.BEST_OF_N)
    with pytest.raises(ValueError, match="errors must be above 0"):
        over.fit(kl, gains, form=over.BEST_OF_N, errors=-np.ones(10))
    with pytest.raises(ValueError, match="below 0"):
        over.predict(got, -1.0)


# Best of n


def test_best_of_n_curve_is_the_mean_over_prompts_with_clustered_intervals():
    rng = np.random.default_rng(3)
    proxy, gold = rng.normal(size=(2, 40, 6))
    asked = np.arange(40) // 2
    curve = diagnostics.best_of_n_curve(proxy, gold, clusters=asked.tolist())
    expected = np.mean([diagnostics.best_of_n_mean(p, g, range(1, 7)) for p, g in zip(proxy, gold)], axis=0)
    np.testing.assert_allclose(curve.mean, expected)
    assert curve.n.tolist() == [1, 2, 3, 4, 5, 6] and np.all((curve.lo < curve.mean) & (curve.mean < curve.hi))
    np.testing.assert_allclose(curve.kl, [math.log(n) - (n - 1) / n for n in range(1, 7)], atol=1e-12)
    # For n = 1, the curve is the mean over all samples of a prompt; two prompts at a time ask the same.
    alone = diagnostics.mean_interval(gold.mean(axis=1).reshape(20, 2).mean(axis=1))
    np.testing.assert_allclose((curve.mean[0], curve.lo[0], curve.hi[0]), alone)
    # With n = N, the best sample is known exactly.
    np.testing.assert_allclose(curve.mean[-1], gold[np.arange(40), proxy.argmax(axis=1)].mean())
    few = diagnostics.best_of_n_curve(proxy, gold, ns=[2, 6], clusters=asked.tolist())
    np.testing.assert_array_equal(few.hi, curve.hi[[1, 5]])
    with pytest.raises(ValueError, match="prompts, samples"):
        diagnostics.best_of_n_curve(proxy[0], gold[0])


# Split halves and falls from a peak


def run(seed, *, gold, checkpoints=8, prompts=60):
    """Returns proxy scores that rise by 0.3 per checkpoint, and judge scores whose mean is ``gold``."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=prompts)
    proxy = 0.3 * np.arange(checkpoints)[:, None] + difficulty + 0.5 * rng.normal(size=(checkpoints, prompts))
    judge = np.array([gold(c) for c in range(checkpoints)])[:, None] + difficulty
    return proxy, judge + 0.5 * rng.normal(size=(checkpoints, prompts))


def test_split_halves_agree_and_then_diverge():
    train, test = run(0, gold=lambda c: 0.3 * min(c, 4) + 7.0)
    halves = diagnostics.split_halves(train, test)
    assert halves.gap[0] == halves.lo[0] == halves.hi[0] == 0.0, "both start from 0, whatever their offset"
    np.testing.assert_allclose(halves.gap, halves.train - halves.test)
    np.testing.assert_allclose(halves.train, (train - train[0]).mean(axis=1))
    assert halves.parted is not None and halves.parted >= 5 and np.all(halves.lo[halves.parted :] > 0)
    each = diagnostics.mean_interval((train[6] - train[0]) - (test[6] - test[0]))
    np.testing.assert_allclose((halves.gap[6], halves.lo[6], halves.hi[6]), each)


def test_temporary_gap_between_halves_is_not_a_divergence():
    train, test = run(1, gold=lambda c: 0.3 * c - (1.5 if c == 3 else 0.0))
    halves = diagnostics.split_halves(train, test)
    assert halves.lo[3] > 0 and halves.parted is None
    with pytest.raises(ValueError, match="need equal shapes"):
        diagnostics.split_halves(train, test[1:])
    with pytest.raises(ValueError, match="NaN"):
        diagnostics.split_halves(train, np.where(test > 0, test, np.nan))


def test_fall_from_the_peak_is_detected():
    fallen = diagnostics.fall_from_peak(*run(2, gold=lambda c: 0.3 * c if c < 4 else 0.9 - 0.3 * (c - 3)))
    assert fallen.gamed and fallen.peak in (2, 3, 4) and fallen.fall.lo > 0 and fallen.rise.lo > 0
    proxy, judge = [[0.0, 0.0], [1.0, 3.0], [1.1, 3.3]], [[0.0, 0.0], [2.0, 2.0], [1.0, 0.5]]
    exact = diagnostics.fall_from_peak(proxy, judge, confidence=0.8)
    assert exact.peak == 1
    assert exact.fall == diagnostics.mean_interval([1.0, 1.5], confidence=0.9), "two comparisons, Bonferroni-corrected"
    np.testing.assert_allclose(exact.rise, diagnostics.mean_interval([0.1, 0.3], confidence=0.9))
    flat = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    noisy = diagnostics.fall_from_peak([[0.0] * 3, [0.0] * 3, [3.0, -1.0, 0.5]], flat)
    assert noisy.rise.mean > 0 > noisy.rise.lo and not noisy.gamed, "the rise may be noise"
    assert diagnostics.fall_from_peak(flat[:1], flat[:1]).fall == (0.0, 0.0, 0.0)
    one = diagnostics.fall_from_peak([[0.0], [1.0]], [[1.0], [0.0]])
    assert one.fall == (1.0, -math.inf, math.inf) and not one.gamed, "a single prompt has no interval"
    assert not diagnostics.fall_from_peak(*run(3, gold=lambda c: 0.3 * c)).gamed
    proxy, judge = run(4, gold=lambda c: -0.3 * c)
    assert not diagnostics.fall_from_peak(-proxy, judge).gamed, "it is not gaming if the proxy falls as well"


def test_noise_is_rarely_called_gaming():
    falls = [diagnostics.fall_from_peak(*run(seed, gold=lambda c: 0.0)) for seed in range(300)]
    assert np.mean([fall.gamed for fall in falls]) <= 0.05
    assert {fall.peak for fall in falls} == set(range(8)), "any checkpoint can be the highest by chance"


# Goodhart


def test_regressional_goodhart_agrees_with_a_simulation():
    rng = np.random.default_rng(5)
    true, noise = rng.normal(1.0, 2.0, size=400_000), rng.normal(0.5, 1.0, size=400_000)
    proxy = true + noise
    for c in (-1.0, 1.5, 5.0):
        near = np.abs(proxy - c) < 0.1
        got = diagnostics.regressional_goodhart(c, mean=1.0, variance=4.0, noise_mean=0.5, noise_variance=1.0)
        assert got == pytest.approx(true[near].mean(), abs=0.05)
    assert diagnostics.regressional_goodhart(3.0, variance=1.0, noise_variance=0.0) == 3.0
    assert diagnostics.regressional_goodhart(3.0, variance=1.0, noise_variance=2.0) == 1.0
    with pytest.raises(ValueError, match="not both 0"):
        diagnostics.regressional_goodhart(3.0, variance=0.0, noise_variance=0.0)


def exact_best_of_n_kl(probs_A, scores_A, n):
    """Enumerates all n-tuples of answers; the first of the best answers is selected."""
    picked_A = np.zeros(len(probs_A))
    for draws in itertools.product(range(len(probs_A)), repeat=n):
        picked_A[max(draws, key=lambda a: scores_A[a])] += np.prod(probs_A[list(draws)])
    return float(np.sum(picked_A * np.log(picked_A / probs_A)))


@pytest.mark.parametrize("scores_A", [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 2.0]], ids=["distinct", "tied"])
def test_estimated_kl_of_best_of_n_matches_enumeration(scores_A):
    probs_A, n = np.array([0.4, 0.3, 0.2, 0.1]), 4
    expected = exact_best_of_n_kl(probs_A, scores_A, n)
    # A large pool with exactly these shares has no sampling error.
    pool = np.repeat(scores_A, np.round(20_000 * probs_A).astype(int))
    assert diagnostics.best_of_n_kl_estimate(pool, [1, n]) == pytest.approx([0.0, expected], abs=1e-3)
    assert expected < diagnostics.best_of_n_kl(n) - 0.04, "the formula for untied scores is only a bound"
    rng = np.random.default_rng(0)
    for size, bias in ((4 * n, 0.01), (n, 0.05)):
        pools = rng.choice(scores_A, size=(6000, size), p=probs_A)
        estimates = [diagnostics.best_of_n_kl_estimate(each, [n])[0] for each in pools]
        assert np.mean(estimates) == pytest.approx(expected, abs=bias), size


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_estimated_kl_of_best_of_n_is_the_formula_without_ties_and_zero_for_one_answer(total, seed):
    untied = np.random.default_rng(seed).permutation(total)
    ns = range(1, total + 1)
    np.testing.assert_allclose(diagnostics.best_of_n_kl_estimate(untied, ns), diagnostics.best_of_n_kl(ns), atol=1e-9)
    np.testing.assert_allclose(diagnostics.best_of_n_kl_estimate(np.zeros(total + 2), ns), 0.0, atol=1e-9)


def test_estimated_kl_of_best_of_n_refuses_bad_arguments():
    for scores, ns, message in (
        ([0.0, math.nan], [1], "NaN"),
        ([[1.0]], [1], "rank 1"),
        ([1.0], [2], "between 1 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.best_of_n_kl_estimate(scores, ns)
