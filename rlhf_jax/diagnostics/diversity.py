"""Diversity of a set of responses. Compare only sets of responses to the same prompts with similar lengths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from rlhf_jax.diagnostics import intervals

Tokens = Sequence[Hashable]
"""Token ids or words, without padding."""


def distinct_n(sequences: Sequence[Tokens], *, n: int) -> float:
    """Returns the number of distinct n-grams divided by the number of all n-grams in the set (Li 2016), in (0, 1].

    The ratio is NaN if no sequence has n tokens. It falls as the set grows, so compare sets of equal size.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.distinct_n([[1, 2, 1, 2]], n=1)
        0.5
    """
    counts = Counter(ngram for sequence in sequences for ngram in _ngrams(sequence, n))
    return len(counts) / counts.total() if counts else float("nan")


def distinct_n_interval(
    sequences: Sequence[Tokens], clusters: Sequence[Hashable], *, n: int, confidence: float = 0.95
) -> intervals.Estimate:
    """Returns `distinct_n` and its interval, with clusters of sequences as the independent units.

    The interval is for the expected ratio of a set of this size. Its variance is the jackknife's over clusters.

    Args:
        sequences: The set of responses.
        clusters: One label per response, such as its prompt or what the prompt asks.
        n: Length of the n-grams.
        confidence: Coverage of the interval.

    Returns:
        The ratio and its interval, which is infinitely wide for a single cluster; NaN if no sequence has n tokens.

    Raises:
        ValueError: If there is not one label per response, n is below 1, or ``confidence`` is not in (0, 1).
    """
    names, index = intervals.label_indices(clusters, len(sequences), "clusters")
    counts = [Counter[tuple[Hashable, ...]]() for _ in names]
    for cluster, sequence in zip(index, sequences):
        counts[cluster].update(_ngrams(sequence, n))
    homes = Counter(ngram for each in counts for ngram in each)
    totals_C = np.array([each.total() for each in counts], np.float64)
    own_C = np.array([sum(homes[ngram] == 1 for ngram in each) for each in counts], np.float64)
    ratio = len(homes) / totals_C.sum() if homes else math.nan
    _, freedom = intervals.jackknife(totals_C, totals_C)
    t = intervals.critical(confidence, freedom=freedom)
    if not freedom:
        return intervals.Estimate(ratio, -math.inf, math.inf)
    without_C = (len(homes) - own_C) / (totals_C.sum() - totals_C)
    width = t * math.sqrt((len(names) - 1) * float(np.var(without_C)))
    return intervals.Estimate(ratio, ratio - width, ratio + width)


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


def _ngrams(sequence: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))
