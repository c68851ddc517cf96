"""Verdicts follow from intervals that cover the truth."""

import numpy as np
import pytest
from claims import claim_results, verdicts
from claims.instructgpt import c09_kl_coefficient


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.05], "shown"),
        ([1.0, -1.0, 0.5], "not shown"),
        ([-1.0, -1.1, -0.9], "refuted"),
        ([5.0], "not shown"),
    ],
)
def test_a_statistic_is_shown_if_its_interval_is_in_the_range(values, verdict):
    assert verdicts.above("x", values).verdict == verdict
    assert verdicts.below("x", np.negative(values)).verdict == verdict
    assert verdicts.between("x", values, 0.0, 9.0).verdict == verdict
    assert verdicts.above("x", np.add(values, 7), 7.0).verdict == verdict


def test_a_claim_is_shown_if_all_parts_are_and_refuted_if_one_is():
    def parts(*names):
        return [verdicts.Part("x", 0.0, (0.0, 0.0), name) for name in names]

    assert verdicts.overall(parts("shown", "shown")) == "shown"
    assert verdicts.overall(parts("shown", "not shown")) == "not shown"
    assert verdicts.overall(parts("shown", "not shown", "refuted")) == "refuted"


def test_false_claims_are_shown_in_at_most_one_of_forty_cases():
    rng = np.random.default_rng(0)
    shown = [verdicts.above("x", values_S).verdict == "shown" for values_S in rng.normal(size=(4000, 5))]
    assert abs(np.mean(shown) - 0.025) < 0.008


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_the_interval_of_the_ratio_of_spreads_covers_it(ratio):
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(2000):
        shared_S, x_S, y_S = rng.normal(size=(3, 5))
        lo, hi = verdicts.spread_above("x / y", ratio * (x_S + shared_S), y_S + shared_S).ci
        covered.append(lo < np.log(ratio) < hi)
    assert abs(np.mean(covered) - 0.95) < 0.015


def test_jackknife_values_of_a_mean_are_the_values_themselves():
    values = [1.0, 2.5, -3.0, 4.0]
    np.testing.assert_allclose(verdicts.jackknife(np.mean, values), values)
    np.testing.assert_array_equal(verdicts.jackknife(np.mean, [2.0]), [2.0])


def test_the_jackknife_interval_of_a_ratio_of_means_covers_it():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(2000):
        pairs = [(3 + each[0], 2 + each[1]) for each in rng.normal(size=(5, 2)) / 4]
        values_S = verdicts.jackknife(lambda chosen: np.mean(chosen, axis=0)[0] / np.mean(chosen, axis=0)[1], pairs)
        lo, hi = verdicts.above("x", values_S).ci
        covered.append(lo < 1.5 < hi)
    assert abs(np.mean(covered) - 0.95) < 0.02


def arms(gold_C):
    return {
        f"{coef:g}": {"gold": gold, "score": 0.0, "kl": 0.0} for coef, gold in zip(c09_kl_coefficient.COEFS, gold_C)
    }


def test_the_optimum_of_the_kl_coefficient_is_chosen_on_the_other_seeds():
    rng = np.random.default_rng(0)
    peak = 0.1 * np.array([0, 1, 3, 2, 0])
    decided = c09_kl_coefficient.decide([arms(peak + 0.01 * rng.normal(size=5)) for _ in range(5)])
    assert [part.verdict for part in decided] == ["shown", "shown"]
    assert abs(decided[0].value - 0.3) < 0.02
    flat = [
        verdicts.overall(c09_kl_coefficient.decide([arms(0.01 * rng.normal(size=5)) for _ in range(5)])) == "shown"
        for _ in range(300)
    ]
    assert np.mean(flat) < 0.05  # chosen on all seeds, the best of three would be above both ends


def test_exchanged_arms_are_rarely_shown():
    rng = np.random.default_rng(1)
    peak = 0.1 * np.array([0, 1, 3, 2, 0])
    measured = [arms(peak + 0.01 * rng.normal(size=5)) for _ in range(5)]
    assert claim_results.null_rate(c09_kl_coefficient.CLAIM, measured, shuffles=300) < 0.05
