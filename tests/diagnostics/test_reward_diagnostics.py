"""Tests of reward-model diagnostics against hand-computed values, plain loops and identities."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from rlhf_jax import diagnostics

SCORES = st.integers(-3, 3).map(float)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=20)


def columns(rows):
    return tuple(np.array(column) for column in zip(*rows))


def plain_rate(pairs):
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


# Calibration


@given(PAIRS, st.integers(1, 6))
def test_calibration_curve_agrees_with_a_loop(pairs, bins):
    chosen, rejected = columns(pairs)
    curve = diagnostics.calibration_curve(chosen, rejected, bins=bins)
    order = sorted(range(len(pairs)), key=lambda i: (abs(pairs[i][0] - pairs[i][1]), i))
    start, error = 0, 0.0
    for k, count in enumerate(curve.count):
        mine = [pairs[i] for i in order[start : start + count]]
        start += count
        gaps = [abs(a - b) for a, b in mine]
        predicted = sum(1 / (1 + math.exp(-gap)) for gap in gaps) / count
        np.testing.assert_allclose(
            (curve.gap[k], curve.predicted[k], curve.accuracy[k]), (sum(gaps) / count, predicted, plain_rate(mine))
        )
        error += count * abs(plain_rate(mine) - predicted) / len(pairs)
    assert start == len(pairs)
    np.testing.assert_allclose(
        diagnostics.expected_calibration_error(chosen, rejected, bins=bins), error, rtol=1e-9, atol=1e-12
    )


def test_calibration_temperature_maximises_the_likelihood():
    rng = np.random.default_rng(0)
    difference = rng.normal(1.0, 3.0, size=60)
    temperature = diagnostics.calibration_temperature(difference, np.zeros(60))
    grid = temperature * np.linspace(0.8, 1.2, 401)
    likelihood = [-np.sum(np.log1p(np.exp(-difference / t))) for t in grid]
    assert grid[int(np.argmax(likelihood))] == pytest.approx(temperature)


# Strata


@given(st.lists(st.tuples(SCORES, SCORES, st.sampled_from(["b", "a", None])), min_size=1, max_size=25))
def test_strata_agree_with_a_loop_and_add_up(rows):
    chosen, rejected, _ = columns([(a, b, 0) for a, b, _ in rows])
    found = diagnostics.accuracy_by_stratum(chosen, rejected, [label for *_, label in rows])
    assert [s.name for s in found] == sorted({r[2] for r in rows if r[2]}) + [None] * any(r[2] is None for r in rows)
    for stratum in found:
        mine = [(a, b) for a, b, label in rows if label == stratum.name]
        assert stratum.count == len(mine) and stratum.accuracy.mean == pytest.approx(plain_rate(mine))
        assert 0 <= stratum.accuracy.lo <= stratum.accuracy.mean <= stratum.accuracy.hi <= 1
    assert sum(s.count for s in found) == len(rows)
    whole = sum(s.count * s.accuracy.mean for s in found) / len(rows)
    assert whole == pytest.approx(diagnostics.win_rate(chosen, rejected).mean)


def test_intervals_count_prompts_instead_of_pairs():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 5)
    chosen = np.repeat(rng.normal(0.4, 1.0, size=40), 5)
    rejected, strata = np.zeros(200), ["odd" if p % 2 else "even" for p in prompts]
    found = diagnostics.accuracy_by_stratum(chosen, rejected, strata, prompts=prompts.tolist())
    plain = diagnostics.accuracy_by_stratum(chosen, rejected, strata)
    for each, alone, odd in zip(found, plain, (0, 1)):
        mine = prompts % 2 == odd
        right = np.bincount(prompts[mine], weights=(chosen > 0)[mine])
        assert each.accuracy == diagnostics.ratio_interval(right, np.bincount(prompts[mine]), rate=True)
        assert each.accuracy.mean == alone.accuracy.mean
        assert each.accuracy.hi - each.accuracy.lo > 1.8 * (alone.accuracy.hi - alone.accuracy.lo)
    scan = diagnostics.accuracy_above_threshold(chosen, rejected, thresholds=[-9.0, 0.0], prompts=prompts.tolist())
    whole = diagnostics.ratio_interval(np.bincount(prompts, weights=chosen > 0), np.bincount(prompts), rate=True)
    np.testing.assert_allclose((scan.accuracy[0], scan.lo[0], scan.hi[0]), whole)
    lengths = np.where(strata == np.array("odd"), 7, 3), np.full(200, 5)
    bias = diagnostics.length_bias(chosen, rejected, *lengths, prompts=prompts.tolist())
    assert bias.accuracy_where_longer == found[1].accuracy and bias.accuracy_where_shorter == found[0].accuracy
    with pytest.raises(ValueError, match="need 200 prompts, one for each entry, got 3"):
        diagnostics.accuracy_by_stratum(chosen, rejected, strata, prompts=[1, 2, 3])


def test_stratum_of_one_pair_has_a_wide_interval():
    (one, two) = diagnostics.accuracy_by_stratum([1.0, 2.0, 0.0], [0.0, 0.0, 3.0], np.array([2, 10, 10]))
    assert (one.name, two.name) == (2, 10), "numbers are sorted as numbers"
    np.testing.assert_allclose(one.accuracy, (1.0, *diagnostics.wilson(1, 1)))
    assert one.accuracy.lo < 0.21 and two.accuracy.mean == 0.5
    unnamed = diagnostics.accuracy_by_stratum([1.0, 1.0], [0.0, 0.0], [math.nan, None])
    assert [(s.name, s.count) for s in unnamed] == [(None, 2)]
    assert [s.name for s in diagnostics.accuracy_by_stratum([1.0, 1.0], [0.0, 0.0], ["x", 3])] == ["x", 3]
    with pytest.raises(ValueError, match="need 2 labels, one for each entry, got 1"):
        diagnostics.accuracy_by_stratum([1.0, 1.0], [0.0, 0.0], ["x"])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 5))
def test_buckets_contain_their_values_and_equal_values_share_a_bucket(values, count):
    buckets = diagnostics.quantile_buckets(values, count=count)
    assert all(bucket.low <= value <= bucket.high for value, bucket in zip(values, buckets))
    ordered = sorted(set(buckets))
    assert len(ordered) <= count
    assert all(first.high < second.low for first, second in itertools.pairwise(ordered))


def test_buckets_are_about_equally_full_and_print_as_ranges():
    buckets = diagnostics.quantile_buckets(range(1, 101), count=4)
    assert [str(bucket) for bucket in sorted(set(buckets))] == ["1–25", "26–50", "51–75", "76–100"]
    assert str(diagnostics.quantile_buckets([3, 3])[0]) == "3"
    assert str(diagnostics.quantile_buckets([0.5, 1234567], count=1)[0]) == "0.5–1234567"


# Training against validation


def test_difference_of_rates_matches_the_published_example():
    # Newcombe 1998, Table II: 56/70 against 48/80 by method 10.
    first, second = (diagnostics.Estimate(k / n, *diagnostics.wilson(k, n)) for k, n in ((56, 70), (48, 80)))
    np.testing.assert_allclose(diagnostics.difference(first, second), (0.2, 0.0524, 0.3339), atol=5e-5)
    mean, lo, hi = diagnostics.difference(second, first)
    np.testing.assert_allclose((mean, lo, hi), (-0.2, -0.3339, -0.0524), atol=5e-5)


def test_generalisation_gap_detects_overfitting():
    rng = np.random.default_rng(1)
    sure, unsure = rng.normal(3.0, 1.0, size=400), rng.normal(0.5, 1.0, size=300)
    gap = diagnostics.generalisation_gap(sure, np.zeros(400), unsure, np.zeros(300))
    assert gap.accuracy_gap.lo > 0.2 and gap.loss_gap.lo > 0.2
    assert gap.train_accuracy == diagnostics.win_rate(sure, np.zeros(400))
    assert gap.accuracy_gap.mean == pytest.approx((sure > 0).mean() - (unsure > 0).mean())
    loss = [np.mean([-math.log(1 / (1 + math.exp(-d))) for d in each]) for each in (sure, unsure)]
    np.testing.assert_allclose((gap.train_loss.mean, gap.validation_loss.mean), loss)
    assert gap.loss_gap.mean == pytest.approx(loss[1] - loss[0])


def test_generalisation_gap_without_overfitting_covers_zero():
    zeros, drawn = np.zeros(80), np.random.default_rng(9).normal(0.5, 1.0, size=(200, 2, 80))
    gaps = [diagnostics.generalisation_gap(train, zeros, other, zeros) for train, other in drawn]
    for estimates in ([gap.accuracy_gap for gap in gaps], [gap.loss_gap for gap in gaps]):
        assert 0.9 <= np.mean([each.lo <= 0 <= each.hi for each in estimates]) <= 0.99


def test_copies_of_a_pair_within_a_prompt_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    one = rng.normal(0.3, 1.0, size=40)
    prompts = np.repeat(np.arange(40), 6).tolist()
    gap = diagnostics.generalisation_gap(
        np.repeat(one, 6), np.zeros(240), np.repeat(one, 6), np.zeros(240), train_prompts=prompts
    )
    by_prompt = gap.train_loss.hi - gap.train_loss.lo
    assert gap.train_loss.mean == pytest.approx(gap.validation_loss.mean)
    assert by_prompt > 2.2 * (gap.validation_loss.hi - gap.validation_loss.lo), "copies of a pair add no information"
    alone = diagnostics.generalisation_gap(one[:3], np.zeros(3), one, np.zeros(40), train_prompts=["x"] * 3)
    assert (alone.train_loss.lo, alone.train_loss.hi) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="need 40 prompts"):
        diagnostics.generalisation_gap(one, np.zeros(40), one, np.zeros(40), train_prompts=["x"])


# High scores


@given(PAIRS, st.lists(st.integers(-4, 4), min_size=1, max_size=5))
def test_threshold_scan_agrees_with_a_loop(pairs, thresholds):
    scan = diagnostics.accuracy_above_threshold(*columns(pairs), thresholds=thresholds)
    assert scan.threshold.tolist() == sorted(set(thresholds))
    for k, level in enumerate(scan.threshold):
        mine = [(a, b) for a, b in pairs if a >= level and b >= level]
        assert scan.count[k] == len(mine)
        if mine:
            assert scan.accuracy[k] == pytest.approx(plain_rate(mine)) and scan.lo[k] <= scan.accuracy[k] <= scan.hi[k]
        else:
            assert math.isnan(scan.accuracy[k]) and (scan.lo[k], scan.hi[k]) == (0.0, 1.0)


def test_accuracy_that_falls_among_high_scores_has_a_negative_rank_correlation():
    rng = np.random.default_rng(3)
    n = 4000
    level, sign = rng.uniform(0.0, 4.0, size=n), np.where(rng.random(n) < 0.5, 1.0, -1.0)
    right = rng.random(n) < 0.95 - 0.1 * level  # Accuracy falls as scores rise.
    gap = np.where(right, 0.1, -0.1)
    scan = diagnostics.accuracy_above_threshold(level + gap / 2, level - gap / 2)
    assert scan.count.tolist() == [n * k // 10 for k in range(10, 0, -1)]
    assert np.all(np.diff(scan.accuracy) < 0) and scan.spearman == pytest.approx(-1.0)
    flat = diagnostics.accuracy_above_threshold(sign, -sign, thresholds=[-2.0, -1.5, -1.0])
    assert math.isnan(flat.spearman)
    for unreached in ([], [9]):
        odd = diagnostics.accuracy_above_threshold([0, 0, 1, 2, 3], [1, 1, 0, 3, 2], thresholds=[0, 1, 2, *unreached])
        assert odd.accuracy[:3].tolist() == [0.4, 0.5, 0.5] and odd.spearman == pytest.approx(math.sqrt(3) / 2)


# Length


def test_length_correlation_is_computed_within_prompts():
    # Prompts with long responses have low scores; within a prompt the longer response has the higher score.
    scores, lengths = [1.0, 2.0, 3.0, -9.0, -8.0, -7.0], [1, 2, 3, 11, 12, 13]
    assert diagnostics.length_correlation(scores, lengths).mean < -0.9
    within = diagnostics.length_correlation(scores, lengths, groups=["a"] * 3 + ["b"] * 3)
    assert within.mean == pytest.approx(1.0)
    x, y = np.random.default_rng(1).normal(size=(2, 5, 4))
    noisy = diagnostics.length_correlation(x.ravel(), y.ravel(), groups=np.repeat(range(5), 4).tolist(), confidence=0.9)
    x, y = (z - z.mean(axis=1, keepdims=True) for z in (x, y))
    x, y = (z / np.sqrt(np.sum(z**2)) for z in (x, y))
    r = np.sum(x * y)
    changes = 5 / 4 * np.sum(x * y - r * (x**2 + y**2) / 2, axis=1)  # if one of the five groups is left out
    width = stats.t.ppf(0.95, 4) * math.sqrt(4 / 5 * np.sum(changes**2)) / (1 - r**2)
    np.testing.assert_allclose(noisy, (r, *(math.tanh(math.atanh(r) + side) for side in (-width, width))))
    constant = diagnostics.length_correlation([0.1] * 4, [1, 2, 3, 4])
    assert math.isnan(constant.mean) and (constant.lo, constant.hi) == (-1.0, 1.0)
    drawn = np.random.default_rng(0).normal(size=30)
    for scores, groups in (([0.1] * 30, None), ([0.1, 0.7, 1e9 + 0.3] * 10, ["a", "b", "c"] * 10)):
        assert math.isnan(diagnostics.length_correlation(scores, drawn, groups=groups).mean)
        assert math.isnan(diagnostics.length_correlation(drawn, scores, groups=groups).mean)
    tiny = diagnostics.length_correlation(1e-200 * drawn, drawn)
    assert tiny.mean == pytest.approx(1.0), "small scores do not underflow"


@pytest.mark.parametrize("n", [4, 10, 5000])
def test_length_correlation_agrees_with_scipy(n):
    x, y = np.random.default_rng(n).normal(size=(2, n))
    expected: Any = stats.pearsonr(x, 0.2 * x + y)
    got = diagnostics.length_correlation(x, 0.2 * x + y)
    assert got.mean == pytest.approx(expected.statistic, rel=1e-9)
    if n == 5000:  # The robust interval of normal values approaches Fisher's.
        np.testing.assert_allclose(got[1:], expected.confidence_interval(0.95), atol=2e-3)


def test_length_bias_matches_hand_computed_values():
    # Chosen answers are longer, longer, shorter, shorter, equal; their scores are right, wrong, right, wrong, tied.
    chosen, rejected = [2.0, 0.0, 2.0, 0.0, 1.0], [0.0, 1.0, 1.0, 3.0, 1.0]
    bias = diagnostics.length_bias(chosen, rejected, [5, 4, 1, 2, 3], [1, 3, 2, 4, 3])
    assert (bias.longer_wins.mean, bias.shorter_wins.mean) == (0.5, 0.5)
    assert bias.prefers_longer.mean == 0.5 and (bias.equal_lengths, bias.count) == (1, 5)
    assert (bias.accuracy_where_longer.mean, bias.accuracy_where_shorter.mean) == (0.5, 0.5)
    d, e = np.array([2, -1, 1, -3, 0]), np.array([4, 1, -1, -2, 0])
    assert bias.correlation.mean == pytest.approx((d @ e) / math.sqrt((d @ d) * (e @ e)))
    assert bias.explained == pytest.approx(bias.correlation.mean**2)


def test_length_bias_detects_a_model_that_scores_length():
    rng = np.random.default_rng(4)
    a, b = rng.integers(5, 60, size=(2, 300))
    lengths = np.where(rng.random(300) < 0.6, np.maximum(a, b), np.minimum(a, b)), None
    chosen = lengths[0]
    rejected = a + b - chosen
    bias = diagnostics.length_bias(0.1 * chosen, 0.1 * rejected, chosen, rejected)
    assert bias.prefers_longer.mean == 1.0 and bias.explained == pytest.approx(1.0)
    assert (bias.accuracy_where_longer.mean, bias.accuracy_where_shorter.mean) == (1.0, 0.0)
    assert bias.longer_wins.mean + bias.shorter_wins.mean == pytest.approx(1.0)
    mirror = diagnostics.length_bias(-0.1 * chosen, -0.1 * rejected, chosen, rejected)
    assert mirror.correlation.mean == pytest.approx(-1.0) and mirror.prefers_longer.mean == 0.0
    same = diagnostics.length_bias([1.0, 2.0], [0.0, 0.0], [4, 4], [4, 4])
    assert math.isnan(same.prefers_longer.mean) and same.equal_lengths == 2 and math.isnan(same.explained)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30), st.integers(1, 50))
def test_controlled_rate_at_equal_lengths_is_the_plain_rate(outcomes, length):
    lengths = [length] * len(outcomes)
    got = diagnostics.length_controlled_win_rates(outcomes, lengths, lengths)
    assert got.rates[0].mean == pytest.approx(np.mean(outcomes), abs=1e-9)
    assert got.rates[0].lo <= got.rates[0].mean <= got.rates[0].hi and math.isnan(got.length_effect.mean)
    p, n, z = np.mean(outcomes), len(outcomes), stats.norm.ppf(0.975)
    if 0 < p < 1:  # The standard error of a mean; ties reduce it, but shrinkage keeps it above 0.
        share = n / (n + z**2)
        variance = share * np.mean(np.square(outcomes - p)) + (1 - share) * p * (1 - p)
        assert got.errors[0] == pytest.approx(math.sqrt(variance / n))


def compared(n, *, win, effect, longer, seed):
    """Returns outcomes with log odds ``win + effect * log ratio``; ``longer`` is the typical length ratio."""
    rng = np.random.default_rng(seed)
    theirs = rng.uniform(20, 60, size=n)
    own = theirs * np.exp(rng.normal(math.log(longer), 0.4, size=n))
    return (rng.random(n) < special.expit(win + effect * np.log(own / theirs))).astype(float), own, theirs


def test_length_controlled_win_rate_removes_the_effect_of_length():
    outcomes, own, theirs = compared(20_000, win=0.4, effect=2.0, longer=1.5, seed=5)
    got = diagnostics.length_controlled_win_rates(outcomes, own, theirs)
    assert got.plain[0].mean > 0.7 and got.rates[0].mean == pytest.approx(special.expit(0.4), abs=0.012)
    assert got.length_effect.lo < 2.0 < got.length_effect.hi
    # The result does not depend on the unit of length, and is antisymmetric.
    np.testing.assert_allclose(
        diagnostics.length_controlled_win_rate(outcomes, 3 * own, 3 * theirs), got.rates[0], rtol=1e-9
    )
    mirrored = diagnostics.length_controlled_win_rate(1 - outcomes, theirs, own)
    np.testing.assert_allclose([1 - x for x in mirrored], np.array(got.rates[0])[[0, 2, 1]], rtol=1e-7)


def test_policies_share_one_effect_of_length():
    one, two = (
        compared(3000, win=0.4, effect=1.0, longer=1.5, seed=6),
        compared(3000, win=-0.4, effect=1.0, longer=0.7, seed=7),
    )
    outcomes, own, theirs = (np.concatenate(each) for each in zip(one, two))
    who = ["long"] * 3000 + ["short"] * 3000
    got = diagnostics.length_controlled_win_rates(outcomes, own, theirs, who)
    assert got.policies == ["long", "short"]
    for k, win in enumerate((0.4, -0.4)):
        assert got.rates[k].lo < special.expit(win) < got.rates[k].hi
    # A policy that always wins does not affect the others.
    more = diagnostics.length_controlled_win_rates(
        [*outcomes, 1.0, 1.0], [*own, 9.0, 1.0], [*theirs, 2.0, 5.0], [*who, "best", "best"]
    )
    assert more.rates[2] == diagnostics.win_rate([1.0, 1.0], [0.0, 0.0]) and math.isnan(more.errors[2])
    np.testing.assert_allclose(more.rates[0].mean, got.rates[0].mean, rtol=1e-9)


def test_length_controlled_interval_has_nominal_coverage():
    hits = []
    for seed in range(200):
        rate = diagnostics.length_controlled_win_rate(*compared(150, win=0.3, effect=1.0, longer=1.3, seed=seed))
        hits.append(rate.lo <= special.expit(0.3) <= rate.hi)
    assert 0.9 <= np.mean(hits) <= 0.99


def test_outcomes_decided_by_length_alone_have_no_controlled_rate():
    got = diagnostics.length_controlled_win_rates([1.0, 1.0, 0.0], [4, 5, 1], [2, 2, 2])
    assert math.isnan(got.rates[0].mean) and got.rates[0][1:] == (0.0, 1.0) and got.length_effect.mean == math.inf
    assert diagnostics.length_controlled_win_rates([0.0, 0.0, 1.0], [4, 5, 1], [2] * 3).length_effect.mean == -math.inf
    touching = diagnostics.length_controlled_win_rates([1.0, 1.0, 0.0, 0.0], [4, 2, 2, 1], [2] * 4)
    assert math.isnan(touching.rates[0].mean) and touching.length_effect.mean == math.inf
    with pytest.raises(ValueError, match="cannot be separated"):
        diagnostics.length_controlled_win_rate([1.0, 0.0], [4, 4], [2, 2])
    # Only the policy that always wins has varying length ratios; the entries of the others do not change.
    got = diagnostics.length_controlled_win_rates(
        [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1, 5, 4, 4, 2, 2, 2], [2] * 7, ["best"] * 2 + ["long"] * 2 + ["same"] * 3
    )
    assert got.rates[0] == got.plain[0] and math.isnan(got.length_effect.mean)
    assert math.isnan(got.rates[1].mean) and got.rates[1][1:] == (0.0, 1.0)
    assert got.rates[2] == diagnostics.length_controlled_win_rate([1.0, 0.0, 0.0], [2] * 3, [2] * 3)
    assert got.rates[2].mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="above 0"):
        diagnostics.length_controlled_win_rate([1.0, 0.0], [0, 4], [2, 2])
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        diagnostics.length_controlled_win_rate([2.0, 0.0], [3, 4], [2, 2])
