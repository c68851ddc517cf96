"""Diversity of responses, against loops, against NLTK and by simulation."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import diagnostics

SETS = st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=2, max_size=6)


def draws(sequences, n, size, rng, times):
    ngrams = [tuple(row[i : i + n]) for row in sequences for i in range(len(row) - n + 1)]
    return [len({ngrams[i] for i in rng.choice(len(ngrams), size, replace=False)}) / size for _ in range(times)]


def test_the_ratio_of_a_smaller_set_is_the_mean_over_random_subsets():
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, 6, size=(5, 7)).tolist()
    for n, size in ((1, 4), (1, 20), (2, 11)):
        expected = np.mean(draws(sequences, n, size, rng, 4000))
        assert diagnostics.distinct_n(sequences, n=n, size=size) == pytest.approx(expected, abs=0.008)


@given(SETS)
@settings(max_examples=50, deadline=None)
def test_one_ngram_is_always_distinct_and_all_ngrams_give_the_ratio_of_the_set(sequences):
    total = sum(len(row) for row in sequences)
    if total:
        assert diagnostics.distinct_n(sequences, n=1, size=1) == pytest.approx(1)
        assert diagnostics.distinct_n(sequences, n=1, size=total) == diagnostics.distinct_n(sequences, n=1)
        ratios = [diagnostics.distinct_n(sequences, n=1, size=size) for size in range(1, total + 1)]
        assert np.all(np.diff(ratios) <= 1e-12)


def test_a_larger_set_from_the_same_distribution_is_equally_diverse_at_equal_size():
    rng = np.random.default_rng(1)
    small, large = rng.integers(0, 50, size=(40, 10)).tolist(), rng.integers(0, 50, size=(400, 10)).tolist()
    plain = [diagnostics.distinct_n(each, n=2) for each in (small, large)]
    equal = diagnostics.equal_distinct_n([small, large, [], [[3]]], n=2)
    assert plain[0] - plain[1] > 0.3
    assert equal[0] == plain[0] and equal[1] == pytest.approx(plain[0], abs=0.02)
    assert np.isnan(equal[2:]).all()
    size = diagnostics.fewest_ngrams([small, large, [], [[3]]], n=2)
    assert size == sum(len(row) - 1 for row in small)
    assert equal[1] == diagnostics.distinct_n(large, n=2, size=size) and diagnostics.fewest_ngrams([[[3]]], n=2) == 0


def test_too_large_a_size_is_refused():
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"size is {size}; it must be between 1 and 2"):
            diagnostics.distinct_n([[1, 2]], n=1, size=size)


def bleu(row, references, n):
    """BLEU of one sentence, by its definition."""
    logs = 0.0
    for order in range(1, n + 1):
        grams = [Counter(tuple(each[i : i + order]) for i in range(len(each) - order + 1)) for each in references]
        own = Counter(tuple(row[i : i + order]) for i in range(len(row) - order + 1))
        hits = sum(min(count, max(each[gram] for each in grams)) for gram, count in own.items())
        if order == 1 and not hits:
            return 0.0
        logs += math.log((hits or 0.1) / max(1, own.total()))
    closest = min((abs(len(each) - len(row)), len(each)) for each in references)[1]
    return min(1.0, math.exp(1 - closest / len(row))) * math.exp(logs / n)


@given(SETS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_self_bleu_is_the_mean_of_bleu_with_all_others_as_references(sequences, n):
    rows = [row for row in sequences if row]
    if len(rows) < 2:
        assert math.isnan(diagnostics.self_bleu(sequences, n=n))
        return
    expected = np.mean([bleu(row, rows[:i] + rows[i + 1 :], n) for i, row in enumerate(rows)])
    assert diagnostics.self_bleu(sequences, n=n) == pytest.approx(expected)


def test_self_bleu_agrees_with_nltk():
    scores = pytest.importorskip("nltk.translate.bleu_score")
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 4, size=rng.integers(1, 12)).tolist() for _ in range(30)]
    method = scores.SmoothingFunction().method1
    theirs = [
        scores.sentence_bleu(rows[:i] + rows[i + 1 :], row, smoothing_function=method) for i, row in enumerate(rows)
    ]
    assert diagnostics.self_bleu(rows) == pytest.approx(np.mean(theirs))


def test_equal_responses_have_a_self_bleu_of_one_and_disjoint_ones_of_zero():
    assert diagnostics.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert diagnostics.self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == 0


def entropies(rng, n, temperature, words=20):
    """Entropies and lengths of responses whose token distribution is a softmax at a temperature."""
    tokens_B = rng.integers(1, 12, size=n)
    logits = rng.normal(size=(n, words)) / temperature
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    return tokens_B * -(probs * np.log(probs)).sum(axis=1), tokens_B


def test_the_entropy_ratio_is_that_of_the_means_per_token():
    found = diagnostics.entropy_ratio([1.0, 3.0], [2, 2], [6.0, 2.0], [1, 3])
    assert found.mean == pytest.approx((4 / 4) / (8 / 4))
    assert found.lo < found.mean < found.hi
    same = diagnostics.entropy_ratio([1.0, 3.0], [2, 2], [1.0, 3.0], [2, 2])
    assert same == pytest.approx((1, 1, 1))


def test_the_interval_of_the_entropy_ratio_covers_it():
    rng = np.random.default_rng(3)
    big = [entropies(np.random.default_rng(9), 200_000, t) for t in (0.5, 1.0)]
    truth = (big[0][0].sum() / big[0][1].sum()) / (big[1][0].sum() / big[1][1].sum())
    covered = []
    for _ in range(600):
        found = diagnostics.entropy_ratio(*entropies(rng, 30, 0.5), *entropies(rng, 30, 1.0))
        covered.append(found.lo < truth < found.hi)
    assert abs(np.mean(covered) - 0.95) < 0.03


def test_repeated_prompts_do_not_narrow_the_interval_of_the_entropy_ratio():
    rng = np.random.default_rng(4)
    columns = [*entropies(rng, 20, 0.5), *entropies(rng, 20, 1.0)]
    once = diagnostics.entropy_ratio(*columns)
    repeated = [np.repeat(each, 5) for each in columns]
    clustered = diagnostics.entropy_ratio(*repeated, clusters=np.repeat(np.arange(20), 5).tolist())
    assert clustered == pytest.approx(once)
    assert diagnostics.entropy_ratio(*repeated).hi < once.hi


def test_a_single_prompt_or_a_deterministic_model_has_no_interval():
    assert diagnostics.entropy_ratio([1.0], [2], [2.0], [2]) == (0.5, 0, math.inf)
    assert diagnostics.entropy_ratio([0.0, 0.0], [2, 2], [2.0, 1.0], [2, 1]) == (0, 0, math.inf)
    assert math.isnan(diagnostics.entropy_ratio([1.0, 1.0], [2, 2], [0.0, 0.0], [2, 1]).mean)
    for columns in (([1.0], [0], [1.0], [1]), ([1.0], [1], [1.0, 2.0], [1, 1])):
        with pytest.raises(ValueError, match="equal shape"):
            diagnostics.entropy_ratio(*columns)


def test_the_matched_temperature_is_the_one_that_made_the_policy():
    logits = np.random.default_rng(5).normal(size=(40, 30)) * 2

    def entropy(temperature):
        scaled = logits / temperature
        logprobs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        return float(-(np.exp(logprobs) * logprobs).sum(axis=1).mean())

    for temperature in (0.3, 0.6, 1.4):
        assert diagnostics.matched_temperature(entropy, entropy(temperature)) == pytest.approx(temperature, abs=2e-3)


def test_a_temperature_outside_the_bounds_is_the_nearest_bound():
    assert diagnostics.matched_temperature(lambda t: t, 0.01, low=0.1) == 0.1
    assert diagnostics.matched_temperature(lambda t: t, 7.0, high=3.0) == 3.0
    with pytest.raises(ValueError, match="0 < low < high"):
        diagnostics.matched_temperature(lambda t: t, 1.0, low=0.0)
    with pytest.raises(ValueError, match="diversity at temperature"):
        diagnostics.matched_temperature(lambda t: math.nan, 1.0)
