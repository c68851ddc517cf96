"""Diversity of sets of responses to the same prompts, and how much a policy has narrowed it.

`distinct_n` and `self_bleu` depend on the number of tokens or responses, so compare sets of equal size:
`equal_distinct_n` reduces all sets to the same number of n-grams, and `self_bleu` needs equally many responses of each
policy. `entropy_ratio` and `matched_temperature` describe a policy relative to its initial model: after RLHF, a policy
acts like the initial model at a lower temperature (Bai et al. 2022, 4.5 and B.10: about 0.6).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rlhf_jax.diagnostics import intervals

Tokens = Sequence[Hashable]
"""Token ids or words, without padding."""
Ngram = tuple[Hashable, ...]


def distinct_n(sequences: Sequence[Tokens], *, n: int, size: int | None = None) -> float:
    """Returns the number of distinct n-grams divided by the number of all n-grams in the set (Li 2016), in (0, 1].

    The ratio falls as the set grows, so compare sets of equal size. With ``size``, it is the expected ratio of that
    many n-grams, drawn from the set without replacement (rarefaction; Hurlbert 1971), which needs no random numbers. It
    has no interval: resampled sets repeat sequences, and the jackknife over prompts covers 99 % instead of 95 %.

    Args:
        sequences: The responses.
        n: Length of the n-grams.
        size: Number of n-grams to which the set is reduced; None for all.

    Returns:
        The ratio; NaN if no sequence has n tokens.

    Raises:
        ValueError: ``size`` is below 1 or above the number of n-grams.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.distinct_n([[1, 2, 1, 2]], n=1)
        0.5
        >>> round(diagnostics.distinct_n([[1, 2, 1, 2]], n=1, size=2), 3)
        0.833
    """
    counts = _counts(sequences, n)
    total = int(counts.sum())
    if not total:
        return float("nan")
    if size is None or size == total:
        return len(counts) / total
    if not 1 <= size <= total:
        raise ValueError(f"size is {size}; it must be between 1 and {total}, the number of n-grams")
    others = total - counts
    # Probability that none of the c copies of an n-gram is drawn: C(N - c, size) / C(N, size).
    missed = _log_choose(np.maximum(others, size), size) - _log_choose(np.array(total), size)
    return float(np.sum(1 - np.where(others >= size, np.exp(missed), 0.0)) / size)


def equal_distinct_n(sets: Sequence[Sequence[Tokens]], *, n: int) -> list[float]:
    """Returns `distinct_n` of several sets, all reduced to the number of n-grams of the smallest set.

    Sets without n-grams are NaN and do not count as the smallest. Pass responses to the same prompts.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.equal_distinct_n([[[1, 2]], [[1, 2, 3, 4]]], n=1)
        [1.0, 1.0]
    """
    smallest = fewest_ngrams(sets, n=n)
    return [distinct_n(each, n=n, size=smallest if _counts(each, n).sum() else None) for each in sets]


def fewest_ngrams(sets: Sequence[Sequence[Tokens]], *, n: int) -> int:
    """Returns the number of n-grams to which `equal_distinct_n` reduces all sets; 0 if no set has any.

    Report it with the ratios, because those of different sizes cannot be compared.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.fewest_ngrams([[[1, 2]], [[1, 2, 3, 4]], []], n=2)
        1
    """
    sizes = (int(_counts(each, n).sum()) for each in sets)
    return min((size for size in sizes if size), default=0)


def self_bleu(sequences: Sequence[Tokens], *, n: int = 4) -> float:
    """Returns the mean BLEU of each sequence with all others as its references (Zhu et al. 2018, Texygen), in [0, 1].

    The lower, the more diverse is the set. BLEU is that of a single sentence with n-grams of 1 to ``n`` tokens, in
    which a precision of 0 is replaced by 0.1 divided by the number of n-grams (method 1 of Chen and Cherry 2014). It
    rises with the number of sequences, because each has more references, so compare sets with equal numbers of
    responses. Empty sequences are ignored; the result is NaN if fewer than two remain.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.self_bleu([[1, 2, 3, 4], [1, 2, 3, 4]])
        1.0
    """
    rows = [list(sequence) for sequence in sequences if len(sequence)]
    if len(rows) < 2:
        return float("nan")
    log_precision = np.zeros(len(rows))
    overlaps = np.ones(len(rows), bool)
    for order in range(1, n + 1):
        counts = [Counter(_ngrams(row, order)) for row in rows]
        highest = _two_highest(counts)
        matches = np.array([_matches(row, each, highest) for row, each in enumerate(counts)], np.float64)
        overlaps &= (matches > 0) | (order > 1)
        log_precision += np.log(np.where(matches > 0, matches, 0.1) / [max(count.total(), 1) for count in counts])
    return float(np.mean(np.where(overlaps, _brevity(rows) * np.exp(log_precision / n), 0.0)))


def entropy_ratio(
    entropy_B: npt.ArrayLike,
    tokens_B: npt.ArrayLike,
    initial_entropy_B: npt.ArrayLike,
    initial_tokens_B: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Returns the mean entropy per token of a policy divided by that of the initial model; below 1, RL narrowed it.

    The entropies are those of the distributions from which the tokens of the responses are drawn, each summed over the
    positions of a response that this model sampled. The negative log-probability of a response is an unbiased estimate
    of this sum. The interval is that of the logarithm of the ratio, by the jackknife over clusters.

    Args:
        entropy_B: Summed entropies of the policy's responses, in nats.
        tokens_B: Number of tokens of each response.
        initial_entropy_B: Those of the initial model, with responses to the same prompts in the same order.
        initial_tokens_B: Number of tokens of each of its responses.
        clusters: What each prompt asks; prompts of a cluster are not independent. By default, each is its own.
        confidence: Coverage of the interval.

    Returns:
        The ratio and its interval. The ratio is NaN if the initial model has an entropy of 0, and the interval is (0,
        inf) with a single cluster or if an entropy is not positive.

    Raises:
        ValueError: The arrays differ in shape or contain NaN, or a model has no tokens.
    """
    columns = [intervals.samples(each) for each in (entropy_B, tokens_B, initial_entropy_B, initial_tokens_B)]
    if len({each.shape for each in columns}) > 1 or not columns[1].sum() > 0 or not columns[3].sum() > 0:
        raise ValueError("need four arrays of equal shape, and at least one token of each model")
    B = len(columns[0])
    index = np.arange(B) if clusters is None else intervals.label_indices(clusters, B, "clusters")[1]
    sums_4C = np.stack([np.bincount(index, weights=each) for each in columns])
    total_4, C = sums_4C.sum(axis=1), sums_4C.shape[1]
    if not total_4[2]:
        return intervals.Estimate(math.nan, 0.0, math.inf)
    ratio = float(total_4[0] / total_4[1] * total_4[3] / total_4[2])
    without_4C = total_4[:, None] - sums_4C
    if C < 2 or not (without_4C > 0).all():
        return intervals.Estimate(ratio, 0.0, math.inf)
    logs_C = np.array([1, -1, -1, 1]) @ np.log(without_4C)
    deviation = math.sqrt((C - 1) / C * float(np.square(logs_C - math.log(ratio)).sum()))
    half = intervals.critical(confidence, freedom=C - 1) * deviation
    return intervals.Estimate(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def matched_temperature(
    diversity: Callable[[float], float], target: float, *, low: float = 0.05, high: float = 2.0, tolerance: float = 1e-3
) -> float:
    """Returns the temperature at which the initial model is as diverse as a policy (Bai et al. 2022, 4.5 and B.10).

    ``diversity`` maps a temperature of the initial model to any number that rises with it, such as its mean entropy
    per token or its `distinct_n`, and is called at a few temperatures. Use the same random keys at all of them.

    Args:
        diversity: The number at a temperature.
        target: The same number of the policy.
        low: Lowest temperature to consider; returned if the initial model is at least as diverse there.
        high: Highest temperature to consider; returned if the initial model is at most as diverse there.
        tolerance: Largest error of the temperature.

    Returns:
        The temperature.

    Raises:
        ValueError: The bounds are not 0 < low < high, or a number is not finite.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> round(diagnostics.matched_temperature(lambda t: 2 * t, 1.2), 2)
        0.6
    """
    if not 0 < low < high:
        raise ValueError(f"need 0 < low < high, got {low} and {high}")

    def excess(temperature: float) -> float:
        found = float(diversity(temperature)) - target
        if not math.isfinite(found):
            raise ValueError(f"the diversity at temperature {temperature:g} minus the target is {found}")
        return found

    if excess(low) >= 0:
        return low
    if excess(high) <= 0:
        return high
    return float(optimize.brentq(excess, low, high, xtol=tolerance))  # pyright: ignore[reportArgumentType]


def token_entropy(sequences: Sequence[Tokens]) -> float:
    """Returns the entropy ``-sum p log p`` of the pooled token distribution, in nats; NaN if there are no tokens."""
    counts = np.array(list(Counter(token for sequence in sequences for token in sequence).values()), np.float64)
    if not len(counts):
        return float("nan")
    probs = counts / counts.sum()
    return float(-np.sum(probs * np.log(probs)))


def self_overlap(sequences: Sequence[Tokens], *, n: int = 4) -> float:
    """Returns the share of a sequence's n-grams that also occur in another sequence, averaged over sequences.

    The result is 0 if no two sequences share an n-gram, and 1 if all sequences are equal. Sequences shorter than n are
    ignored; the result is NaN if fewer than two remain.
    """
    rows = [ngrams for ngrams in (list(_ngrams(sequence, n)) for sequence in sequences) if ngrams]
    if len(rows) < 2:
        return float("nan")
    sequence_counts = Counter(ngram for ngrams in rows for ngram in set(ngrams))
    return float(np.mean([np.mean([sequence_counts[ngram] > 1 for ngram in ngrams]) for ngrams in rows]))


def _ngrams(sequence: Tokens, n: int) -> Iterator[Ngram]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def _counts(sequences: Sequence[Tokens], n: int) -> np.ndarray:
    """Returns how often each distinct n-gram occurs."""
    found = Counter(ngram for sequence in sequences for ngram in _ngrams(sequence, n))
    return np.array(list(found.values()), np.float64)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _two_highest(counts: Sequence[Counter[Ngram]]) -> dict[Ngram, tuple[int, int, int]]:
    """Returns the highest count of each n-gram in one sequence, that sequence, and the highest count in the others."""
    highest: dict[Ngram, tuple[int, int, int]] = {}
    for row, each in enumerate(counts):
        for ngram, count in each.items():
            first, where, second = highest.get(ngram, (0, -1, 0))
            highest[ngram] = (count, row, first) if count > first else (first, where, max(second, count))
    return highest


def _matches(row: int, counts: Counter[Ngram], highest: dict[Ngram, tuple[int, int, int]]) -> int:
    """Returns the number of n-grams of a sequence that occur in another, each at most as often as there."""
    found = ((count, *highest[ngram]) for ngram, count in counts.items())
    return sum(min(count, second if where == row else first) for count, first, where, second in found)


def _brevity(rows: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Returns BLEU's brevity penalty of each sequence, for the length among the others that is closest to its own."""
    lengths = Counter(len(row) for row in rows)
    closest = {
        own: own if count > 1 else min((abs(each - own), each) for each in lengths if each != own)[1]
        for own, count in lengths.items()
    }
    return np.array([min(1.0, math.exp(1 - closest[len(row)] / len(row))) for row in rows])
