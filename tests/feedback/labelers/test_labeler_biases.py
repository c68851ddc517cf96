"""Biases of labelers towards position and length, and the time they take."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.feedback.labelers import labeler_biases as biases

NAN = math.nan


def test_position_bias_counts_decided_pairs_with_a_known_order():
    votes_NM = np.array([[1.0], [1.0], [0.0], [0.5], [NAN], [0.9], [0.0]])
    first_shown_NM = np.array([[1.0], [0.0], [0.0], [1.0], [1.0], [NAN], [0.0]])
    [found] = biases.position_bias(votes_NM, first_shown_NM)
    assert (found.first_shown.share.mean, found.first_shown.count) == (0.75, 4)
    assert found.p_value == stats.binomtest(3, 4).pvalue


def test_a_ranking_is_one_trial_of_the_test():
    # Three completions are ranked as they are shown, (2, 0, 1), in each of six items: 18 pairs, but six trials.
    first_shown = np.tile([1.0, 0.0, 0.0], 6)[:, None]
    [found] = biases.position_bias(first_shown, first_shown, items=np.repeat(np.arange(6), 3).tolist())
    assert (found.first_shown.share.mean, found.first_shown.count) == (1.0, 18)
    assert found.p_value == pytest.approx(2 / 2**6)


def test_the_test_of_position_is_exact():
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(300):
        votes_NM, first_shown_NM = (rng.random((60, 1)) < p for p in (0.9, 0.5))
        [found] = biases.position_bias(votes_NM.astype(float), first_shown_NM.astype(float))
        rejected += found.p_value < 0.05
    assert rejected <= 0.06 * 300
    assert biases.position_bias(np.full((3, 1), NAN), np.ones((3, 1)))[0].p_value == 1


def test_length_preference_is_compared_with_the_others_on_the_same_pairs():
    votes_NM = np.array([[1, 1, 0], [0, 0, 0], [1, 0.5, NAN], [1, 1, 1], [NAN, 1, 0]])
    longer_N = np.array([1, 0, 1, NAN, 0])
    found = biases.length_preference(votes_NM, longer_N)
    assert [(each.longer.share.mean, each.longer.count) for each in found] == [(1, 3), (2 / 3, 3), (2 / 3, 3)]
    # The first labeler chooses the longer one of pairs 0 and 1, of which the others choose 1/2 and 1.
    assert found[0].beyond_others.mean == pytest.approx((0.5 + 0.0) / 2)
    assert found[2].beyond_others.mean == pytest.approx((-1.0 + 0.0 + 1.0) / 3)


def test_intervals_of_the_length_preference_cover_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        p_N = rng.beta(2, 2, size=100)[:, None]  # how much better the longer completion is
        longer_NM = (rng.random((100, 4)) < np.where(np.arange(4) == 0, 0.5 + p_N / 2, p_N)).astype(float)
        first = biases.length_preference(longer_NM, np.ones(100))[0].beyond_others
        covered += first.lo <= 0.75 - 0.5 <= first.hi
    assert 0.92 < covered / 200 < 0.985


def test_times():
    found = biases.judgement_times([1.0, 1.9, 2.0, 10.0, 20.0], min_seconds=2.0)
    assert (found.count, found.fast, found.median) == (5, 2, 2.0)
    np.testing.assert_allclose(found.quantiles, np.quantile([1.0, 1.9, 2.0, 10.0, 20.0], biases.QUANTILES))
    nothing = biases.judgement_times([])
    assert (nothing.count, nothing.fast) == (0, 0) and math.isnan(nothing.median)
