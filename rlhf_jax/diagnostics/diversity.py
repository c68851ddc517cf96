"""Diversity of a set of responses. Compare only sets of responses to the same prompts with similar lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

Tokens = Sequence[Hashable]
"""Token ids or words, without padding."""


def distinct_n(sequences: Sequence[Tokens], *, n: int) -> float:
    """Returns the number of distinct n-grams divided by the number of all n-grams in the set (Li 2016), in (0, 1].

    The ratio is NaN if no sequence has n tokens. It falls as the set grows, so compare sets of equal size. It has no
    interval: resampled sets repeat sequences, and the jackknife over prompts covers 99 % instead of 95 %.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> diagnostics.distinct_n([[1, 2, 1, 2]], n=1)
        0.5
    """
    counts = Counter(ngram for sequence in sequences for ngram in _ngrams(sequence, n))
    return len(counts) / counts.total() if counts else float("nan")


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
