import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from rlhf_jax import diagnostics

# Intervals


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (50, 100), (1, 1)])
def test_wilson_agrees_with_scipy(k, n):
    for confidence in (0.8, 0.95):
        expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        np.testing.assert_allclose(diagnostics.wilson(k, n, confidence=confidence), tuple(expected), atol=1e-12)


def test_wilson_contains_rates_of_zero_and_one_in_spite_of_rounding():
    for n in range(1, 200):
        assert diagnostics.wilson(0, n)[0] == 0.0 and diagnostics.wilson(n, n)[1] == 1.0


def test_wilson_without_trials_is_the_unit_interval():
    assert diagnostics.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        diagnostics.wilson(4, 3)


def test_mean_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(size=12)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    got = diagnostics.mean_interval(values)
    np.testing.assert_allclose(got, (values.mean(), *expected), rtol=1e-9)
    assert diagnostics.mean_interval([2.0]) == (2.0, -math.inf, math.inf)


def test_average_of_independent_estimates_adds_widths_in_quadrature():
    got = diagnostics.average([diagnostics.Estimate(1.0, 0.7, 1.4), diagnostics.Estimate(2.0, 1.6, 2.3)])
    np.testing.assert_allclose(got, (1.5, 1.5 - 0.25, 1.5 + 0.25))
    values = np.random.default_rng(3).normal(size=50)
    one = diagnostics.mean_interval(values)
    four = diagnostics.average([one] * 4)
    np.testing.assert_allclose(four.hi - four.lo, (one.hi - one.lo) / 2, err_msg="four runs halve the interval")
    with pytest.raises(ValueError, match="at least one"):
        diagnostics.average([])


def test_bootstrap_agrees_with_theory_and_is_reproducible():
    values = np.random.default_rng(1).exponential(size=400)
    mean, lo, hi = diagnostics.bootstrap_mean(values, np.random.default_rng(7))
    width = 1.96 * values.std() / 20
    np.testing.assert_allclose((mean, lo, hi), (values.mean(), values.mean() - width, values.mean() + width), rtol=0.03)
    assert (mean, lo, hi) == diagnostics.bootstrap_mean(values, np.random.default_rng(7))
    assert (mean, lo, hi) != diagnostics.bootstrap_mean(values, np.random.default_rng(8))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_rate_over_clusters_stays_in_the_unit_interval_with_positive_width(rows):
    parts, wholes = np.array([(min(r), max(r)) for r in [*rows, (1, 2)]], float).T
    for right in (parts, 0 * wholes, wholes):
        mean, lo, hi = diagnostics.ratio_interval(right, wholes)
        assert 0 <= lo <= mean <= hi <= 1 and hi - lo > 0.1 and mean == pytest.approx(right.sum() / wholes.sum())
        mirrored = diagnostics.ratio_interval(wholes - right, wholes)
        np.testing.assert_allclose(mirrored, (1 - mean, 1 - hi, 1 - lo), atol=1e-12)


def test_intervals_over_few_clusters_have_nominal_coverage():
    """Uses five prompts of one to six correlated pairs."""
    rng, hits = np.random.default_rng(4), []
    for _ in range(200):
        pairs = rng.integers(1, 7, size=5)
        rate = diagnostics.ratio_interval(rng.binomial(pairs, rng.beta(1.4, 0.6, size=5)).astype(float), pairs)
        hits.append(rate.lo <= 0.7 <= rate.hi)
    assert np.mean(hits) >= 0.94


def test_ratio_over_clusters_agrees_with_mean_interval_and_wilson():
    values = np.random.default_rng(5).normal(3.0, 1.0, size=9)
    got = diagnostics.ratio_interval(2 * values, np.full(9, 2.0), rate=False)
    np.testing.assert_allclose(got, diagnostics.mean_interval(values))
    assert diagnostics.ratio_interval([3.0], [2.0]) == (1.5, -math.inf, math.inf)
    assert diagnostics.ratio_interval([0.5], [1.0], rate=False)[1:] == (-math.inf, math.inf)
    assert diagnostics.ratio_interval([1.0, 0.0], [1.0, 0.0]) == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="parts of a rate"):
        diagnostics.ratio_interval([3.0, 1.0], [2.0, 2.0], rate=True)
    # Clusters of one are independent trials, so the interval is Wilson's, except for Student's t.
    many = diagnostics.ratio_interval((np.arange(4000) < 1000).astype(float), np.ones(4000))
    np.testing.assert_allclose(many[1:], diagnostics.wilson(1000, 4000), atol=2e-5)


def test_the_interval_of_a_clustered_mean_is_the_jackknife_over_clusters():
    rng = np.random.default_rng(6)
    clusters = [str(each) for each in rng.integers(6, size=40)]
    values = rng.normal(size=40)
    got = diagnostics.clustered_mean(values, clusters)
    names = sorted(set(clusters))
    rows = [np.array([c == name for c in clusters]) for name in names]
    changes = [values[~own].mean() - values.mean() for own in rows]
    sizes = np.array([own.sum() for own in rows])
    t = stats.t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1)
    width = t * math.sqrt((len(names) - 1) / len(names) * np.square(changes).sum())
    np.testing.assert_allclose(got, (values.mean(), values.mean() - width, values.mean() + width))
    # Without clusters, the interval is Student's; copies of the same values add no information.
    np.testing.assert_allclose(diagnostics.clustered_mean(values), diagnostics.mean_interval(values))
    copied = diagnostics.clustered_mean(np.repeat(values, 3), np.repeat(np.arange(40), 3).tolist())
    np.testing.assert_allclose(copied, diagnostics.mean_interval(values))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        diagnostics.clustered_mean([0.5, 1.5], ["a", "a"], rate=True)
    assert diagnostics.clustered_mean(np.full(3, 1.0 + 1e-7), rate=True).mean == 1.0
    with pytest.raises(ValueError, match="need 2 clusters"):
        diagnostics.clustered_mean([0.5, 0.5], ["a"])


def test_a_ratio_counts_clusters_without_a_whole():
    """The gap that a policy closes can shrink on a prompt without a gap."""
    got = diagnostics.ratio_interval([0.5, 0.2, -0.3], [1.0, 0.5, 0.0], rate=False)
    assert got.mean == pytest.approx(0.4 / 1.5)
    changes = [(-0.1) / 0.5 - got.mean, 0.2 / 1.0 - got.mean, 0.7 / 1.5 - got.mean]
    t = stats.t.ppf(0.975, 1.0)  # 1.8 effective clusters have at least one degree of freedom
    assert got.hi - got.mean == pytest.approx(t * math.sqrt(2 / 3 * np.square(changes).sum()))


def test_copies_of_pairs_with_the_same_prompt_add_no_information():
    rng = np.random.default_rng(8)
    chosen, lengths = rng.normal(0.5, 1.0, size=80), rng.integers(1, 20, size=(2, 80)).astype(float)
    labels = np.arange(80).tolist()
    twice, both = np.repeat(chosen, 2), [*np.repeat(labels, 2).tolist()]
    for measure in (diagnostics.calibration_slope, diagnostics.overconfidence):
        once = measure(chosen, np.zeros(80), prompts=labels)
        np.testing.assert_allclose(measure(twice, np.zeros(160), prompts=both), once, rtol=1e-6)
        assert measure(twice, np.zeros(160)).hi < once.hi
    once = diagnostics.length_correlation(chosen, lengths[0])
    np.testing.assert_allclose(
        diagnostics.length_correlation(twice, np.repeat(lengths[0], 2), clusters=both), once, rtol=1e-9
    )
    outcomes = (chosen > 0).astype(float)
    once = diagnostics.length_controlled_win_rate(outcomes, *lengths, clusters=labels)
    again = diagnostics.length_controlled_win_rate(
        np.repeat(outcomes, 2), *np.repeat(lengths, 2, axis=1), clusters=both
    )
    np.testing.assert_allclose(again, once, rtol=5e-3)  # the shrinkage counts comparisons
    np.testing.assert_allclose(once, diagnostics.length_controlled_win_rate(outcomes, *lengths), rtol=0.03)


def test_bounds_of_rates_solve_their_equations():
    outcomes, z = np.array([1.0, 0.25, 0.5, 0.0, 1.0]), stats.norm.ppf(0.975)
    mean, *bounds = diagnostics.outcome_rate(outcomes)
    ties = np.mean(4 * outcomes * (1 - outcomes)) * 5 / (5 + z**2)  # An outcome of 1/4 is three quarters of a tie.
    for p in bounds:
        assert (mean - p) ** 2 == pytest.approx(z**2 / 5 * (p * (1 - p) - ties / 4))
    parts, wholes = np.array([1.0, 2.0, 1.0]), np.array([2.0, 5.0, 1.0])
    mean, *bounds = diagnostics.ratio_interval(parts, wholes)
    without = (4 - parts) / (8 - wholes)
    variance = 2 / 3 * np.sum((without - mean) ** 2)
    clusters = 8**2 / np.sum(wholes**2)
    variance = (clusters * variance + max(variance, mean * (1 - mean) / 8)) / (clusters + 1)
    trials, t = mean * (1 - mean) / variance, stats.t.ppf(0.975, clusters - 1)
    for p in bounds:
        assert (mean - p) ** 2 == pytest.approx(t**2 / trials * p * (1 - p))


def test_single_values_have_infinite_intervals_and_confidence_is_validated():
    rng = np.random.default_rng(0)
    assert diagnostics.bootstrap_mean([2.0], rng) == (2.0, -math.inf, math.inf)
    curve = diagnostics.best_of_n_curve([[1.0, 2.0]], [[1.0, 2.0]])
    assert curve.mean.tolist() == [1.5, 2.0] and set(curve.lo) == {-math.inf} and set(curve.hi) == {math.inf}
    ones, zeros = [1.0, 2.0, 0.5], [0.0, 3.0, 0.0]
    for call in (
        lambda c: diagnostics.mean_interval(ones, confidence=c),
        lambda c: diagnostics.bootstrap_mean(ones, rng, confidence=c),
        lambda c: diagnostics.best_of_n_curve([ones, zeros], [ones, zeros], confidence=c),
        lambda c: diagnostics.calibration_slope(ones, zeros, confidence=c),
        lambda c: diagnostics.overconfidence(ones, zeros, confidence=c),
        lambda c: diagnostics.clustered_mean(ones, confidence=c),
        lambda c: diagnostics.ratio_interval(ones, zeros, confidence=c),
        lambda c: diagnostics.length_correlation(ones, zeros, confidence=c),
        lambda c: diagnostics.length_controlled_win_rate([1, 0, 1], [1, 2, 3], [1, 1, 1], confidence=c),
        lambda c: diagnostics.fall_from_peak([ones, zeros], [ones, zeros], confidence=c),
        lambda c: diagnostics.overoptimisation.fit(
            [1, 4, 9], ones, form=diagnostics.overoptimisation.BEST_OF_N, confidence=c
        ),
    ):
        for confidence in (1.5, 0.0, -5.0):
            with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
                call(confidence)


def test_win_rate_counts_ties_as_a_half():
    a, b = [1.0, 2.0, 3.0, 4.0], [0.0, 2.05, 3.5, 4.0]
    np.testing.assert_array_equal(diagnostics.win_outcomes(a, b), [1.0, 0.0, 0.0, 0.5])
    np.testing.assert_array_equal(diagnostics.win_outcomes(a, b, tie_tolerance=0.1), [1.0, 0.5, 0.0, 0.5])
    assert diagnostics.win_rate(a, b).mean == 0.375
    assert diagnostics.win_rate(a, b, tie_tolerance=0.1).mean == 0.5
    assert diagnostics.win_outcomes([1.5, 2.5], [1.0, 1.0], tie_tolerance=0.5).tolist() == [0.5, 1.0]


def test_win_rate_without_ties_is_wilsons_and_antisymmetric():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 30))
    mean, lo, hi = diagnostics.win_rate(a, b)
    np.testing.assert_allclose((lo, hi), diagnostics.wilson(int((a > b).sum()), 30))
    np.testing.assert_allclose(diagnostics.win_rate(b, a), (1 - mean, 1 - hi, 1 - lo))
    assert diagnostics.win_rate([1.0, 1.0], [0.0, 0.0]).hi == 1.0


@pytest.mark.parametrize("probs", [(0.5, 0.5, 0.0), (0.3, 0.3, 0.4), (0.05, 0.15, 0.8), (0.9, 0.05, 0.05)])
@pytest.mark.parametrize("n", [40, 400])
def test_win_rate_interval_has_nominal_coverage(probs, n):
    """Draws wins, losses and ties with known probabilities."""
    rng = np.random.default_rng(3)
    truth = probs[0] + probs[2] / 2
    hits = []
    for _ in range(400):
        outcome = rng.choice([1.0, -1.0, 0.0], size=n, p=probs)
        _, lo, hi = diagnostics.win_rate(outcome, np.zeros(n))
        hits.append(lo <= truth <= hi)
    assert 0.92 <= np.mean(hits) <= 0.99


def test_ties_narrow_the_interval_but_never_to_a_point():
    def width(a):
        _, lo, hi = diagnostics.win_rate(a, np.zeros(len(a)))
        return hi - lo

    no_ties, half_ties, all_ties = [1.0, -1.0] * 20, [1.0, -1.0, 0.0, 0.0] * 10, [0.0] * 40
    assert width(no_ties) > width(half_ties) > width(all_ties) > 0.05


def test_pairwise_accuracy_of_a_constant_model_is_zero():
    assert diagnostics.pairwise_accuracy(np.ones(10), np.ones(10)).mean == 0.0
    accuracy = diagnostics.pairwise_accuracy([1.0, 2.0, 0.0, 5.0], [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(accuracy, (0.75, *diagnostics.wilson(3, 4)))


def test_invalid_scores_raise():
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([np.nan], [0.0]), ([[1.0]], [[0.0]])):
        with pytest.raises(ValueError, match=r"number|paired"):
            diagnostics.win_rate(a, b)


# Calibration


def labelled_pairs(n, slope, seed=0):
    """Returns pairs whose labels have probability sigmoid(slope * difference)."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(scale=2.0, size=n)
    right = rng.random(n) < special.expit(slope * difference)
    return np.where(right, difference, -difference), np.zeros(n)


def test_calibrated_model_has_a_diagonal_curve():
    chosen, rejected = labelled_pairs(20_000, slope=1.0)
    curve = diagnostics.calibration_curve(chosen, rejected, bins=8)
    assert curve.count.sum() == 20_000 and np.ptp(curve.count) <= 1
    assert np.all(np.diff(curve.gap) > 0)
    np.testing.assert_allclose(curve.accuracy, curve.predicted, atol=0.03)
    assert np.all((curve.lo < curve.accuracy) & (curve.accuracy < curve.hi))
    assert diagnostics.expected_calibration_error(chosen, rejected) < 0.015


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_slope_is_recovered_and_its_inverse_calibrates(slope):
    chosen, rejected = labelled_pairs(20_000, slope=slope, seed=4)
    estimate = diagnostics.calibration_slope(chosen, rejected)
    assert estimate.lo < slope < estimate.hi and estimate.hi - estimate.lo < 0.2 * slope
    temperature = diagnostics.calibration_temperature(chosen, rejected)
    assert diagnostics.expected_calibration_error(chosen / temperature, rejected) < 0.015
    if slope != 1.0:
        assert diagnostics.expected_calibration_error(chosen, rejected) > 0.05


def test_calibration_error_matches_a_hand_computed_value():
    chosen, rejected = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])
    error = diagnostics.expected_calibration_error(chosen, rejected, bins=1)
    assert error == pytest.approx(abs(0.75 - 1 / (1 + math.exp(-1))))
    assert diagnostics.calibration_slope(chosen, rejected).mean == pytest.approx(math.log(3))


def test_slope_interval_has_nominal_coverage():
    hits = []
    for seed in range(200):
        estimate = diagnostics.calibration_slope(*labelled_pairs(200, slope=0.8, seed=seed))
        hits.append(estimate.lo <= 0.8 <= estimate.hi)
    assert 0.9 <= np.mean(hits) <= 0.99


def test_slope_is_infinite_if_the_likelihood_has_no_maximum():
    assert diagnostics.calibration_slope([1.0, 2.0], [0.0, 0.0]).mean == math.inf
    assert diagnostics.calibration_slope([1.0, 2.0], [0.0, 2.0]) == (math.inf, -math.inf, math.inf), "a tied pair"
    assert diagnostics.calibration_slope([0.0, 0.0], [1.0, 2.0]).mean == -math.inf
    with pytest.raises(ValueError, match="all score differences"):
        diagnostics.calibration_slope([1.0], [1.0])
    # No positive temperature calibrates scores that are always right or mostly wrong.
    for chosen, rejected in (([1.0, 2.0], [0.0, 0.0]), ([0.0, 0.0, 2.0], [1.0, 2.0, 1.0])):
        assert math.isnan(diagnostics.calibration_temperature(chosen, rejected))


# Best of n


def test_best_of_n_kl_matches_the_published_values():
    ns = [1, 4, 8, 16, 64, 128, 512, 1000, 60_000]
    expected = [0.0, 0.636, 1.204, 1.835, 3.175, 3.860, 5.240, 5.909, 10.002]
    np.testing.assert_allclose(diagnostics.best_of_n_kl(ns), expected, atol=5e-4)
    with pytest.raises(ValueError, match="at least 1"):
        diagnostics.best_of_n_kl(0)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_mean_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(5)
    proxy, gold = rng.normal(size=(2, 7))
    if ties:
        proxy = np.round(proxy)
    expected = []
    for n in range(1, 8):
        bests = []
        for subset in map(list, itertools.combinations(range(7), n)):
            top = proxy[subset] == proxy[subset].max()
            bests.append(gold[subset][top].mean())
        expected.append(np.mean(bests))
    np.testing.assert_allclose(diagnostics.best_of_n_mean(proxy, gold, range(1, 8)), expected, rtol=1e-9)
    several = diagnostics.best_of_n_mean([gold, proxy], [proxy, gold], range(1, 8))
    np.testing.assert_allclose(several[1], expected, rtol=1e-9)
    np.testing.assert_allclose(several[0], diagnostics.best_of_n_mean(gold, proxy, range(1, 8)))


def test_best_of_n_mean_of_large_pools_does_not_overflow():
    proxy = np.random.default_rng(6).permutation(100_000) / 100_000
    got = diagnostics.best_of_n_mean(proxy, proxy, [1, 10, 1000, 60_000])
    assert np.all(np.diff(got) > 0)
    # The expected maximum of n uniform numbers is n / (n + 1).
    np.testing.assert_allclose(got, [0.5, 10 / 11, 1000 / 1001, 1.0], atol=2e-5)


def test_best_of_n_mean_validates_its_inputs():
    for ns in ([0], [4]):
        with pytest.raises(ValueError, match="between 1 and"):
            diagnostics.best_of_n_mean(np.ones(3), np.ones(3), ns)
    with pytest.raises(ValueError, match="same shape"):
        diagnostics.best_of_n_mean(np.ones(3), np.ones(2), [1])


# Diversity


def test_distinct_n_matches_hand_computed_values():
    assert diagnostics.distinct_n([[1, 2, 1, 2]], n=1) == 0.5
    assert diagnostics.distinct_n([[1, 2, 1, 2]], n=2) == pytest.approx(2 / 3)
    # N-grams do not span sequences.
    assert diagnostics.distinct_n([[1, 2], [1, 2], [2, 1]], n=2) == pytest.approx(2 / 3)
    assert math.isnan(diagnostics.distinct_n([[1]], n=2))


def test_token_entropy_matches_hand_computed_values():
    assert diagnostics.token_entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert diagnostics.token_entropy([["a", "a"], ["a"]]) == 0.0
    assert math.isnan(diagnostics.token_entropy([[]]))


def test_self_overlap_matches_hand_computed_values():
    assert diagnostics.self_overlap([[1, 2, 3], [1, 2, 3]], n=2) == 1.0
    # Repetition within a sequence is not overlap.
    assert diagnostics.self_overlap([[1, 2, 1, 2], [3, 4, 5]], n=2) == 0.0
    assert diagnostics.self_overlap([[1, 2, 3], [1, 2, 4]], n=2) == 0.5
    assert math.isnan(diagnostics.self_overlap([[1, 2, 3]], n=2))
    with pytest.raises(ValueError, match="at least 1"):
        diagnostics.self_overlap([[1], [2]], n=0)
