"""How varied a set of answers is; the same prompt and lengths must stand behind two numbers that are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

Tokens = Sequence[Hashable]
"""Token ids or words, without padding."""


def distinct_n(sequences: Sequence[Tokens], *, n: int) -> float:
    """Different n-grams over all n-grams of the whole set, in (0, 1]; NaN if no sequence has n tokens.

    Falls as the set grows, so compare sets of one size.
    """
    counts = Counter(gram for sequence in sequences for gram in _ngrams(sequence, n))
    return len(counts) / counts.total() if counts else float("nan")


def token_entropy(sequences: Sequence[Tokens]) -> float:
    """Entropy in nats of the pooled distribution of tokens; NaN if there are none."""
    counts = np.array(list(Counter(token for sequence in sequences for token in sequence).values()), np.float64)
    if not len(counts):
        return float("nan")
    probs = counts / counts.sum()
    return float(-np.sum(probs * np.log(probs)))


def self_overlap(sequences: Sequence[Tokens], *, n: int = 4) -> float:
    """Mean over sequences of the share of their n-grams that some *other* sequence has too.

    0 when no two share an n-gram, 1 when all are the same. Sequences shorter than n are left out; NaN if fewer than two
    remain.
    """
    rows = [grams for grams in (list(_ngrams(sequence, n)) for sequence in sequences) if grams]
    if len(rows) < 2:
        return float("nan")
    holders = Counter(gram for grams in rows for gram in set(grams))
    return float(np.mean([np.mean([holders[gram] > 1 for gram in grams]) for grams in rows]))


def _ngrams(sequence: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))
